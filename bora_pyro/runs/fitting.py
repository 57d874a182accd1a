"""Run a fit in a run folder, with a progress bar, ``metrics.jsonl``, checkpoints and stop signals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bora_pyro.data import TaskData
from bora_pyro.inference.continuation import Continuation
from bora_pyro.inference.fit import FitStopped, fit
from bora_pyro.inference.fitted import Fitted, entries_of, mean_tau
from bora_pyro.inference.folds import Folds
from bora_pyro.inference.optimum import still_falling
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.processes import Processes, is_first
from bora_pyro.likelihoods import Measure
from bora_pyro.model import BoRA
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.progress import Progress
from bora_pyro.runs.signals import StopSignals
from bora_pyro.runs.trackers import Tracking, track


class RunStopped(Exception):
    """A signal stopped the run, and its state is saved. ``exit_code`` is the exit code that a shell expects."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_tracking(
    names: Sequence[str] | None, folder: RunFolder, written: Mapping[str, Any], *, resume: bool, quiet: bool
) -> Tracking:
    """Start the trackers in the first process; the other processes have none.

    Args:
        names: names of the trackers.
        folder: the run folder.
        written: content of its ``config.yaml``.
        resume: whether the fit continues from a checkpoint.
        quiet: whether the trackers print nothing.
    """
    return track(names if is_first() else None, folder.path, written, resume=resume, quiet=quiet)


def fit_into(
    folder: RunFolder,
    model: BoRA,
    data: TaskData,
    options: FitOptions,
    *,
    checkpoints: Continuation,
    quiet: bool,
    tracking: Tracking | None = None,
    processes: Processes | None = None,
    measure: Measure | None = None,
    rename: Callable[[dict[str, Any]], None] = lambda report: None,
    **more: Any,
) -> Fitted:
    """Fit with a progress bar, checkpoints, and one line of ``metrics.jsonl`` for each epoch.

    Args:
        folder: the run folder; this process must have taken it.
        model: the model.
        data: the documents; notes about the fit are added to their notes.
        options: options of the fit.
        checkpoints: the checkpoints of the run, already checked.
        quiet: show no progress.
        tracking: the trackers; default: none.
        processes: the processes that share the work; default: this one alone.
        measure: the measure of the validation documents that the progress shows; default: the likelihood's.
        rename: changes the report of an epoch before anybody sees it.
        more: further arguments of ``fit``.

    Raises:
        RunStopped: the process got Ctrl-C or SIGTERM; the state of the fit is saved.
    """
    measure, tracking = measure or model.likelihood.measure, tracking or Tracking()
    bar = Progress(0, epochs=options.epochs, measure=measure, enabled=not quiet)

    def add_note(note: str | None) -> None:
        if note is not None:
            data.notes.append(note)
            if not quiet and is_first():
                print(f"note: {note}", file=sys.stderr)

    def show(report: dict[str, Any]) -> None:
        bar.total_steps = int(report["total"])
        bar.update(
            int(report["step"]),
            loss=report["loss"],
            tokens_per_second=report["training_tokens_per_second"],
            epoch=int(report["epoch"]),
            validation=report.get(f"validation_{measure.name}"),
            tau=_newest_tau(model, report),
            kl=report.get("kl"),
            reward=report.get("reward"),
        )

    def step(report: dict[str, Any]) -> None:
        tracking.step(report)
        show(report)

    def record(report: dict[str, Any]) -> None:
        rename(report)
        if is_first():
            folder.cut_log(int(report["epoch"]) - 1)
            folder.log(report)
        tracking.epoch(report)
        show(report)

    add_note(Folds.of(data.validation, options.tau_documents, learns_tau=bool(model.prior.every)).note(data.validation))
    with bar, StopSignals(quiet=quiet or not is_first()) as stop:
        try:
            fitted = fit(
                model,
                data,
                options,
                checkpoints=checkpoints,
                processes=processes,
                stop=stop,
                on_step=step,
                on_epoch=record,
                **more,
            )
        except FitStopped as stopped:
            raise RunStopped(f"{stopped}; go on with --resume true", stop.exit_code) from None
        if stop() and (processes is None or processes.size == 1):  # with several processes, the others did not get the signal
            raise RunStopped("stopped after the last step; --resume true evaluates the fit", stop.exit_code)
    add_note(still_falling(fitted, options.epochs))
    return fitted


def _newest_tau(model: BoRA, report: Mapping[str, Any]) -> float | None:
    """The newest learned τ as one number, as in ``Fitted.tau``; None if τ is not learned."""
    if not (path := report.get("tau_path")):
        return None
    taus = {name: torch.tensor(value) for name, value in path[-1]["tau"].items()}
    return mean_tau(taus, entries_of(model))
