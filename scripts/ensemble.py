"""Fit a deep ensemble: several MAP fits of the same documents, whose predictions are averaged.

    python scripts/ensemble.py --members 4 --output_dir runs/ensemble

What it reads and writes: :mod:`bora_pyro.runs.ensemble`. Every option: ``python scripts/ensemble.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("ensemble")

if __name__ == "__main__":
    run_script(main)
