"""Fold several MAP fits of the same tasks into one adapter a task: the mean of their changes, exact or cut to a rank.

    python scripts/fold.py runs/seed-0 runs/seed-1 --output_dir runs/folded

What it reads and writes: :mod:`bora_pyro.runs.fold`. Every option: ``python scripts/fold.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("fold")

if __name__ == "__main__":
    run_script(main)
