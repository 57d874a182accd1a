"""The state of a fit: the guide's parameters and AdamW's moments. A step changes all tasks, or only the tasks that it draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.files.row_file import RowTensor
from bora_pyro.inference.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors
from bora_pyro.inference.processes import Processes
from bora_pyro.inference.task_rows import BETAS, EPS, TaskRows
from bora_pyro.model import BoRA, Weights

#: Prefixes of the names of the model's own state; all other names are those of the guide's parameters.
MODEL = ("prior/", "buffers/", "masks/")


class FitState(Protocol):
    """The parameters of a fit: ``shared`` are the same in every process, ``own`` belong to the tasks of this process."""

    shared: list[Parameter]
    own: list[Parameter]

    def begin_epoch(self) -> None:
        """Prepare an epoch."""

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Prepare a step on some batches, and return the batches for the model."""

    def step(self, rate: float) -> None:
        """Take AdamW's step and delete the gradients."""

    def sites(self) -> dict[str, Tensor]:
        """The guide's central values of the sites, for the tasks whose parameters it holds."""

    def adapters(self) -> Weights | Callable[[Tensor], Weights]:
        """θ at the guide's centre, in the form that ``evaluate`` takes."""

    def totals(self, processes: Processes) -> Weights:
        """Sums over the tasks of all processes, for ``view``."""

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        """A batch, θ of its tasks, and the average of θ over all tasks, which broadcasts against θ.

        If a step draws tasks, the average is that of `TaskRows.average_weights`.
        """

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


class AllTasks:
    """The state of a fit whose steps change the adapters of all tasks: one fused AdamW over all parameters of the guide."""

    def __init__(self, model: BoRA, guide: AutoGuide) -> None:
        self.model, self.guide = model, guide
        self.parameters = dict(guide.named_parameters())
        self.shared: list[Parameter] = [*self.parameters.values()]
        self.own: list[Parameter] = []
        self.optimizer = _adamw(self.shared)
        self.best: dict[str, Tensor] = {}

    def begin_epoch(self) -> None:
        """Nothing to prepare."""

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def step(self, rate: float) -> None:
        _step(self.optimizer, rate)

    def sites(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.guide.median().items()}

    def adapters(self) -> Weights:
        return self.model.weights_given(self.sites())[0]

    def totals(self, processes: Processes) -> Weights:
        return {}

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        theta = self.adapters()
        return batch, theta, {name: value.mean(0, keepdim=True) for name, value in theta.items()}

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()} | self.model.state()

    def keep(self) -> None:
        self.best = self._copy()

    def restore(self) -> None:
        self._put(self.best)

    def _put(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state[name])
        self.model.load_state({name: value for name, value in state.items() if name.startswith(MODEL)})

    def complete(self, processes: Processes) -> None:
        """The guide always holds all tasks."""

    def save(self, processes: Processes) -> dict[str, dict[str, Tensor]]:
        return {"parameters": self._copy(), "optimizer": optimizer_tensors(self.optimizer), "best": self.best}

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        _check_kind(checkpoint, drawn=False)
        shapes = {name: value.shape for name, value in self.parameters.items()}
        parameters, best = checkpoint.group("parameters"), checkpoint.group("best")
        _check(checkpoint, [shapes, shapes], [_shapes(parameters), _shapes(best)])
        _check_model_state(checkpoint, self.model, parameters, best)
        self._put(parameters)
        load_optimizer_tensors(self.optimizer, checkpoint.group("optimizer"))
        self.best = best


