"""Fit SmolLM2-135M-Instruct, a real language model, to a part of the embedded data: some minutes on two cores.

    python scripts/demo_smollm2.py --output_dir runs/demo-smollm2

The weights come with ``make smollm2``. Every option: ``python scripts/demo_smollm2.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("demo-smollm2")

if __name__ == "__main__":
    run_script(main)
