"""Fit a posterior around a finished MAP fit: how sure is each task's adapter, and what do they predict together?

    python scripts/posterior_fit.py runs/demo --guide normal --output_dir runs/demo-posterior

Every option: ``python scripts/posterior_fit.py --help``.
"""

from __future__ import annotations

import sys

import transformers

from bora_pyro.cli import CONFIGURATIONS
from bora_pyro.errors import InputError
from bora_pyro.options.command_line import run_script
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig, parse_config
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.progress import print_table


def main(argv: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(PosteriorFitConfig, argv, prog="posterior_fit.py", others=CONFIGURATIONS)
        metrics = run_posterior_fit(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    print_table(metrics)
    if "mixture" in metrics:
        print(
            f"test perplexity: MAP {metrics['map_test_perplexity']:.2f}, posterior mean {metrics['test_perplexity']:.2f}, "
            f"mixture of {config.draws} draws {metrics['mixture_test_perplexity']:.2f}"
        )
        print(f"calibration error (ECE): posterior mean {metrics['mean']['ece']:.3f}, mixture {metrics['mixture']['ece']:.3f}")
    print(f"run folder: {config.output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
