"""Going on with a run: that it is the same one, and whether there is something left to do.

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
from dataclasses import dataclass
from typing import Any, TypeVar

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import Checkpoint, Checkpoints
from bora_pyro.inference.continuation import check_packing, check_same, is_over
from bora_pyro.inference.state import as_before
from bora_pyro.options.command_line import parse_config
from bora_pyro.runs.config.map_fit import RUN, MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG

C = TypeVar("C", MapFitConfig, PosteriorFitConfig)


@dataclass(frozen=True)
class Standing:
    """Where a run stands, which may have begun or not.

        >>> Standing().steps_left
        True

    Attributes:
        checkpoint: the newest that is whole; None before the first.
        split: which documents are where; None where nothing has said it yet.
        steps_left: whether there is something left to fit.
    """

    checkpoint: Checkpoint | None = None
    split: dict[str, Any] | None = None
    steps_left: bool = True

    @classmethod
    def of(cls, folder: RunFolder, config: Any) -> Standing:
        """That of the run in a folder under a configuration with ``epochs`` and ``patience``.

        Raises:
            InputError: there are checkpoints, and all are damaged; what the newest was fitted to cannot be told.
        """
        checkpoint = Checkpoints(folder.checkpoints).newest()
        try:
            split = folder.read_split()
        except InputError as error:
            # documents that are split anew are known by the checkpoint's digest
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
        """Those that are done."""
        return 0 if self.checkpoint is None else self.checkpoint.progress["epoch"]

    def check(self, data: TaskData, backbone: Backbone, config: Any, *, processes: int = 1) -> None:
        """Refuse to go on with other documents or another base, within an epoch of other steps, or with tasks drawn otherwise.

        Args:
            data: the documents as they are now.
            backbone: the base as it is now.
            config: with ``token_budget``, ``accumulate``, ``seed`` and ``task_subsampling``.
            processes: that go on with it.

        Raises:
            InputError: as for `check_same`, `check_packing` and `as_before`.
        """
        if self.checkpoint is not None:
            packing = {name: getattr(config, name) for name in ("token_budget", "accumulate", "seed")} | {"processes": processes}
            as_before(self.checkpoint, config.task_subsampling, processes=processes)
            check_same(self.checkpoint.progress, data, backbone, what=f"checkpoint {str(self.checkpoint.path)!r}")
            check_packing(self.checkpoint, packing)


def resume(config: C) -> tuple[C, Standing]:
    """Where the run in ``config.output_dir`` stands, and the configuration to go on with.

    Where nothing is left to fit, it is the run's own, but for where and how it is run: nothing that is given now was fitted so.

    Raises:
        InputError: as for `Standing.of`, or the run's configuration cannot be read.
    """
    folder = RunFolder.open(config.output_dir)
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
    """The options of a configuration that say what is fitted, and not where and how it is run."""
    fields = dataclasses.fields(kind)
    return [field.name for field in fields if field.metadata["group"] != RUN or field.name == "precision"]


def say_nothing_is_left(standing: Standing) -> None:
    """Tell the user that options given now change nothing."""
    done = "1 epoch is" if standing.epochs == 1 else f"{standing.epochs} epochs are"
    print(
        f"note: nothing is left to fit: {done} done; what was fitted stays as it is, with the options of its config.yaml",
        file=sys.stderr,
    )
