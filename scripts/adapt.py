"""Adapt a finished fit to new tasks with few documents each, in seconds: deviations from Θ under the learned prior.

    python scripts/adapt.py runs/demo --data new.csv --output_dir runs/new

Every option: ``python scripts/adapt.py --help``.
"""

from __future__ import annotations

import sys

import transformers

from bora_pyro.cli import CONFIGURATIONS
from bora_pyro.errors import InputError
from bora_pyro.options.command_line import run_script
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig, parse_config
from bora_pyro.runs.progress import print_table


def main(argv: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(AdaptConfig, argv, prog="adapt.py", others=CONFIGURATIONS)
        metrics = run_adapt(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(metrics)
    print(f"run folder: {config.output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
