"""Fit means and scales that all tasks share, from which a few gradient steps adapt each task (ABMLL).

    python scripts/meta_fit.py --inner_steps 5 --beta 0.001 --output_dir runs/meta

What it reads and writes: :mod:`bora_pyro.runs.meta_fit`. Every option: ``python scripts/meta_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("meta-fit")

if __name__ == "__main__":
    run_script(main)
