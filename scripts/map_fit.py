"""Fit BoRA by MAP: one frozen language model, an adapter for each task, all under one hierarchical Normal.

    python scripts/map_fit.py --data speeches.csv --base_model facebook/opt-350m --output_dir runs/speeches

    torchrun --nproc_per_node 2 scripts/map_fit.py --data speeches.csv  # several processes, each with tasks of its own

Every option: ``python scripts/map_fit.py --help``.
"""

from __future__ import annotations

import sys

import transformers

from bora_pyro.cli import CONFIGURATIONS
from bora_pyro.errors import InputError
from bora_pyro.inference.processes import is_first
from bora_pyro.options.command_line import run_script
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.progress import print_table


def main(argv: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(MapFitConfig, argv, prog="map_fit.py", others=CONFIGURATIONS)
        metrics = run_map_fit(config)
    except InputError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    if not is_first():
        return 0
    print_table(metrics)
    if "tau_by_group" in metrics:
        print(f"learned τ: {float(format(metrics['tau'], '.3g')):g} (geometric mean; by group in metrics.json)")
    print(f"run folder: {config.output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
