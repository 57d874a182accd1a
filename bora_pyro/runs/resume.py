"""Resuming a run: where it stands, and whether anything is left to fit.

>>> import tempfile
>>> from bora_pyro.runs.config.map_fit import MapFitConfig
>>> from bora_pyro.runs.map_fit import run_map_fit
>>> options = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2}
>>> with tempfile.TemporaryDirectory() as folder:
...     metrics = run_map_fit(MapFitConfig(output_dir=f"{folder}/run", epochs=1, **options), quiet=True)
...     run = RunFolder.open(f"{folder}/run")
...     [Standing.of(run, MapFitConfig(epochs=epochs)).steps_left for epochs in (1, 2)]
[False, True]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.inference.checkpoint import Checkpoint, Checkpoints
from bora_pyro.inference.continuation import Continuation, is_over
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.runs.config.groups import AUTO, RunOptions
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG
from bora_pyro.runs.trackers import check_packages

C = TypeVar("C", bound=RunOptions)


@dataclass(frozen=True)
class Standing:
    """Where a run stands. The default is a run that has not begun.

        >>> Standing().steps_left
        True

    Attributes:
        checkpoint: the newest checkpoint that is not damaged; None if there is none yet.
        split: content of ``split.json``; None if it was not written yet.
        steps_left: whether anything is left to fit.
    """

    checkpoint: Checkpoint | None = None
    split: dict[str, Any] | None = None
    steps_left: bool = True

    @classmethod
    def of(cls, folder: RunFolder, config: Any) -> Standing:
        """Find out where the run in a folder stands.

        Args:
            folder: the run folder.
            config: a configuration with ``epochs`` and ``patience``.

        Raises:
            InputError: all checkpoints are damaged, or nothing says which documents the newest one was fitted to.
        """
        checkpoint = Checkpoints(folder.checkpoints).newest()
        try:
            split = folder.read_split()
        except InputError as error:
            # without split.json, the digest in the checkpoint tells whether a new split gives the same documents
            if checkpoint is not None and "data" not in checkpoint.progress:
                raise InputError(f"{str(error).partition('; ')[0]}; start afresh with --overwrite true") from None
            split = None
        if checkpoint is None:
            return cls(None, split)
        checkpoint.check_progress({"epoch": (int,), "best_epoch": (int,), "within": (dict,)})
        done, best = checkpoint.progress["epoch"], checkpoint.progress["best_epoch"]
        return cls(checkpoint, split, not is_over(done, best, epochs=config.epochs, patience=config.patience))

    @property
    def epochs(self) -> int:
        """Number of epochs that are done."""
        return 0 if self.checkpoint is None else self.checkpoint.progress["epoch"]

    def continuation(
        self, folder: RunFolder, data: TaskData, backbone: Backbone, options: FitOptions, *, processes: int = 1
    ) -> Continuation:
        """Check the checkpoint that the fit continues from. ``fit`` takes the result and checks nothing again.

        Args:
            folder: the run folder.
            data: the documents as they are now.
            backbone: the base model as it is now.
            options: options of the fit that continues.
            processes: number of processes that continue it.

        Raises:
            InputError: as for `Continuation.find`.
        """
        if self.checkpoint is None:  # the fit begins; checkpoints of a run that is overwritten do not count
            return Continuation(Checkpoints(folder.checkpoints, keep=options.keep_checkpoints))
        return Continuation.find(folder.checkpoints, data, backbone, options, processes=processes)


def resolve_folder(config: C) -> tuple[C, RunFolder]:
    """Resolve ``resume: auto``, and check that the run may use its folder. Nothing is written.

    Args:
        config: the configuration.

    Returns:
        The configuration with ``resume`` true or false, and the run folder, which is not taken yet.

    Raises:
        InputError: the folder cannot be used, or a tracker's package is not installed.
    """
    folder = RunFolder(config.output_dir)
    resumes = RunFolder.holds_run(config.output_dir) if config.resume == AUTO else bool(config.resume)
    folder.check_free(overwrite=config.overwrite, resume=resumes)
    check_packages(config.trackers)
    return dataclasses.replace(config, resume=resumes), folder


def resume(config: C, folder: RunFolder) -> tuple[C, Standing]:
    """Find out where a run stands, and with which configuration it continues.

    If nothing is left to fit, the stored configuration replaces the given one, except for options that only say where and how
    the run is computed. The fit was made with the stored options.

    Args:
        config: the configuration that was given.
        folder: the run folder.

    Raises:
        InputError: as for `Standing.of`, or the run's configuration cannot be read.
    """
    standing = Standing.of(folder, config)
    if standing.steps_left:
        return config, standing
    try:
        stored = parse_config(type(config), ["--config", str(folder.path / CONFIG)])
    except InputError as error:
        raise InputError(str(error).removeprefix("--config ")) from None
    own = {name: getattr(stored, name) for name in fitted_options(type(config))}
    return dataclasses.replace(config, **own), standing


def fitted_options(kind: type) -> list[str]:
    """Names of the options that say what is fitted, without those that say where and how it is computed."""
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.metadata["group"] != RUN or field.name == "precision"]


def say_nothing_is_left(standing: Standing) -> None:
    """Tell the user that the given options change nothing."""
    done = "1 epoch is" if standing.epochs == 1 else f"{standing.epochs} epochs are"
    print(
        f"note: nothing is left to fit: {done} done; what was fitted stays as it is, with the options of its config.yaml",
        file=sys.stderr,
    )


def as_written(config: C) -> dict[str, Any]:
    """The content of ``config.yaml``.

    ``overwrite`` and ``resume`` are false in it, so that a command that reads the file neither deletes nor resumes a run.
    """
    return dataclasses.asdict(config) | {"overwrite": False, "resume": False}


def changed_option(config: RunOptions, folder: RunFolder, name: str, stored: Mapping[str, Any]) -> InputError:
    """The error if the run to resume has another value of an option."""
    given, there = (shown(value, characters=300) for value in (getattr(config, name), stored.get(name)))
    return InputError(
        f"{name} is {given}, but the run in {folder.path} has {there}; resume it with "
        f"--config {folder.path}/config.yaml --resume true, or give another --output_dir"
    )
