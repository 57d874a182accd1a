"""Pool independently trained LoRA adapters: estimate the Θ and τ that they imply, and shrink each towards Θ without retraining.

    python scripts/pool_adapters.py adapters --base_model facebook/opt-350m --held_out later.csv --output_dir pooled

What it reads and writes: :mod:`bora_pyro.runs.pool`. Every option: ``python scripts/pool_adapters.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("pool-adapters")

if __name__ == "__main__":
    run_script(main)
