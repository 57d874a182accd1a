"""Fit tasks one after another, each merged into the base before the next one.

    python scripts/continual_fit.py --order drawing classes utils --output_dir runs/continual

What it reads and writes: :mod:`bora_pyro.runs.continual`. Every option: ``python scripts/continual_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("continual-fit")

if __name__ == "__main__":
    run_script(main)
