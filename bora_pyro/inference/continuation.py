"""Whether a fit may go on from a checkpoint: the same documents, the same base, the same steps, and something left to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.inference.checkpoint import Checkpoint


def check_same(
    progress: Mapping[str, Any],
    data: TaskData,
    backbone: Backbone,
    *,
    what: str,
    remedy: str = "start afresh with --overwrite true",
) -> None:
    """Refuse other documents, and a base with other weights, than those that a fit has left a digest of.

    Args:
        progress: of a checkpoint, or the metadata of a posterior; older ones say nothing of it.
        data: the documents as they are now.
        backbone: the base as it is now.
        what: whose they were, as the error calls it.
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
    """What `check_same` compares."""
    return {"data": data.digest} | ({} if backbone.digest is None else {"base": backbone.digest})


def check_packing(checkpoint: Checkpoint, packing: Mapping[str, int]) -> None:
    """Refuse to go on within an epoch whose documents were packed into other steps: some would be skipped, others repeated.

    Args:
        checkpoint: of an epoch's end, where anything goes, or of a place within one.
        packing: what the steps depend on, by the name of the option.

    Raises:
        InputError: one of them differs; older checkpoints say nothing of it.
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
