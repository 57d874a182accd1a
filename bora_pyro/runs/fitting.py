"""A fit that writes into a run folder: progress, metrics.jsonl, checkpoints, and how it is stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.inference.fit import FitStopped, fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.processes import is_first
from bora_pyro.model import BoRA
from bora_pyro.runs.config.map_fit import AUTO
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.progress import Progress
from bora_pyro.runs.signals import StopSignals
from bora_pyro.runs.trackers import Tracking, track

#: Options of a configuration that ``fit`` takes by the same name.
FIT_OPTIONS = (
    "epochs", "warmup", "token_budget", "accumulate", "gradient_clip", "patience", "seed", "checkpoint_every",
    "checkpoint_minutes", "keep_checkpoints", "task_subsampling", "task_memory",
)  # fmt: skip


class RunStopped(Exception):
    """A run was stopped by a signal, its state saved; ``exit_code`` is what a shell expects of such a program."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def resumes(output_dir: str, resume: bool | str) -> bool:
    """Whether a fit goes on with the run in its folder: as it is told, and with ``auto`` where there is one."""
    return RunFolder.holds_run(output_dir) if resume == AUTO else bool(resume)


def start_tracking(config: Any, folder: RunFolder, *, quiet: bool) -> Tracking:
    """The trackers that a configuration names, in the first process; none in the others."""
    names = config.trackers if is_first() else None
    return track(names, folder.path, folder.read_config() if names else {}, resume=config.resume, quiet=quiet)


def fit_into(
    folder: RunFolder, model: BoRA, data: TaskData, *, quiet: bool, tracking: Tracking | None = None, **options: Any
) -> Fitted:
    """Fit with a progress bar, a line of ``metrics.jsonl`` an epoch, and checkpoints; ``options`` are those of ``fit``."""
    bar, tracking = Progress(0, epochs=options.get("epochs"), enabled=not quiet), tracking or Tracking()

    def show(report: dict[str, Any]) -> None:
        bar.total_steps = int(report["total"])
        bar.update(
            int(report["step"]),
            loss=report["loss"],
            tokens_per_second=report["training_tokens_per_second"],
            epoch=int(report["epoch"]),
            validation_perplexity=report.get("validation_perplexity"),
            tau=_newest_tau(model, report),
        )

    def step(report: dict[str, Any]) -> None:
        tracking.step(report)
        show(report)

    def record(report: dict[str, Any]) -> None:
        if is_first():
            folder.cut_log(int(report["epoch"]) - 1)
            folder.log(report)
        tracking.epoch(report)
        show(report)

    with bar, StopSignals(quiet=quiet or not is_first()) as stop:
        try:
            fitted = fit(model, data, checkpoints=folder.checkpoints, stop=stop, on_step=step, on_epoch=record, **options)
        except FitStopped as stopped:
            raise RunStopped(f"{stopped}; go on with --resume true", stop.exit_code) from None
        team = options.get("processes")
        if stop() and (team is None or team.size == 1):  # of several, each would have to know of it
            raise RunStopped("stopped after the last step; --resume true evaluates what was fitted", stop.exit_code)
        return fitted


def _newest_tau(model: BoRA, report: Mapping[str, Any]) -> float | None:
    """The learned τ that was newest at a step, its geometric mean as ``Fitted.tau`` has it; None where none is learned."""
    if not (path := report.get("tau_path")):
        return None
    sizes = {name: model.starts[name].numel() for name in path[-1]["tau"]}
    taus = {name: value if isinstance(value, list) else [value] for name, value in path[-1]["tau"].items()}
    logs = (sizes[name] * sum(map(math.log, values)) / len(values) for name, values in taus.items())
    return math.exp(sum(logs) / sum(sizes.values()))
