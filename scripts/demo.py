"""Fit the embedded base model to the embedded data: a MAP fit of some minutes that needs no file and no network.

    python scripts/demo.py --output_dir runs/demo

Every option: ``python scripts/demo.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("demo")

if __name__ == "__main__":
    run_script(main)
