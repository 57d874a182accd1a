"""Check whether a checkpoint can be resumed: the documents, the base and the steps of the fit must be the same.

The checks are made once, before the fit changes anything:

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

#: The attributes of ``Fitted`` that a checkpoint stores besides the guide's state, and their types.
RECORD: dict[str, tuple[type, ...]] = {
    "history": (list,),
    "best_epoch": (int,),
    "validation_score": (float, int, type(None)),
    "global_mean_score": (float, int, type(None)),
    "seconds": (float, int),
    "averaged": (bool,),
    "gradient_norms": (dict,),
}


@dataclass(frozen=True)
class Continuation:
    """The checkpoints of a fit, and the one from which it is resumed.

    Attributes:
        store: the folder of the checkpoints.
        checkpoint: the newest undamaged checkpoint; None: the fit starts from the beginning.
    """

    store: Checkpoints
    checkpoint: Checkpoint | None = None

    @classmethod
    def find(cls, folder: Path, data: TaskData, backbone: Backbone, options: FitOptions, *, processes: int = 1) -> Continuation:
        """Find the newest checkpoint in the folder, and check that a fit with these options can resume it.

        Args:
            folder: folder of the checkpoints; it may be missing.
            data: the documents as they are now.
            backbone: the base as it is now.
            options: options of the resumed fit.
            processes: number of processes of the resumed fit.

        Raises:
            InputError: all checkpoints are damaged; or the newest one cannot be resumed, see :func:`check_continues`.
        """
        store = Checkpoints(folder, keep=options.keep_checkpoints)
        checkpoint = store.newest()
        if checkpoint is not None:
            check_continues(checkpoint, data, backbone, options, processes=processes)
        return cls(store, checkpoint)


def check_continues(
    checkpoint: Checkpoint, data: TaskData, backbone: Backbone, options: FitOptions, *, processes: int = 1
) -> None:
    """Refuse to resume a checkpoint with other documents, another base, other steps in the current epoch, or other task drawing.

    Args:
        checkpoint: the checkpoint to resume.
        data: the documents as they are now.
        backbone: the base as it is now.
        options: options of the resumed fit.
        processes: number of processes of the resumed fit.

    Raises:
        InputError: as for `check_same`, `check_packing` and `as_before`; or the same rows are pieces of other documents.
    """
    checkpoint.check_progress({"steps": (int,), "epoch": (int,), "within": (dict,)})
    as_before(checkpoint, options.task_subsampling, processes=processes)
    check_same(checkpoint.progress, data, backbone, what=f"checkpoint {str(checkpoint.path)!r}")
    # older versions stored no number, and counted rows
    if checkpoint.progress.get("documents", len(data.train)) != data.train.num_documents:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} counts documents in another way: the {len(data.train)} pieces are of "
            f"{data.train.num_documents} documents; start afresh with --overwrite true"
        )
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
    """Refuse documents or base weights whose digests differ from the stored digests of a fit.

    Args:
        progress: progress of a checkpoint, or metadata of a posterior. Older versions stored no digests; then nothing is refused.
        data: the documents as they are now.
        backbone: the base as it is now.
        what: name of the checkpoint or posterior in the error message.
        remedy: what the error message suggests besides giving the right documents or base.

    Raises:
        InputError: a digest differs.
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
    """Refuse to resume within an epoch if the documents would be packed into other steps: some would be skipped, others repeated.

    Args:
        checkpoint: the checkpoint to resume. At the end of an epoch, any packing is allowed.
        packing: values of the options that fix the steps of an epoch, by name.

    Raises:
        InputError: a value differs. Options that an older version did not store are not checked.
    """
    within = checkpoint.progress["within"]
    for name, value in packing.items():
        if (stored := within.get(name, value)) != value:
            raise InputError(
                f"{name} is {value}, but checkpoint {str(checkpoint.path)!r} is within an epoch with {name} {shown(stored)}; "
                "give that value until the epoch ends, or start afresh with --overwrite true"
            )


def check_record(checkpoint: Checkpoint) -> None:
    """Check that the progress of a checkpoint has the form that a fit writes.

    Raises:
        InputError: it has another form.
    """
    if "validation_perplexity" in checkpoint.progress:  # the name in older checkpoints
        checkpoint.progress.setdefault("validation_score", checkpoint.progress["validation_perplexity"])
    checkpoint.progress.setdefault("global_mean_score", None)  # older checkpoints have none
    checkpoint.check_progress({"steps": (int,), "epoch": (int,), "within": (dict,)} | RECORD)
    with checkpoint.errors():
        if not all(isinstance(entry["training_tokens_per_second"], float | int) for entry in checkpoint.progress["history"]):
            raise ValueError("its history has an epoch without a speed")
        if (within := checkpoint.progress["within"]) and not (
            isinstance(within["steps"], int)
            and isinstance(within["seconds"], float)
            and isinstance(within["report"], dict)
            and len(within["totals"]) == 4
            and all(isinstance(total, float) for total in within["totals"])
        ):
            raise ValueError("its progress within the epoch does not have the form that a fit writes")


def is_over(epoch: int, best_epoch: int, *, epochs: int, patience: int) -> bool:
    """Whether a fit is finished: all epochs are done, or the last ``patience`` epochs were no better than an earlier one."""
    return epoch >= epochs or bool(patience and epoch - best_epoch >= patience)
