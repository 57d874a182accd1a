"""Diagnose the shrinkage of a finished fit, and compare it with other fits on the same held-out documents.

    bora diagnose runs/speeches --compare runs/speeches-independent runs/speeches-pooled

It writes into the folder ``diagnostics`` of the run, or into ``--output``: ``shrinkage.nc`` (the ArviZ container),
``shrinkage.csv`` (one row for each task), and several pictures. With ``--compare`` it also writes ``compare.csv`` and
``compare.png``. Nothing is fitted again.

For a posterior (a run of ``bora posterior-fit``) the container has ``--draws`` draws. The table then has quantiles of the
distances over the draws, and the pictures of distances show intervals. The dendrogram and the principal components use the centre
of the posterior.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.deviations import task_gram, usual_space
from bora_pyro.diagnostics.shrinkage import compare_priors, held_out, shrinkage
from bora_pyro.errors import InputError
from bora_pyro.files.text import name_line
from bora_pyro.options.field import option
from bora_pyro.runs.command import Command
from bora_pyro.runs.layout import DIAGNOSTICS, FIT
from bora_pyro.runs.saved import SavedRun, load_run

DRAWS = 50  # draws of a posterior, unless --draws is given
QUANTILES = (0.05, 0.95)  # quantiles over the draws


@dataclass(kw_only=True)
class DiagnoseConfig:
    """Diagnose the shrinkage of a finished fit, and compare it with other fits on the same held-out documents."""

    run: str = option("", "folder of the run, a fit's output_dir", positional=True)
    compare: list[str] | None = option(None, "folders of other runs to compare with, fitted and tested on the same documents")
    draws: int | None = option(None, f"draws of each posterior (default: {DRAWS}; a MAP fit is a point and has none)")
    output: str | None = option(None, "folder for the results (default: the folder diagnostics of the run)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError("no run is given; name its folder, as in diagnose.py runs/map_fit")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; give a whole number from 1 up")
        if self.draws is not None and self.draws < 2:
            raise InputError(f"draws is {self.draws}; give a whole number from 2 up")
        paths = [Path(path).resolve() for path in (self.run, *(self.compare or ()))]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise InputError(f"run {twice[0]} is given twice; give each run once")


def diagnose(config: DiagnoseConfig) -> Path:
    """Write all tables and pictures; return their folder.

    Raises:
        InputError: a run cannot be read, the runs have different documents, or the folder cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    _check_draws(run, config)
    # first, so that runs that cannot be compared are refused before the long computation and before anything is written
    compared = _compared(run, config) if config.compare else {}
    folder = _writable(Path(config.output) if config.output is not None else run.folder.path / DIAGNOSTICS)
    container = shrinkage(run.fitted, run.data, draws=_draws(run, config))
    container.to_netcdf(folder / "shrinkage.nc")
    rows = shrinkage_table(run, container)
    rows.to_csv(folder / "shrinkage.csv", index=False, float_format="%.6g")
    space = usual_space(run.fitted)
    gram = task_gram(run.fitted, space=space).numpy()
    if gram.any():
        with plots.style():
            for name, figure in _pictures(run.data.tasks, container, gram, space):
                figure.savefig(folder / f"{name}.png")
    else:
        print("note: all tasks have the same adapter, so there are no deviations to draw", file=sys.stderr)
    print(rows.assign(task=rows["task"].map(name_line)).to_string(index=False, float_format="{:.2f}".format, na_rep="–"))
    if compared:
        table = compare_priors(compared | {next(iter(compared)): container})
        table.to_csv(folder / "compare.csv", index_label="run", float_format="%.8g")
        with plots.style():
            _picture(plots.compare_forest, table, height=1.5 + 0.4 * len(table)).savefig(folder / "compare.png")
        print("\nheld-out documents, best first:")
        print(table.drop(columns=["rank", "scale"]).rename(index=name_line).to_string(float_format="{:.2f}".format))
    return folder


