"""Simulate clients that keep the documents of their tasks and share a prior.

    python scripts/federated.py --clients task --rounds 10 --output_dir runs/federated

What it reads and writes: :mod:`bora_pyro.runs.federated`. Every option: ``python scripts/federated.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("federated")

if __name__ == "__main__":
    run_script(main)
