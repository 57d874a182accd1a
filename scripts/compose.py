"""Compose MAP fits of the same tasks that adapt different layers into one adapter a task, without training.

    python scripts/compose.py runs/early runs/late --output_dir runs/both

What it reads and writes: :mod:`bora_pyro.runs.compose`. Every option: ``python scripts/compose.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("compose")

if __name__ == "__main__":
    run_script(main)
