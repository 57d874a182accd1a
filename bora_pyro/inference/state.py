"""What a fit moves: the guide's parameters and AdamW's moments, of all tasks in every step or of those that a step draws."""

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

#: Before the names of the model's own state, beside those of the guide's parameters.
MODEL = ("prior/", "buffers/", "masks/")


class FitState(Protocol):
    """The parameters of a fit; ``shared`` are the same in every process, ``own`` belong to the tasks of this one."""

    shared: list[Parameter]
    own: list[Parameter]

    def begin_epoch(self) -> None:
        """Make ready for an epoch."""

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Make ready for a step on some batches; the batches as the model is to be given them."""

    def step(self, rate: float) -> None:
        """Take AdamW's step and drop the gradients."""

    def sites(self) -> dict[str, Tensor]:
        """The guide's central values of the sites, of those tasks whose parameters it holds."""

    def adapters(self) -> Weights | Callable[[Tensor], Weights]:
        """θ at the guide's centre, as ``evaluate`` takes it."""

    def totals(self, processes: Processes) -> Weights:
        """What ``view`` needs to know of the tasks of all processes."""

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        """A batch, θ of the tasks that it speaks of, and the average of θ over all tasks, broadcast against it.

        Where tasks are drawn the average is that of `TaskRows.average_weights`.
        """

    def keep(self) -> None:
        """Keep the present state as the best."""

    def restore(self) -> None:
        """Put the best state back."""

    def complete(self, processes: Processes) -> None:
        """Let the guide hold all tasks, in the process of rank 0."""

    def save(self, processes: Processes) -> Mapping[str, Mapping[str, Tensor | RowTensor]]:
        """All of it as groups of named tensors, in the process of rank 0."""

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """Put back what ``save`` gave."""


class AllTasks:
    """Every step moves the adapters of all tasks: one fused AdamW over all parameters of the guide."""

    def __init__(self, model: BoRA, guide: AutoGuide) -> None:
        self.model, self.guide = model, guide
        self.parameters = dict(guide.named_parameters())
        self.shared: list[Parameter] = [*self.parameters.values()]
        self.own: list[Parameter] = []
        self.optimizer = _adamw(self.shared)
        self.best: dict[str, Tensor] = {}

    def begin_epoch(self) -> None:
        """Nothing changes from epoch to epoch."""

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
        """Every guide that is here holds all tasks."""

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
    """A step moves Θ and the adapters of the tasks that it speaks of.

    Args:
        model: the BoRA model.
        guide: set up, with a row for each task or one for all.
        own: the tasks of this process.
        budget: bytes of memory for what belongs to tasks.
        folder: where files hold what is beyond it.
        keep_sums: follow the sums over all tasks, which ``totals`` gives.
    """

    def __init__(
        self, model: BoRA, guide: AutoGuide, *, own: Tensor, budget: float, folder: Path, keep_sums: bool = False
    ) -> None:
        self.model, self.guide = model, guide
        self.rows = TaskRows(model, guide, own=own, budget=budget, folder=folder, keep_sums=keep_sums)
        of_tasks = {id(parameter) for parameter in self.rows.parameters.values()}
        self.of_all = {name: value for name, value in guide.named_parameters() if id(value) not in of_tasks}
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
        of_rows = {name: torch.Size((tasks, *value.shape[1:])) for name, value in self.rows.parameters.items()}
        expected = {"parameters": shapes, "best": shapes, "exp_avg": of_rows, "exp_avg_sq": of_rows}
        _check(checkpoint, [*expected.values()], [checkpoint.shapes(group) for group in expected])
        for group, stores in groups.items():
            for name, store in stores.items():
                for index in self.rows.own.split(64):
                    store.write(index, checkpoint.rows(group, name, index))
                store.release_memory()
        self.rows.load(self.rows.own[:1])
        parameters, self.best = (checkpoint.group(group, without=[*of_rows]) for group in ("parameters", "best"))
        _check_model_state(checkpoint, self.model, parameters, self.best)
        self._put(parameters)
        self.rows.count.zero_()
        self.rows.count[self.rows.own] = checkpoint.group("count")["steps"][self.rows.own]
        if self.rows.sums is not None:
            # those of all tasks in one process: only the sum over processes is ever looked at
            device, mine = self.model.backbone.device, float(processes.rank == 0)
            self.rows.sums |= {name: mine * value.to(device) for name, value in checkpoint.group("sums").items()}
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
    """Whether a checkpoint is of a fit whose steps draw tasks."""
    return bool(checkpoint.shapes("count"))


def as_before(checkpoint: Checkpoint, task_subsampling: bool | None, *, processes: int = 1) -> bool:
    """Whether the fit that a checkpoint is of draws tasks, and so the one that goes on from it.

    Args:
        checkpoint: of the fit.
        task_subsampling: what is asked for; None: as it was.
        processes: that go on with it.

    Raises:
        InputError: the other is asked for, or several processes are to go on with a fit that does not.
    """
    drawn = draws_tasks(checkpoint)
    if task_subsampling is not None:
        _check_kind(checkpoint, drawn=task_subsampling)
    elif not drawn and processes > 1:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} is of one process that moves all tasks in every step; go on with it in one "
            "process, or start afresh with --overwrite true"
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
    for state in states:
        for name, value in state.items():
            # running sums that no step has made yet have no shape
            absent = None if name.startswith("prior/tau.") else value.shape
            if name.startswith(MODEL) and value.shape != own.get(name, absent):
                raise _other_model(checkpoint)


def _other_model(checkpoint: Checkpoint) -> InputError:
    return InputError(
        f"checkpoint {str(checkpoint.path)!r} is of another model (other tasks, rank, targets or prior); "
        "give the options of the run that it belongs to, or start afresh with --overwrite true"
    )
