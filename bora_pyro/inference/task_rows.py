"""What a fit keeps of each task where a step holds only the tasks that it speaks of."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from bora_pyro.data.batch import Batch, TaskDraw, loaded_tasks
from bora_pyro.errors import InputError
from bora_pyro.files.row_file import RowTensor
from bora_pyro.model import BoRA, Weights

#: With more tasks than these a step draws the tasks of its documents instead of moving all.
MANY_TASKS = 64
#: AdamW's settings, in all of a fit.
BETAS, EPS = (0.9, 0.999), 1e-12


class TaskRows:
    """The guide's tensors of each task and AdamW's moments, one row a task, of which a step loads those that it needs.

    A row's moments and its count of steps change only in steps that draw it, as in ``torch.optim.SparseAdam``, but with a bias
    correction of its own. Between steps the guide's own parameters hold the rows that were loaded last.

    Args:
        model: the BoRA model.
        guide: set up; its parameters hold one row, with which all tasks begin, or one for each task.
        own: the tasks of this process, rising.
        budget: bytes that the rows may take in memory; beyond it they lie in memory-mapped files.
        folder: where such files go.
        keep_sums: follow the sums of the sites' central values over tasks.
    """

    def __init__(
        self, model: BoRA, guide: AutoGuide, *, own: Tensor, budget: float, folder: Path, keep_sums: bool = False
    ) -> None:
        self.model, self.guide, self.own, self.budget = model, guide, own, budget
        self.parameters = _task_parameters(model, guide)
        row_bytes = sum(value[0].numel() * value.element_size() for value in self.parameters.values())
        tasks = model.num_tasks
        self.mapped = 4 * row_bytes * tasks > budget
        place = folder if self.mapped else None
        if self.mapped:
            _check_space(folder, 4 * row_bytes * tasks)
        self.values = {name: RowTensor(value, tasks, folder=place) for name, value in self.parameters.items()}
        self.best = {name: RowTensor(value, tasks, folder=place) for name, value in self.parameters.items()}
        zeros = {name: torch.zeros_like(value[:1]) for name, value in self.parameters.items()}
        self.moments = [{name: RowTensor(zero, tasks, folder=place) for name, zero in zeros.items()} for _ in BETAS]
        self.count = torch.zeros(tasks)
        _forget_first_run(guide, 1)
        self._touched, self.loaded = 0.0, own[:1]
        self.load(self.loaded)
        self.sums: Weights | None = {} if keep_sums else None

    def _stores(self) -> Iterator[RowTensor]:
        for group in (self.values, self.best, *self.moments):
            yield from group.values()

    def load(self, index: Tensor) -> None:
        """Put the rows of the tasks ``index``, rising, into the guide's parameters."""
        self.loaded, device = index.cpu(), self.model.backbone.device
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.data = self.values[name].read(self.loaded).to(device)
        self._touch(1)

    def begin(self, batches: Sequence[Batch]) -> list[Batch]:
        """Load the tasks that some batches speak of; the batches, each speaking of all of them."""
        draws = [batch.tasks for batch in batches if batch.tasks is not None]
        if not draws:
            return []
        self.load(torch.cat([draw.index for draw in draws]).unique())
        return [
            replace(batch, tasks=replace(batch.tasks.widened(self.loaded), rows_loaded=True)) for batch in batches if batch.tasks
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """AdamW on the loaded rows that have gradients."""
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if not names:
            return
        before = None if self.sums is None else self.centres()
        parameters = [self.parameters[name] for name in names]
        first, second = (
            [group[name].read(self.loaded).to(self.parameters[name].device) for name in names] for group in self.moments
        )
        steps = [self.count[self.loaded].to(parameter.device) for parameter in parameters]
        adamw(
            _rows(parameter.data for parameter in parameters),
            _rows(parameter.grad for parameter in parameters if parameter.grad is not None),
            _rows(first),
            _rows(second),
            [],
            _rows(steps),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )
        for number, name in enumerate(names):
            self.values[name].write(self.loaded, parameters[number].detach())
            self.moments[0][name].write(self.loaded, first[number])
            self.moments[1][name].write(self.loaded, second[number])
        self.count[self.loaded] += 1
        for parameter in parameters:
            parameter.grad = None
        if self.sums is not None and before is not None:
            for name, value in self.centres().items():
                self.sums[name] += (value - before[name]).sum(0, dtype=torch.float64)
        self._touch(5)

    def _touch(self, tensors: int) -> None:
        """Count the bytes of mapped files that lie in memory; beyond the budget let them go."""
        if not self.mapped:
            return
        rows = sum(value.row_bytes for value in self.values.values()) * len(self.loaded)
        self._touched += tensors * rows
        if self._touched > self.budget:
            for store in self._stores():
                store.release_memory()
            self._touched = 0.0

    @torch.no_grad()
    def sites(self) -> Weights:
        """The guide's central value of each site, of the loaded tasks."""
        return {name: value.detach() for name, value in self.guide.median(self._draw()).items()}

    def centres(self) -> Weights:
        """Those of the sites that tasks have, apart from what a step will change: (tasks, *shape)."""
        sites = self.sites()
        return {name: sites[name].clone() for name in task_sites(self.guide)}

    def _draw(self) -> TaskDraw:
        return loaded_tasks(self.loaded.to(self.model.backbone.device))

    def weights(self, index: Tensor) -> Weights:
        """θ of the tasks ``index``, rising, at the guide's centre: (tasks, layers, *shape) by name."""
        if not torch.equal(index.cpu(), self.loaded):
            self.load(index.cpu())
        return self.model.weights_given(self.sites(), self._draw())[0]

    def average_weights(self, sums: Weights) -> Weights:
        """θ of the loaded tasks with their sites at the average over all tasks, of which ``sums`` are the sums.

        Where all tasks have one prior that is the average of θ. Where each has a τ of its own it is the average in units of
        each one's own standard deviation, as the sites are; near the optimum both are Θ.
        """
        sites = self.sites()
        for name, value in sums.items():
            average = (value / self.model.num_tasks).to(sites[name])
            sites[name] = average.expand(len(self.loaded), *average.shape)
        return self.model.weights_given(sites, self._draw())[0]

    def follow_sums(self) -> None:
        """Add the sites' central values up over the tasks; steps then change the sums by what they change.

        Once an epoch, so that a fit that is taken up again sums in the same order, and rounding has no time to add up.
        """
        if self.sums is None:
            return
        self.sums.clear()
        for index in self.own.split(64):
            self.load(index)
            for name, value in self.centres().items():
                of_rows = value.sum(0, dtype=torch.float64)
                self.sums[name] = self.sums[name] + of_rows if name in self.sums else of_rows

    def keep(self) -> None:
        """Keep the present values as the best."""
        for name, store in self.best.items():
            store.copy_from(self.values[name])

    def restore(self) -> None:
        """Put the best values back."""
        for name, store in self.values.items():
            store.copy_from(self.best[name])
        self.load(self.loaded)

    def complete(self) -> None:
        """Let the guide's parameters hold the rows of all tasks, as those of any other guide do; nothing is copied."""
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name].all()
        _forget_first_run(self.guide, self.model.num_tasks)

    def tensors(self) -> dict[str, dict[str, RowTensor]]:
        """The rows by group and name: what a checkpoint keeps, with ``count``."""
        return {"parameters": self.values, "best": self.best, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}


