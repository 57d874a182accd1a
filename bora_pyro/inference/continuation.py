"""Whether a fit may go on from a checkpoint: the same documents, the same base, the same steps, and something left to do.

All such checks are here, and they are made once, before a fit touches anything:

>>> import tempfile
>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> with tempfile.TemporaryDirectory() as folder:
...     start = Continuation.find(Path(folder), data, backbone, FitOptions())
>>> start.checkpoint is None
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.inference.checkpoint import Checkpoint, Checkpoints
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.state import as_before


@dataclass(frozen=True)
class Continuation:
    """Where a fit keeps its checkpoints, and the one that it goes on from.

    Attributes:
        store: the folder of the checkpoints.
        checkpoint: the newest one that is whole; None: the fit begins.
    """

    store: Checkpoints
    checkpoint: Checkpoint | None = None

    @classmethod
    def find(cls, folder: Path, data: TaskData, backbone: Backbone, options: FitOptions, *, processes: int = 1) -> Continuation:
        """Look into the folder, and check that a fit with these options may go on from what is there.

        Args:
            folder: of the checkpoints; it may be missing.
            data: the documents as they are now.
            backbone: the base as it is now.
            options: those of the fit that goes on.
            processes: number of processes that go on with it.

        Raises:
            InputError: there are checkpoints and all are damaged; the newest is of other documents or of another base, stands
                within an epoch of other steps, or is of a fit that draws tasks otherwise.
        """
        store = Checkpoints(folder, keep=options.keep_checkpoints)
        checkpoint = store.newest()
        if checkpoint is not None:
            check_continues(checkpoint, data, backbone, options, processes=processes)
        return cls(store, checkpoint)


def check_continues(
    checkpoint: Checkpoint, data: TaskData, backbone: Backbone, options: FitOptions, *, processes: int = 1
) -> None:
    """Refuse to go on with other documents or another base, within an epoch of other steps, or with tasks drawn otherwise.

    Args:
        checkpoint: where the fit stands.
        data: the documents as they are now.
        backbone: the base as it is now.
        options: those of the fit that goes on.
        processes: number of processes that go on with it.

    Raises:
        InputError: as for `check_same`, `check_packing` and `as_before`.
    """
    checkpoint.check_progress({"steps": (int,), "epoch": (int,), "within": (dict,)})
    as_before(checkpoint, options.task_subsampling, processes=processes)
    check_same(checkpoint.progress, data, backbone, what=f"checkpoint {str(checkpoint.path)!r}")
    packing = {name: getattr(options, name) for name in ("token_budget", "accumulate", "seed")}
    check_packing(checkpoint, packing | {"processes": processes})


def check_same(
    progress: Mapping[str, Any],
    data: TaskData,
    backbone: Backbone,
    *,
    what: str,
    remedy: str = "start afresh with --overwrite true",
) -> None:
    """Refuse other documents, and a base with other weights, than those whose digests a fit has stored.

    Args:
        progress: of a checkpoint, or the metadata of a posterior; those of older versions lack the digests.
        data: the documents as they are now.
        backbone: the base as it is now.
        what: names what was stored, in the error message.
        remedy: what to do, beside giving the right ones.

    Raises:
        InputError: they differ.
    """
    if progress.get("data", data.digest) != data.digest:
        raise InputError(
            f"{what} is of other documents: their tokens, tasks or weights are not those of the data now; use the data that it "
            f"was fitted to, or {remedy}"
        )
    if backbone.digest is not None and progress.get("base", backbone.digest) != backbone.digest:
        raise InputError(
            f"{what} is of another base model: its weights are not those of the base now; use the base that it was fitted to, "
            f"or {remedy}"
        )


def digests(data: TaskData, backbone: Backbone) -> dict[str, str]:
    """The digests that `check_same` compares."""
    return {"data": data.digest} | ({} if backbone.digest is None else {"base": backbone.digest})


def check_packing(checkpoint: Checkpoint, packing: Mapping[str, int]) -> None:
    """Refuse to go on within an epoch whose documents were packed into other steps: some would be skipped, others repeated.

    Args:
        checkpoint: written at the end of an epoch, where any packing goes, or within one.
        packing: the settings that the steps of an epoch depend on, by the name of the option.

    Raises:
        InputError: one of them differs; checkpoints of older versions lack them.
    """
    within = checkpoint.progress["within"]
    for name, value in packing.items():
        if (stored := within.get(name, value)) != value:
            raise InputError(
                f"{name} is {value}, but checkpoint {str(checkpoint.path)!r} stands within an epoch of {name} {shown(stored)}; "
                "give that until the epoch's end, or start afresh with --overwrite true"
            )


def is_over(epoch: int, best_epoch: int, *, epochs: int, patience: int) -> bool:
    """Whether a fit has nothing left to do: all epochs are done, or none has been better for too long."""
    return epoch >= epochs or bool(patience and epoch - best_epoch >= patience)
