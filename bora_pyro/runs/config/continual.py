"""The configuration of tasks in sequence.

>>> ContinualConfig(order=["ada", "bob"], tau=1.0).map_fit.tau
1.0
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from bora_pyro.data.options import DataOptions
from bora_pyro.errors import InputError
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.field import by_heading, changed, check_fields, option
from bora_pyro.runs.config.groups import HEADINGS, MODEL, PRIOR, BaseOptions, RunOptions, SourceOptions
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Options that a single task after another has no use for, or that a merged base cannot have.
UNUSED = (
    "router", "router_option", "start_from", "quantization", "device_map", "shard_base", "options_column",
    "task_group_column", "task_subsampling", "task_dropout", "task_memory", "kept_by", "tau_documents", "gradient_norm",
    "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
)  # fmt: skip


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class ContinualConfig(FitOptions, BaseOptions, DataOptions, SourceOptions):
    """Fit tasks one after another, each merged into the base before the next one, which leaves its leading directions alone."""

    order: list[str] | None = option(
        None, "names of the tasks in their order (default: all tasks, in alphabetical order)", group=MODEL, whole=True
    )
    preserve_from: float = option(0.3, "share of the base's singular directions that the first task leaves alone", group=MODEL)
    preserve_to: float = option(0.7, "the same for the last task; tasks between have shares in equal steps", group=MODEL)
    tau: float = option(0.0, "precision of each task's prior Normal(start of the adapter, I/tau); 0: a flat prior", group=PRIOR)
    gradient_norm: bool = changed(FitOptions, "gradient_norm", False)
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/continual", "folder of the sequence")
    overwrite: bool = changed(RunOptions, "overwrite", False, "replace the sequence in output_dir")
    resume: bool = option(False, "go on after the last task of output_dir that is merged", group=RUN)

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

            >>> ContinualConfig(task_dropout=0.5).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: task_dropout is 0.5, which tasks one after another have no use for; leave it out

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        for name in UNUSED:
            if getattr(self, name) != getattr(ContinualConfig(), name):
                raise InputError(f"{name} is {getattr(self, name)}, which tasks one after another have no use for; leave it out")
        for name in ("preserve_from", "preserve_to"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; give a number from 0 to 1, nearest: {1 if value > 1 else 0}")
        if self.adapter == "osft":
            raise InputError("adapter is osft, which wraps the adapter of each task here anyway; name the adapter inside it")
        if not 0 <= self.tau < math.inf:
            raise InputError(f"tau is {self.tau}; give a finite number from 0 (a flat prior) up")
        if self.overwrite and self.resume:
            raise InputError(
                "overwrite and resume are both true; overwrite starts again, resume goes on after the last task: give one of them"
            )
        self.map_fit.validate()

    @property
    def map_fit(self) -> MapFitConfig:
        """The configuration of a MAP fit with the same documents, base and options."""
        names = {field.name for field in dataclasses.fields(self)} & {field.name for field in dataclasses.fields(MapFitConfig)}
        own = {name: getattr(self, name) for name in names if name != "resume"}
        return MapFitConfig(**own, export_adapters=False)
