"""A warm sweep: one fit for each seed that lowers τ from the largest value to the smallest and measures perplexity at each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bora_pyro.diagnostics.plots import style, tau_curve
from bora_pyro.diagnostics.plots.warm_path import warm_curve
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.warm_path import WarmPoint, warm_path
from bora_pyro.options.field import part_of
from bora_pyro.priors import Prior, prior_from_tau, with_shared
from bora_pyro.runs.build import begin, build_run
from bora_pyro.runs.config.groups import CENTRE
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.tau_sweep import Run, SweepConfig
from bora_pyro.runs.sweep_files import check_validation, save_figure, stored_table


def run_warm(config: SweepConfig) -> pd.DataFrame:
    """Fit one path from the largest τ to the smallest for each seed; write the table and figure ``<output>_warm``."""
    rate, rows = config.learning_rates[(len(config.learning_rates) - 1) // 2], list[dict[str, Any]]()
    stem, cold = config.stem.with_name(f"{config.stem.name}_warm"), stored_table(config)
    for seed in range(config.seeds):
        run = config.fit(Run(config.numbers[-1], rate, seed))
        if run.scale_learning_rate_with_tau:
            raise InputError("scale_learning_rate_with_tau needs a fit with one tau; leave it out for --path warm")
        if run.start_as == CENTRE:
            raise InputError("start_as centre has one tau; leave it out for --path warm")
        model, data = build_run(run, quiet=seed > 0)
        check_validation(data)
        begin(run, model, data, quiet=seed > 0)

        def record(point: WarmPoint, seed: int = seed) -> None:
            rows.append(
                {
                    "tau": number_text(point.tau),
                    "seed": seed,
                    "validation_perplexity": point.validation_perplexity,
                    "test_perplexity": point.test_perplexity,
                    "fit_seconds": point.seconds,
                    "seconds_so_far": point.seconds_so_far,
                }
            )
            table = pd.DataFrame(rows).astype({"test_perplexity": float})  # NaN if there are no test documents
            stem.parent.mkdir(parents=True, exist_ok=True)
            replace_file(stem.with_name(f"{stem.name}.csv"), lambda file: table.to_csv(file, index=False))
            _draw_warm(table, cold, stem)
            scores = f"validation perplexity {point.validation_perplexity:.2f}, test {point.test_perplexity or float('nan'):.2f}"
            print(f"tau {point.tau:>7g}  seed {seed}: {scores}  ({point.seconds_so_far:.0f} s so far)", flush=True)

        warm_path(
            model,
            data,
            [float(tau) for tau in config.numbers],
            epochs=config.warm_epochs,
            first_epochs=run.epochs,
            make_prior=partial(_prior, run, model.adapter.shared),
            on_point=record,
            **{name: value for name, value in vars(part_of(run, FitOptions)).items() if name != "epochs"},
        )
    return pd.DataFrame(rows).astype({"test_perplexity": float})


def _prior(run: MapFitConfig, shared: tuple[str, ...], tau: float) -> Prior:
    return with_shared(prior_from_tau(tau, run.prior_form, penalty=run.penalty), shared)


def _draw_warm(table: pd.DataFrame, cold: pd.DataFrame | None, stem: Path) -> None:
    """Draw the warm path, beside the curve of the cold sweep if there is one."""
    with style():
        figure = Figure(figsize=(5.5 if cold is None else 9.0, 4.0))
        axes = figure.subplots(1, 1 if cold is None else 2, squeeze=False)[0]
        if cold is not None:
            tau_curve(cold, axes[0]).set_title("a fit for each τ")
        warm_curve(table, axes[-1]).set_title("one fit that relaxes τ, from right to left")
        limits = [ax.get_ylim() for ax in axes]
        for ax in axes:  # one scale for both; sharey would keep the limits of the first axis
            ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        save_figure(figure, stem)
