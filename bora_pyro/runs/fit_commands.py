"""The commands that fit (``bora map-fit``, the demos, ``posterior-fit`` and ``adapt``), and what they print at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from bora_pyro.likelihoods import measure_of
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.demo import FASTEST, DemoConfig, DemoSmolLM2Config
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.device import find_device
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.precision import faster_precision
from bora_pyro.runs.progress import print_table


def show_map_fit(config: MapFitConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, the learned τ if there is one, and the run folder."""
    print_table(metrics)
    if "tau_by_group" in metrics:
        print(f"learned τ: {float(format(metrics['tau'], '.3g')):g} (harmonic mean; by group in metrics.json)")
    if metrics.get("tau_group") is not None:
        print(f"τ of the groups' means around Θ: {float(format(metrics['tau_group'], '.3g')):g} (harmonic mean)")
    print(f"run folder: {config.output_dir}")


def run_demo_smollm2(config: DemoSmolLM2Config) -> dict[str, Any]:
    """Run the MAP fit of the demo, in the precision that is the faster one here."""
    if config.precision == FASTEST:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        precision, ratio = faster_precision(find_device(config.device))
        print(f"precision: {precision} (products in bfloat16 are {ratio:.1f} times as fast as in float32)", file=sys.stderr)
        config.precision = precision
    return run_map_fit(config)


def show_demo_smollm2(config: DemoSmolLM2Config, metrics: Mapping[str, Any]) -> None:
    """Print what a MAP fit prints, and what it took."""
    show_map_fit(config, metrics)
    print(
        f"{metrics['epochs']} epochs in {metrics['fit_seconds']:,.0f} s, {metrics['training_tokens_per_second']:,.0f} training "
        f"tokens a second, {config.precision}, {torch.get_num_threads()} CPU threads"
    )


def show_posterior_fit(config: PosteriorFitConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, the scores of the posterior mean and mixture, and the run folder."""
    print_table(metrics)
    if "mixture" in metrics:
        measure, kind = measure_of(metrics), "linearised draws" if metrics.get("predict") == "linearised" else "draws"
        of_map, of_mean, of_mixture = (
            f"{metrics[f'{of}test_{measure.name}']:.{measure.digits}f}" for of in ("map_", "", "mixture_")
        )
        print(f"test {measure.title}: MAP {of_map}, posterior mean {of_mean}, mixture of {config.draws} {kind} {of_mixture}")
        print(f"calibration error (ECE): posterior mean {metrics['mean']['ece']:.3f}, mixture {metrics['mixture']['ece']:.3f}")
    if metrics.get("evidence", {}).get("best_tau") is not None:
        found = metrics["evidence"]
        print(
            f"log evidence: {found['nats']:,.1f} nats at τ = {metrics['tau']:.3g}; {found['gain']:,.1f} more at the best τ, "
            f"{found['best_tau']:.3g} (by group in metrics.json)"
        )
    print(f"run folder: {config.output_dir}")


def show_adapt(config: AdaptConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the new tasks and the run folder."""
    print_table(metrics)
    print(f"run folder: {config.output_dir}")


MAP_FIT = Command("map-fit", MapFitConfig, run_map_fit, show_map_fit)
DEMO = Command("demo", DemoConfig, run_map_fit, show_map_fit)
DEMO_SMOLLM2 = Command("demo-smollm2", DemoSmolLM2Config, run_demo_smollm2, show_demo_smollm2)
POSTERIOR_FIT = Command("posterior-fit", PosteriorFitConfig, run_posterior_fit, show_posterior_fit)
ADAPT = Command("adapt", AdaptConfig, run_adapt, show_adapt)
