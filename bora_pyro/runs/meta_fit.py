"""A meta-fit (ABMLL), from a configuration to a run folder.

    bora meta-fit --data reviews.csv --inner_steps 5 --beta 0.001 --output_dir runs/meta
    bora adapt runs/meta --data new.csv --output_dir runs/new

:func:`~bora_pyro.inference.meta_fit.meta_fit` does the work. The folder is that of any posterior: the adapters in it are the
means μ_d that the inner steps reach, ``global-mean`` is μ₀, and every command that reads posteriors reads it. An adaptation takes
the same inner steps. There are no checkpoints: a meta-fit that is interrupted is started again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.meta_fit import MetaLoop
from bora_pyro.inference.meta_options import MetaOptions
from bora_pyro.likelihoods import measure_of
from bora_pyro.options.field import part_of
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.build import begin, build_run, check_can_export
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.groups import LEARNED
from bora_pyro.runs.config.meta_fit import MetaFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import TASK_NORMAL
from bora_pyro.runs.progress import Progress, layers_line, print_table
from bora_pyro.runs.results import add_mixture, metrics_of
from bora_pyro.runs.run import Run
from bora_pyro.runs.start import write_start

#: The guide of a meta-fit in a run folder.
GUIDE = TASK_NORMAL


def run_meta_fit(config: MetaFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load, fit, evaluate, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: the numbers at the means, ``meta`` with those of the inner steps, and ``mixture``, with
        the calibration of the posteriors.

    Raises:
        InputError: something in the configuration or the data cannot be used, or β is too small to count, in which case nothing
            is written; or the objective is not finite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a meta-fit runs in one process; start it without torchrun")
    folder = RunFolder(config.output_dir)
    folder.check_free(overwrite=config.overwrite, resume=None)
    model, data = build_run(config.map_fit, quiet=quiet)
    if config.export_adapters:
        check_can_export(model.backbone)
    start = begin(config.map_fit, model, data, quiet=quiet)
    loop = MetaLoop(model, data, part_of(config, MetaOptions))
    if not quiet:
        print(layers_line(model.backbone.slots), file=sys.stderr)
        latents = sum(value.numel() for value in model.starts.values())
        print(f"{latents:,} latents, each with a mean and a scale for a task and in common", file=sys.stderr)
    loop.check_beta()
    if not config.beta:
        _note(data, "beta is 0: each task maximises its plain likelihood, and nothing holds its scales up", quiet=quiet)
    folder.take(overwrite=config.overwrite, resume=None)
    with folder:
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
        folder.write_split(data.split_record)
        if start is not None:
            write_start(folder, start)
        fitted = _fit(loop, folder, quiet=quiet)
        saving = Run(folder, config.base_model, guide=GUIDE, quiet=quiet, adapters=config.export_adapters)
        return saving.save(fitted, data, lambda: _metrics(config, fitted, data))


def _fit(loop: MetaLoop, folder: RunFolder, *, quiet: bool) -> Fitted:
    measure = loop.model.likelihood.measure
    with Progress(loop.total_steps, epochs=loop.options.epochs, measure=measure, enabled=not quiet) as bar:

        def show(report: Mapping[str, Any]) -> None:
            bar.update(
                int(report["step"]),
                loss=report["loss"],
                kl=report["kl"],
                tokens_per_second=report["training_tokens_per_second"],
                epoch=int(report["epoch"]),
                validation=report.get(f"validation_{measure.name}"),
            )

        def record(report: dict[str, Any]) -> None:
            folder.log(report)
            show(report)

        return loop.run(on_step=show, on_epoch=record)


def _note(data: TaskData, note: str, *, quiet: bool) -> None:
    data.notes.append(note)
    if not quiet:
        print(f"note: {note}", file=sys.stderr)


def _metrics(config: MetaFitConfig, fitted: Fitted, data: TaskData) -> dict[str, Any]:
    metrics = metrics_of(fitted, data, tau=LEARNED, learning_rate=config.learning_rate, seed=config.seed)
    best = fitted.history[fitted.best_epoch - 1] if fitted.best_epoch else {}
    found = {name: best.get(name) for name in ("loss_before", "loss", "kl", "scale")}
    options = {name: getattr(config, name) for name in ("inner_steps", "inner_rate", "beta")}
    metrics |= {"guide": GUIDE, "draws": config.draws, "predict": "draws", "meta": options | found}
    if data.test.num_tokens:
        posterior = Posterior(fitted, seed=config.seed)
        add_mixture(metrics, fitted, data, fitted.model, lambda: posterior.draws(config.draws))
    return metrics


def show(config: MetaFitConfig, metrics: Mapping[str, Any]) -> None:
    """Print the table of the tasks, what the inner steps do, the scores of means and mixture, and the run folder."""
    print_table(metrics)
    meta, measure = metrics["meta"], measure_of(metrics)
    if meta["loss"] is not None:
        steps = f"{config.inner_steps} inner step{'s' * (config.inner_steps > 1)}"
        print(
            f"{steps}: training loss {meta['loss_before']:.3f} -> {meta['loss']:.3f} nats per observation, KL divergence "
            f"{meta['kl']:.3g} nats a task (epoch {metrics['best_epoch']}, means of the epoch)"
        )
    else:
        print("no epoch had a better validation score than the start, which is kept")
    if "mixture" in metrics:
        of_mean, of_mixture = (f"{metrics[f'{of}test_{measure.name}']:.{measure.digits}f}" for of in ("", "mixture_"))
        print(f"test {measure.title}: means {of_mean}, mixture of {config.draws} draws {of_mixture}")
        print(f"calibration error (ECE): means {metrics['mean']['ece']:.3f}, mixture {metrics['mixture']['ece']:.3f}")
    print(f"run folder: {config.output_dir}")


COMMAND = Command("meta-fit", MetaFitConfig, run_meta_fit, show)