def _rows(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [row for tensor in tensors for row in tensor.unbind(0)]


def task_sites(guide: AutoGuide) -> list[str]:
    """The sites of a guide that each task has one of."""
    nodes = guide.prototype_trace.iter_stochastic_nodes()
    return [name for name, site in nodes if any(frame.name == "tasks" for frame in site["cond_indep_stack"])]


def _task_parameters(model: BoRA, guide: AutoGuide) -> dict[str, Parameter]:
    """The guide's parameters that have a row a task: those that it reads inside the plate of tasks."""
    rows = {len(site["value"]) for name, site in guide.prototype_trace.iter_stochastic_nodes() if name in task_sites(guide)}
    draw = loaded_tasks(torch.arange(max(rows, default=1), device=model.backbone.device))
    with torch.no_grad(), poutine.seed(rng_seed=0):
        trace = poutine.trace(guide).get_trace(draw)
    inside = set()
    for node in trace.nodes.values():
        if node["type"] == "param" and any(frame.name == "tasks" for frame in node["cond_indep_stack"]):
            value = node["value"]
            inside.add(id(value.unconstrained() if hasattr(value, "unconstrained") else value))
    found = {name: parameter for name, parameter in guide.named_parameters() if id(parameter) in inside}
    if task_sites(guide) and not found:
        raise InputError(
            f"{type(guide).__name__} has no tensors of single tasks, so that its tasks cannot be drawn; "
            "use a guide with a distribution for each site, or task_subsampling=False"
        )
    return found


def _check_space(folder: Path, size: int) -> None:
    """Raise ``InputError`` where a disk has no room: what is mapped on a full one ends the process without a word."""
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(above).free
    if size > free:
        raise InputError(
            f"the tasks' state takes {size / 2**30:.1f} GiB in files, and {above} has {free / 2**30:.1f} GiB free; give a larger "
            "task_memory, or a folder on another disk"
        )


def set_up(model: BoRA, guide: AutoGuide, batch: Batch, *, all_rows: bool) -> None:
    """Run a guide for the first time, with a row for each task or one for all."""
    if guide.prototype_trace is None:
        device = model.backbone.device
        index = torch.arange(model.num_tasks, device=device) if all_rows else batch.task.unique()[:1]
        draw = TaskDraw(index, torch.ones(len(index), device=device), rows_loaded=True)
        guide(replace(batch, task=index[:1].expand(len(batch.task)), tasks=draw))


def _forget_first_run(guide: AutoGuide, rows: int) -> None:
    """Drop the values of a guide's first run, which it reads no more; only their shapes say how many rows it has."""
    for name, node in [*guide.prototype_trace.nodes.items()]:
        if node["type"] == "sample" and node["is_observed"]:
            guide.prototype_trace.remove_node(name)
        elif node["type"] == "sample" and isinstance(node["value"], Tensor) and node["cond_indep_stack"]:
            first = node["value"][:1].clone()
            node["value"] = first.expand(rows, *first.shape[1:])
