"""What the state of a fit does: the guide's parameters, AdamW's moments, the best state, and the mean of all steps.

``all_tasks`` has the state whose steps change the adapters of all tasks, ``drawn_tasks`` the one whose steps change those of the
tasks that they draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.files.row_file import RowTensor
from bora_pyro.inference.checkpoint import Checkpoint
from bora_pyro.inference.optimizer import Rates
from bora_pyro.inference.processes import Processes
from bora_pyro.model import BoRA, Weights

#: Prefixes of the names of the model's own state; all other names are those of the guide's parameters.
MODEL = ("prior/", "buffers/", "masks/")


class FitState(Protocol):
    """The parameters of a fit: ``shared`` are the same in every process, ``own`` belong to the tasks of this process."""

    guide: AutoGuide
    shared: list[Parameter]
    own: list[Parameter]

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of the shared parameters; None if there are none."""

    def begin_epoch(self) -> None:
        """Prepare an epoch."""

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Prepare a step on some batches, and return the batches for the model."""

    def step(self, rates: Rates) -> None:
        """Take the optimiser's step and delete the gradients."""

    def rescale(self, factors: Weights) -> None:
        """Multiply AdamW's moments of whitened values, by the names of `precisions`, as their gradients change with τ."""

    def sites(self) -> dict[str, Tensor]:
        """The guide's central values of the sites, for the tasks whose parameters it holds."""

    def adapters(self) -> Weights | Callable[[Tensor], Weights]:
        """θ at the guide's centre, in the form that ``evaluate`` takes."""

    def global_mean(self) -> Weights | Callable[[Tensor], Weights]:
        """As ``adapters``, with Θ for every task."""

    def totals(self, processes: Processes) -> Weights:
        """Sums over the tasks of all processes, for ``view``."""

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        """A batch, θ of its tasks, and the average of θ over all tasks, which broadcasts against θ.

        If a step draws tasks, the average is that of `TaskRows.average_weights`.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block, the current state is the mean of all steps."""

    def keep(self) -> None:
        """Store the current state as the best one."""

    def restore(self) -> None:
        """Restore the best state."""

    def complete(self, processes: Processes) -> None:
        """Make the guide hold all tasks, in the process of rank 0."""

    def save(self, processes: Processes) -> Mapping[str, Mapping[str, Tensor | RowTensor]]:
        """The whole state as groups of named tensors, in the process of rank 0."""

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Restore the state that ``save`` returned."""


def draws_tasks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint belongs to a fit whose steps draw tasks."""
    return bool(checkpoint.shapes("count"))


def as_before(checkpoint: Checkpoint, task_subsampling: bool | None, *, processes: int = 1) -> bool:
    """Whether the steps of a resumed fit draw tasks: the same as in the fit of the checkpoint.

    Args:
        checkpoint: a checkpoint of the fit.
        task_subsampling: the option of the resumed fit; None: the same as before.
        processes: number of processes of the resumed fit.

    Raises:
        InputError: the option differs from that of the checkpoint, or several processes would resume a fit that does not draw
            tasks.
    """
    drawn = draws_tasks(checkpoint)
    if task_subsampling is not None:
        check_kind(checkpoint, drawn=task_subsampling)
    elif not drawn and processes > 1:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} is of one process whose steps change all tasks; resume it with one process, or "
            "start afresh with --overwrite true"
        )
    return drawn


def check_kind(checkpoint: Checkpoint, *, drawn: bool) -> None:
    """Check that the steps of a checkpoint's fit draw tasks, or that they do not.

    Raises:
        InputError: it is the other way round.
    """
    if draws_tasks(checkpoint) != drawn:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} is of a fit with task_subsampling {str(not drawn).lower()}; "
            "give that, or start afresh with --overwrite true"
        )


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of the guide's tensors by name, without those of the model's own state."""
    return {name: value.shape for name, value in tensors.items() if not name.startswith(MODEL)}


def check_shapes(checkpoint: Checkpoint, expected: list[dict[str, torch.Size]], found: list[dict[str, torch.Size]]) -> None:
    """Check that groups of parameters have the expected shapes by name; the model's own state is left out.

    Raises:
        InputError: they differ.
    """
    found = [{name: shape for name, shape in group.items() if not name.startswith(MODEL)} for group in found]
    if found != expected:
        raise other_model(checkpoint)


def check_model_state(checkpoint: Checkpoint, model: BoRA, *states: dict[str, Tensor]) -> None:
    """Check that the stored buffers, masks and learned values are those of the model.

    Raises:
        InputError: a name or a shape differs.
    """
    own = {name: value.shape for name, value in model.state().items()}
    tensors = {name for name in own if not name.startswith("prior/")}
    for state in states:
        if {name for name in state if name.startswith(MODEL) and not name.startswith("prior/")} != tensors:
            raise other_model(checkpoint)
        for name, value in state.items():
            # sums that the prior has not computed yet have no shape to compare with
            absent = None if name.startswith("prior/tau.") else value.shape
            if name.startswith(MODEL) and value.shape != own.get(name, absent):
                raise other_model(checkpoint)


def other_model(checkpoint: Checkpoint) -> InputError:
    """The error for a checkpoint whose tensors are not those of the model."""
    return InputError(
        f"checkpoint {str(checkpoint.path)!r} is of another model (other tasks, rank, targets or prior); "
        "give the options of its run, or start afresh with --overwrite true"
    )
