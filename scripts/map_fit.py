"""Fit BoRA by MAP: one frozen language model, an adapter for each task, all under one hierarchical Normal.

    python scripts/map_fit.py --data speeches.csv --base_model facebook/opt-350m --output_dir runs/speeches

    torchrun --nproc_per_node 2 scripts/map_fit.py --data speeches.csv  # several processes, each with tasks of its own

Every option: ``python scripts/map_fit.py --help``.
"""

from bora_pyro.cli import script_main
from bora_pyro.options.command_line import run_script

main = script_main("map-fit")

if __name__ == "__main__":
    run_script(main)
