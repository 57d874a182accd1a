"""Fit gates over the adapters of a finished run (MeteoRA), from run folder to run folder.

    bora route-fit runs/demo --k 2 --output_dir runs/routed
    bora generate runs/routed --prompt "Returns the"

    bora route-fit --adapters peft --fit_config documents.yaml --output_dir runs/routed    # adapters from elsewhere
    bora route-fit runs/routed --add runs/new --data new.csv --output_dir runs/more        # adapters for finished gates

The new folder holds the adapters and the gates, so it needs neither the folder of the run nor its adapters. There are no PEFT
folders in it: a routed model cannot be exported. There are no checkpoints: a fit that is interrupted is started again.

With ``--add`` the gates and adapters of the run stay as they are, bit for bit, and each new task gets a gate of its own, which
learns from the training documents of all tasks. ``added/`` in the new folder says where the documents of the new tasks are.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bora_pyro.errors import InputError
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.files.text import name_line
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.route_fit import add_adapters, check_routable, frozen, gates_of, route_fit
from bora_pyro.model import Weights
from bora_pyro.predict.gates import read_gates
from bora_pyro.runs.added_adapters import read_added
from bora_pyro.runs.added_tasks import write_additions
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.progress import Progress, print_data, print_table
from bora_pyro.runs.results import ROUTED, add_mixture, metrics_of
from bora_pyro.runs.routed_adapters import RoutedAdapters, read_folders
from bora_pyro.runs.run import Run
from bora_pyro.runs.saved import SavedRun, load_run


def run_route_fit(config: RouteFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the run, fit the gates, measure them on the test documents, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``. Besides the perplexities of the routed model it has ``gate``, the accuracy of the gates
        on the tokens of the test documents, and ``task_test_perplexity``, that of the run, whose texts have the adapter of their
        own task.

    Raises:
        InputError: the run cannot be used, in which case nothing is written; or a result cannot be written.
    """
    if config.run and Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the gates")
    folder = RunFolder(config.output_dir)
    folder.check_free(overwrite=config.overwrite, resume=None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source, draws, config = _source(config)
    data = source.data
    config.build_router().check_tasks(data.num_tasks)
    config = dataclasses.replace(config, token_budget=config.token_budget or source.config.token_budget)
    if not quiet:
        print_data(data)
    folder.take(overwrite=config.overwrite, resume=None)
    with folder:
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
        folder.write_fit(dataclasses.asdict(source.config))
        folder.write_split(source.split)
        write_additions(folder, source.additions)
        fitted = _fit(config, source, folder, draws, quiet=quiet)
        if fitted.history and not fitted.best_epoch:
            which = "gates of 0 for the new tasks" if source.new else "gates of 0"
            note = (
                f"no epoch had a lower validation perplexity than {which}, so these are kept and say nothing of the task; give "
                "more --epochs or another --learning_rate"
            )
            data.notes.append(note)
            if not quiet:
                print(f"note: {note}", file=sys.stderr)
        saving = Run(folder, source.config.base_model, prior=ROUTED, quiet=quiet, adapters=False)
        return saving.save(fitted, data, lambda: _metrics(config, source, fitted))


def _source(config: RouteFitConfig) -> tuple[RoutedAdapters, list[Weights], RouteFitConfig]:
    """The adapters of a run with draws of their posterior, or adapters from PEFT folders; and the whole configuration."""
    if config.add is not None:
        source, config = read_added(config)
        return source, [], config
    config = config.with_gates()
    if config.adapters is not None:
        source = read_folders(config)
        check_routable(source.fitted.model)
        return source, [], config
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    check_run(run)
    # a point estimate has no posterior, and the error says what to do
    draws = [*run.posterior(seed=config.seed).draws(config.draws)] if config.draws else []
    return RoutedAdapters.of_run(run), draws, config


def check_run(run: SavedRun) -> None:
    """Check that a run has adapters for gates, and that its folder can be read without another one.

    Raises:
        InputError: it has not.
    """
    folder = run.folder.path
    if isinstance(run.config, EnsembleConfig):
        raise InputError(f"the run in {folder} is an ensemble, each member with its own adapters; give the folder of a member")
    kinds = {
        "tasks that were adapted from another fit": run.adapted,
        "a meta-fit": run.meta_config is not None,
        "a federated fit": run.federated_config is not None,
        "a fit from rewards": run.reward_config is not None,
    }
    for kind in (kind for kind, it_is in kinds.items() if it_is):
        raise InputError(f"the run in {folder} is of {kind}; gates are for the tasks of a MAP fit or of a posterior around one")
    check_routable(run.fitted.model)


def _fit(config: RouteFitConfig, source: RoutedAdapters, folder: RunFolder, draws: list[Weights], *, quiet: bool) -> Fitted:
    names = ("epochs", "learning_rate", "token_budget", "patience", "seed")
    options = FitOptions(**{name: getattr(config, name) for name in names})
    measure = source.fitted.model.likelihood.measure
    with Progress(0, epochs=config.epochs, measure=measure, enabled=not quiet) as bar:

        def show(report: Mapping[str, Any]) -> None:
            bar.total_steps = int(report["total"])
            bar.update(
                int(report["step"]),
                loss=report["loss"],
                tokens_per_second=report["training_tokens_per_second"],
                epoch=int(report["epoch"]),
                validation=report.get(f"validation_{measure.name}"),
            )

        def record(report: dict[str, Any]) -> None:
            folder.log(report)
            show(report)

        if source.new:
            return add_adapters(source.fitted, source.new, source.data, options, on_step=show, on_epoch=record)
        weights: dict[str, Any] = {name: getattr(config, name) for name in ("gate_weight", "token_weight", "gate_scale")}
        return route_fit(
            source.fitted, source.data, config.build_router(), options, draws=draws, on_step=show, on_epoch=record, **weights
        )


def _metrics(config: RouteFitConfig, source: RoutedAdapters, fitted: Fitted) -> dict[str, Any]:
    data, measure = source.data, fitted.model.likelihood.measure.name
    metrics = metrics_of(fitted, data, tau=source.config.tau, learning_rate=config.learning_rate, seed=config.seed)
    for slug in adapter_folders(fitted.tasks).values():  # the distance of the adapter alone, not of its gates
        metrics["tasks"][slug]["deviation_norm"] = source.norms.get(slug)
    if source.run is None:  # the adapters have no prior
        metrics["tau"] = None
    elif source.new:  # those that are added are of another prior, or of none
        metrics["tau"] = source.run.metrics.get("tau")
        metrics["added"] = [*source.new]
    metrics |= {"guide": "map", "router": repr(fitted.model.router), "draws": config.draws}
    metrics[f"task_test_{measure}"] = source.test
    weights = fitted.weights()[0]
    for name, split in (("gate", data.test), ("validation_gate", data.validation)):
        if len(split):
            metrics[name] = read_gates(fitted.model, weights, split, token_budget=config.token_budget or 4096).numbers()
    prior = frozen(fitted.model)
    if prior.num_draws and data.test.num_tokens:
        gates = gates_of(weights)
        add_mixture(
            metrics, fitted, data, fitted.model, lambda: (prior.draw(number) | gates for number in range(prior.num_draws))
        )
    return metrics


def show(config: RouteFitConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, the accuracy of the gates, and the run folder."""
    print_table(metrics)
    if added := metrics.get("added"):
        old = len(metrics["tasks"]) - len(added)
        print(f"gates were fitted for {', '.join(map(name_line, added))}; those of the other {old} tasks are as they were")
    if (gate := metrics.get("gate")) is not None:
        right, worst, best = gate["accuracy"], gate["worst_layer"], gate["best_layer"]
        print(
            f"gates: right at {right:.1%} of the test tokens and layers ({worst:.1%} in the worst layer, {best:.1%} in "
            f"the best one), and at {gate['joint']:.1%} by the mean over the layers"
        )
        routed, own = metrics["test_perplexity"], metrics["task_test_perplexity"]
        print(f"test perplexity: {routed:.2f} with gates, {own:.2f} with the adapter of the right task")
    if (mixture := metrics.get("mixture_test_perplexity")) is not None:
        print(f"test perplexity of the mixture of {config.draws} draws with the same gates: {mixture:.2f}")
    print(f"run folder: {config.output_dir}")


COMMAND = Command("route-fit", RouteFitConfig, run_route_fit, show)
