"""Make the adapters of new tasks from their documents by a generator, without training.

    python scripts/generate_adapter.py runs/generator --data new.csv --held_out 0.5 --output_dir runs/generated

What it reads and writes: :mod:`bora_pyro.runs.generate_adapter`. Every option: ``python scripts/generate_adapter.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("generate-adapter")

if __name__ == "__main__":
    run_script(main)
