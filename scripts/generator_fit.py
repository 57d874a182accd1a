"""Fit a generator of adapters to a finished run: it predicts the adapter of a task from a vector of its documents.

    python scripts/generator_fit.py runs/demo-posterior --method cvae --output_dir runs/generator

What it reads and writes: :mod:`bora_pyro.runs.generator_fit`. Every option: ``python scripts/generator_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("generator-fit")

if __name__ == "__main__":
    run_script(main)