class DrawnTasks:
    """The state of a fit whose steps change Θ and only the adapters of the tasks that they draw.

    Args:
        model: the BoRA model.
        guide: the guide after its first run, with one row for each task or one row for all.
        own: the tasks of this process.
        budget: bytes of memory for task rows.
        folder: folder of the files for task rows beyond the budget.
        keep_sums: keep the sums over all tasks up to date, for ``totals``.
    """

    def __init__(
        self, model: BoRA, guide: AutoGuide, *, own: Tensor, budget: float, folder: Path, keep_sums: bool = False
    ) -> None:
        self.model, self.guide = model, guide
        self.rows = TaskRows(model, guide, own=own, budget=budget, folder=folder, keep_sums=keep_sums)
        task_parameters = {id(parameter) for parameter in self.rows.parameters.values()}
        self.of_all = {name: value for name, value in guide.named_parameters() if id(value) not in task_parameters}
        self.shared, self.own = [*self.of_all.values()], [*self.rows.parameters.values()]
        self.optimizer = _adamw(self.shared) if self.shared else None
        self.best: dict[str, Tensor] = {}

    def begin_epoch(self) -> None:
        self.rows.follow_sums()

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return self.rows.begin(batches)

    def step(self, rate: float) -> None:
        if self.optimizer is not None:
            _step(self.optimizer, rate)
        self.rows.step(rate)

    def sites(self) -> dict[str, Tensor]:
        return self.rows.sites()

    def adapters(self) -> Callable[[Tensor], Weights]:
        return self.rows.weights

    def totals(self, processes: Processes) -> Weights:
        assert self.rows.sums is not None
        message = processes.all_reduce(torch.cat([value.flatten() for value in self.rows.sums.values()]).float())
        parts = message.split([value.numel() for value in self.rows.sums.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(self.rows.sums.items(), parts, strict=True)}

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        (batch,) = self.rows.begin([batch])
        return batch, self.rows.weights(self.rows.loaded), self.rows.average_weights(totals)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.of_all.items()} | self.model.state()

    def keep(self) -> None:
        self.best = self._copy()
        self.rows.keep()

    def restore(self) -> None:
        self._put(self.best)
        self.rows.restore()

    def _put(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.of_all.items():
                value.copy_(state[name])
        self.model.load_state({name: value for name, value in state.items() if name.startswith(MODEL)})

    def complete(self, processes: Processes) -> None:
        for store in self.rows.values.values():
            processes.gather_rows(store, self.rows.own)
        if not processes.rank:
            self.rows.complete()

    def save(self, processes: Processes) -> dict[str, dict[str, Tensor | RowTensor]]:
        rows = self.rows.tensors()
        for group in rows.values():
            for store in group.values():
                processes.gather_rows(store, self.rows.own)
        count = processes.all_reduce(self.rows.count.clone())
        sums = {name: processes.all_reduce(value.clone()) for name, value in (self.rows.sums or {}).items()}
        if processes.rank:
            return {}
        groups: dict[str, dict[str, Tensor | RowTensor]] = {name: {**group} for name, group in rows.items()}
        groups["parameters"] |= self._copy()
        groups["best"] |= self.best
        groups["optimizer"] = {**optimizer_tensors(self.optimizer)} if self.optimizer is not None else {}
        groups["count"], groups["sums"] = {"steps": count}, {**sums}
        return groups

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        _check_kind(checkpoint, drawn=True)
        tasks = self.model.num_tasks
        shapes = {name: value.shape for name, value in self.of_all.items()}
        shapes |= {name: torch.Size((tasks, *value.shape[1:])) for name, value in self.rows.parameters.items()}
        groups = self.rows.tensors()
        row_shapes = {name: torch.Size((tasks, *value.shape[1:])) for name, value in self.rows.parameters.items()}
        expected = {"parameters": shapes, "best": shapes, "exp_avg": row_shapes, "exp_avg_sq": row_shapes}
        _check(checkpoint, [*expected.values()], [checkpoint.shapes(group) for group in expected])
        for group, stores in groups.items():
            for name, store in stores.items():
                for index in self.rows.own.split(64):
                    store.write(index, checkpoint.rows(group, name, index))
                store.release_memory()
        self.rows.load(self.rows.own[:1])
        parameters, self.best = (checkpoint.group(group, without=[*row_shapes]) for group in ("parameters", "best"))
        _check_model_state(checkpoint, self.model, parameters, self.best)
        self._put(parameters)
        self.rows.count.zero_()
        self.rows.count[self.rows.own] = checkpoint.group("count")["steps"][self.rows.own]
        if self.rows.sums is not None:
            # rank 0 gets the sums over all tasks and the others 0, because only the sum over processes is used
            device, factor = self.model.backbone.device, float(processes.rank == 0)
            self.rows.sums |= {name: factor * value.to(device) for name, value in checkpoint.group("sums").items()}
        if self.optimizer is not None:
            load_optimizer_tensors(self.optimizer, checkpoint.group("optimizer"))


def _adamw(parameters: list[Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=0.0, eps=EPS, fused=True)


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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
        _check_kind(checkpoint, drawn=task_subsampling)
    elif not drawn and processes > 1:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} is of one process whose steps change all tasks; resume it with one process, or "
            "start afresh with --overwrite true"
        )
    return drawn


def _check_kind(checkpoint: Checkpoint, *, drawn: bool) -> None:
    if draws_tasks(checkpoint) != drawn:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} is of a fit with task_subsampling {str(not drawn).lower()}; "
            "give that, or start afresh with --overwrite true"
        )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items() if not name.startswith(MODEL)}


def _check(checkpoint: Checkpoint, expected: list[dict[str, torch.Size]], found: list[dict[str, torch.Size]]) -> None:
    found = [{name: shape for name, shape in group.items() if not name.startswith(MODEL)} for group in found]
    if found != expected:
        raise _other_model(checkpoint)


def _check_model_state(checkpoint: Checkpoint, model: BoRA, *states: dict[str, Tensor]) -> None:
    own = {name: value.shape for name, value in model.state().items()}
    tensors = {name for name in own if not name.startswith("prior/")}
    for state in states:
        if {name for name in state if name.startswith(MODEL) and not name.startswith("prior/")} != tensors:
            raise _other_model(checkpoint)
        for name, value in state.items():
            # sums that the prior has not computed yet have no shape to compare with
            absent = None if name.startswith("prior/tau.") else value.shape
            if name.startswith(MODEL) and value.shape != own.get(name, absent):
                raise _other_model(checkpoint)


def _other_model(checkpoint: Checkpoint) -> InputError:
    return InputError(
        f"checkpoint {str(checkpoint.path)!r} is of another model (other tasks, rank, targets or prior); "
        "give the options of its run, or start afresh with --overwrite true"
    )
