"""A quick posterior around a MAP fit."""

from __future__ import annotations

from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.posterior_fit import run_posterior_fit


def posterior_fit(map_run, folder, **options):
    config = PosteriorFitConfig(run=str(map_run), output_dir=str(folder), epochs=1, draws=2, threads=1, **options)
    return run_posterior_fit(config, quiet=True)