def shrinkage_table(run: SavedRun, container: Any) -> pd.DataFrame:
    """One row for each task: documents, distance from Θ, effective parameters, test measure without and with the adapter.

    All values are those of the posterior's centre, except the quantiles over draws (``displacement_q05`` and the like). The
    displacement is the distance from Θ in the direction of the centre.
    """
    posterior, constant = container["posterior"], container["constant_data"]
    measure = run.fitted.model.likelihood.measure.name  # perplexity, or the NLL a question
    many = posterior.sizes["draw"] > 1
    quantiles = {
        f"{name}_q{round(100 * q):02}": posterior[name].quantile(q, ("chain", "draw")).values
        for name in ("displacement", "distance")
        for q in QUANTILES
        if many
    }
    effective = constant["effective_parameters"] if many else posterior["effective_parameters"]
    return pd.DataFrame(
        {
            "task": run.data.tasks,
            "train_documents": constant["train_documents"].values,
            "test_documents": constant["test_documents"].values,
            "distance": run.fitted.deviation_norms().cpu().double().numpy(),
            **quantiles,
            "effective_parameters": effective.values.reshape(-1),
            **{
                name: np.array(
                    [row[name] for row in run.scores], dtype=float
                )  # a task without test documents has None, which becomes NaN
                for name in (f"base_test_{measure}", f"test_{measure}")
            },
        }
    )


def _pictures(tasks: list[str], container: Any, gram: np.ndarray, space: str) -> Iterator[tuple[str, Figure]]:
    """The pictures of one run, each with its name; gram: (D, D), of the deviations in a space, ΔW_d − ΔW_Θ or θ_d − Θ."""
    by_task = 1.5 + 0.22 * len(tasks)  # inches
    yield "forest", _picture(plots.shrinkage_forest, container, height=by_task)
    yield "ridge", _picture(plots.shrinkage_ridge, container, height=by_task)
    yield "documents", _picture(plots.deviation_by_documents, container)
    yield "heatmap", _picture(plots.deviation_heatmap, container, width=3 + by_task)
    if len(tasks) < 2:  # with one task there is no sharing and no distance between tasks
        return
    yield "pooling", _picture(plots.pooling_factors, container)
    yield "pca", _picture(plots.task_pca, gram, tasks, height=5.5)
    dendrogram = _picture(plots.task_dendrogram, gram, tasks, height=by_task)
    distance = "‖Δ$W_d$ − Δ$W_e$‖" if space == "delta_w" else "‖$θ_d$ − $θ_e$‖"
    dendrogram.axes[0].set_xlabel(f"distance between tasks, {distance} (average linkage)")
    yield "dendrogram", dendrogram


def _picture(draw: Callable[..., Any], *arguments: Any, width: float = 7.0, height: float = 4.5) -> Figure:
    """Make a figure of one axis with a function of :mod:`bora_pyro.diagnostics.plots`; width and height are in inches."""
    figure = Figure(figsize=(width, height))
    draw(*arguments, figure.subplots())
    return figure


def _check_draws(run: SavedRun, config: DiagnoseConfig) -> None:
    """Refuse ``--draws`` if every run is a point estimate."""
    posterior = not run.is_point or any((Path(path) / FIT).is_file() for path in config.compare or ())
    if config.draws is not None and not posterior:
        how = f"fit a posterior around it: scripts/posterior_fit.py {run.folder.path}"
        raise InputError(
            f"draws is {config.draws}, but the run in {run.folder.path} is a MAP fit, a point, and has none; leave --draws out, "
            f"or {'adapt with --guide normal' if run.adapted else how}"
        )


def _draws(run: SavedRun, config: DiagnoseConfig) -> int | None:
    return None if run.is_point else config.draws or DRAWS


def _compared(run: SavedRun, config: DiagnoseConfig) -> dict[str, Any]:
    """The containers to compare, by name: that of the run at its centre, and those of the other runs.

    Only one of the other runs is in memory at a time. A container has the name of the run's folder. If two folders have the same
    name, the paths are used as they were given.
    """
    paths = [config.run, *(config.compare or ())]
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = paths
    containers = {names[0]: held_out(run.fitted, run.data)}
    for name, path in zip(names[1:], paths[1:], strict=True):
        other = load_run(path, device=config.device, trust_remote_code=config.trust_remote_code)
        centre, draws = held_out(other.fitted, other.data), _draws(other, config)
        compare_priors({names[0]: containers[names[0]], name: centre})
        containers[name] = centre if draws is None else held_out(other.fitted, other.data, draws=draws)
    return containers


def _writable(folder: Path) -> Path:
    """Make the folder if it is missing, and check that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # fails now, before the long computation
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"output {folder} cannot be written ({getattr(error, 'strerror', None) or error}); give another --output"
        ) from None
    return folder


COMMAND = Command("diagnose", DiagnoseConfig, diagnose, lambda config, folder: print(f"diagnostics: {folder}"))
