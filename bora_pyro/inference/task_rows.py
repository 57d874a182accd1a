"""The parameters and moments of each task, for fits whose steps load only the tasks that they draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from bora_pyro.data.batch import Batch, TaskDraw, loaded_tasks
from bora_pyro.errors import InputError
from bora_pyro.files.row_file import RowTensor, check_space
from bora_pyro.guides.base import parameters_of_tasks, task_sites
from bora_pyro.guides.ivon import IvonGuide
from bora_pyro.inference.ivon import natural_step, scale_of, settings_of
from bora_pyro.inference.optimizer import BETAS, DEVIATION_BETAS, EPS, Rates, deviation_parameters, variance
from bora_pyro.inference.row_means import RowMeans, copies_of
from bora_pyro.inference.spread import Collection
from bora_pyro.model import BoRA, Weights

#: With more tasks than this, a step changes only the tasks of its documents by default.
MANY_TASKS = 64


class TaskRows:
    """The guide's tensors of each task and AdamW's moments, one row per task. A step loads the rows that it needs.

    A row's moments and its number of steps change only in steps that draw the row, as in ``torch.optim.SparseAdam``. In contrast
    to it, each row has its own bias correction. Between steps the guide's parameters hold the rows that were loaded last.

    The means of the rows over the steps of the fit (`row_means`) are brought up to date when a step changes a row, and before
    they are read.

    Args:
        model: the BoRA model.
        guide: the guide after its first run. Its parameters have one row for each task, or one row that all tasks start with.
        own: the tasks of this process, in ascending order.
        budget: bytes of memory for the rows. If they need more, they lie in memory-mapped files.
        folder: folder of these files.
        keep_sums: keep the sums of the sites' central values over tasks up to date.
        average: keep the mean of each row over the steps.
        own_rate: whether whitened deviations have a learning rate of their own.
        collection: the steps that a guide is made of.

    Raises:
        InputError: the guide has no tensors of single tasks, or the disk of ``folder`` is too full.
    """

    def __init__(
        self,
        model: BoRA,
        guide: AutoGuide,
        *,
        own: Tensor,
        budget: float,
        folder: Path,
        keep_sums: bool = False,
        average: bool = True,
        own_rate: bool = True,
        collection: Collection | None = None,
    ) -> None:
        self.model, self.guide, self.own, self.budget = model, guide, own, budget
        self.parameters = _task_parameters(model, guide)
        row_bytes = sum(value[0].numel() * value.element_size() for value in self.parameters.values())
        tasks, stores = model.num_tasks, copies_of(average, collection)
        self.mapped = stores * row_bytes * tasks > budget
        place = folder if self.mapped else None
        if self.mapped:
            check_space(folder, stores * row_bytes * tasks)
        self.values = {name: RowTensor(value, tasks, folder=place) for name, value in self.parameters.items()}
        self.best = {name: RowTensor(value, tasks, folder=place) for name, value in self.parameters.items()}
        zeros = {name: torch.zeros_like(value[:1]) for name, value in self.parameters.items()}
        self.moments = [{name: RowTensor(zero, tasks, folder=place) for name, zero in zeros.items()} for _ in BETAS]
        self.means = RowMeans(zeros, tasks, folder=place, collection=collection) if average else None
        self.latent_of = deviation_parameters(guide) if own_rate else {}
        self.scale_of = {name: scale for name, scale in scale_of(guide).items() if name in self.parameters}
        #: By latent: the stored moments are multiples of this factor and its square, which change with τ for all rows at once.
        self.units: dict[str, Tensor] = {}
        #: The number of steps of each row, and that of the fit.
        self.count, self.steps = torch.zeros(tasks), 0
        #: The weight of the prior of each loaded task in the step that was begun last.
        self.weight = torch.ones(1)
        _drop_first_run(guide, 1)
        self._bytes_mapped, self.loaded = 0.0, own[:1]
        self.load(self.loaded)
        self.sums: Weights | None = {} if keep_sums else None

    def _stores(self) -> Iterator[RowTensor]:
        for group in (self.values, self.best, *self.moments):
            yield from group.values()
        if self.means is not None:
            yield from self.means.stores()

    def load(self, index: Tensor) -> None:
        """Copy the rows of the tasks ``index``, in ascending order, into the guide's parameters."""
        self.loaded, device = index.cpu(), self.model.backbone.device
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.data = self.values[name].read(self.loaded).to(device)
        self._limit_mapped(1)

    def begin(self, batches: Sequence[Batch]) -> list[Batch]:
        """Load the tasks of all batches, and return the batches, each with all loaded tasks."""
        draws = [batch.tasks for batch in batches if batch.tasks is not None]
        if not draws:
            return []
        self.load(torch.cat([draw.index for draw in draws]).unique())
        found = [
            replace(batch, tasks=replace(batch.tasks.widened(self.loaded), rows_loaded=True)) for batch in batches if batch.tasks
        ]
        self.weight = torch.stack([batch.tasks.weight * batch.share for batch in found if batch.tasks]).sum(0)
        return found

    @torch.no_grad()
    def step(self, rates: Rates) -> None:
        """Take the optimiser's step on the loaded rows that have gradients, and add their new values to their means."""
        self.steps += 1
        self._step(rates)
        if self.means is not None and self.means.collection is not None and self.means.collection.takes(self.steps):
            for index in self.own.split(64):
                rows = {name: store.read(index).to(self.model.backbone.device) for name, store in self.values.items()}
                self.means.extend(index, rows, self.steps)
                self.means.take_column(index, rows, self.steps)
                self._limit_mapped(5, len(index))

    def _step(self, rates: Rates) -> None:
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if not names:
            return
        before = None if self.sums is None else self.centres()
        self._extend_means(self.loaded, self.steps - 1)
        if isinstance(self.guide, IvonGuide):
            self._natural_steps(self.guide, rates)
        else:
            self._adamw_steps(names, rates)
        self.count[self.loaded] += 1
        self._extend_means(self.loaded, self.steps)
        for name in names:
            self.parameters[name].grad = None
        if self.sums is not None and before is not None:
            for name, value in self.centres().items():
                self.sums[name] += (value - before[name]).sum(0, dtype=torch.float64)
        self._limit_mapped(7)

    def _natural_steps(self, guide: IvonGuide, rates: Rates) -> None:
        steps = self.count[self.loaded] + 1
        for name, scale in self.scale_of.items():
            loc, log_scale = self.parameters[name], self.parameters[scale]
            assert loc.grad is not None and log_scale.grad is not None
            first, second = self._moments(name)
            of_row = (-1, *[1] * (loc.dim() - 1))
            factor, step = ((value.to(loc)).view(of_row) for value in (rates.nats / self.weight, steps))
            gradients = (loc.grad, log_scale.grad)
            natural_step(loc.data, log_scale.data, first, step, factor=factor, gradients=gradients, **settings_of(rates, guide))
            self._write(name, first, second)
            self.values[scale].write(self.loaded, log_scale.detach())

    def _adamw_steps(self, names: Sequence[str], rates: Rates) -> None:
        moments = {name: self._moments(name) for name in self.latent_of}
        limited = rates.of_deviations(self._noise(moments.values()))
        for name in names:
            if name in self.latent_of:
                own = rates.entries(limited, self._tau(name), self.parameters[name].dim())
                self._step_of(name, limited.tolist(), *moments.pop(name), part=own / limited.view(-1, *[1] * (own.dim() - 1)))
            else:
                self._step_of(name, [rates.part * rates.shared] * len(self.loaded), *self._moments(name))

    def _tau(self, name: str) -> Tensor:
        """τ of a whitened deviation, which broadcasts against its loaded rows."""
        latent = self.latent_of[name]
        tau = self.model.prior.precision(latent, self.model.starts[latent])
        of_task = tau.dim() == self.parameters[name].dim() and len(tau) > 1
        return tau[self.loaded.to(tau.device)] if of_task else tau

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        """AdamW's moments of the loaded rows of a parameter: (loaded, ...) each, on its device."""
        device, unit = self.parameters[name].device, self._unit(name)
        first, second = (group[name].read(self.loaded).to(device) for group in self.moments)
        return (first, second) if unit is None else (first * unit, second * unit.square())

    def _noise(self, moments: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The variance of each loaded task's gradient over the steps, drawn or not, summed over all deviations: (loaded,)."""
        steps = self.count[self.loaded].to(self.model.backbone.device)
        noise = torch.zeros_like(steps)
        for first, second in moments:
            noise += variance(first, second, steps.clamp(min=1))
        return noise * steps / max(self.steps - 1, 1)  # times the part of the earlier steps that drew the task

    def _step_of(self, name: str, rates: Sequence[float], first: Tensor, second: Tensor, *, part: Tensor | None = None) -> None:
        """Take AdamW's step on the loaded rows of a parameter, each with its own rate; entries go the given part of the way."""
        parameter = self.parameters[name]
        before = parameter.detach().clone() if part is not None and float(part.min()) < 1 else None
        beta1, beta2 = DEVIATION_BETAS if name in self.latent_of else BETAS
        assert parameter.grad is not None
        steps = self.count[self.loaded].to(parameter.device)
        for rate in dict.fromkeys(rates):
            rows = [row for row, own in enumerate(rates) if own == rate]
            values, gradients, firsts, seconds, counts = (
                [value[row] for row in rows] for value in (parameter.data, parameter.grad, first, second, steps)
            )
            adamw(
                values, gradients, firsts, seconds, [], counts, lr=rate, beta1=beta1, beta2=beta2, eps=EPS, weight_decay=0.0,
                amsgrad=False, maximize=False, fused=True,
            )  # fmt: skip
        if before is not None and part is not None:
            parameter.data = before.lerp(parameter.data, part.expand_as(before))
        self._write(name, first, second)

    def _write(self, name: str, first: Tensor, second: Tensor) -> None:
        """Store the loaded rows of a parameter, and their moments."""
        unit = self._unit(name)
        self.values[name].write(self.loaded, self.parameters[name].detach())
        self.moments[0][name].write(self.loaded, first if unit is None else first / unit)
        self.moments[1][name].write(self.loaded, second if unit is None else second / unit.square())

    def _unit(self, name: str) -> Tensor | None:
        """The factor of the stored moments of a parameter, which broadcasts against the loaded rows; None if τ never changed."""
        unit = self.units.get(self.latent_of.get(name, ""))
        if unit is None or unit.dim() < self.parameters[name].dim():
            return unit
        return unit[self.loaded.to(unit.device)]  # each task has its own τ

    def rescale(self, factors: Weights) -> None:
        """Multiply AdamW's first moments of the whitened deviations by these factors, and the second ones by their squares."""
        for latent in self.latent_of.values():
            self.units[latent] = self.units[latent] * factors[latent] if latent in self.units else factors[latent]

    def _extend_means(self, index: Tensor, steps: int) -> None:
        """Bring the means of the rows ``index``, which are loaded, up to the step ``steps``."""
        if self.means is not None:
            self.means.extend(index, self.parameters, steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the values of the rows are their means; no row changes in it."""
        for index in self.own.split(64):
            self.load(index)
            self._extend_means(index, self.steps)
            self._limit_mapped(2)
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        assert self.means is not None
        self.values, self.means.values = self.means.values, self.values
        self.load(self.loaded)

    def _limit_mapped(self, accesses: int, rows_accessed: int | None = None) -> None:
        """Count the bytes of mapped files that were read or written, and free their memory when they exceed the budget.

        Args:
            accesses: how often the rows were read or written.
            rows_accessed: the number of rows; default: that of the loaded ones.
        """
        if not self.mapped:
            return
        rows = sum(value.row_bytes for value in self.values.values()) * (rows_accessed or len(self.loaded))
        self._bytes_mapped += accesses * rows
        if self._bytes_mapped > self.budget:
            for store in self._stores():
                store.release_memory()
            self._bytes_mapped = 0.0

    @torch.no_grad()
    def sites(self) -> Weights:
        """The guide's central value of each site, for the loaded tasks."""
        return {name: value.detach() for name, value in self.guide.median(self._draw()).items()}

    def centres(self) -> Weights:
        """Copies of the central values of the sites inside the plate of tasks: (tasks, *shape)."""
        sites = self.sites()
        return {name: sites[name].clone() for name in task_sites(self.guide)}

    def _draw(self) -> TaskDraw:
        return loaded_tasks(self.loaded.to(self.model.backbone.device))

    def weights(self, index: Tensor) -> Weights:
        """θ of the tasks ``index``, in ascending order, at the guide's centre: (tasks, layers, *shape) by name."""
        if not torch.equal(index.cpu(), self.loaded):
            self.load(index.cpu())
        return self.model.weights_given(self.sites(), self._draw())[0]

    def global_mean(self, index: Tensor) -> Weights:
        """Θ once for each of the tasks ``index``: (tasks, layers, *shape) by name. It must be the same for any tasks."""
        _, mean = self.model.weights_given(self.sites(), self._draw())
        return {name: value.expand(len(index), *value.shape) for name, value in mean.items()}

    def average_weights(self, sums: Weights) -> Weights:
        """θ of the loaded tasks if their sites had the average values over all tasks.

        If all tasks have the same prior, this is the average of θ. If each task has its own τ, the sites are in units of the
        task's own standard deviation, and so is the average. Near the optimum both averages are Θ.

        Args:
            sums: sums of the sites' central values over all tasks.
        """
        sites = self.sites()
        for name, value in sums.items():
            average = (value / self.model.num_tasks).to(sites[name])
            sites[name] = average.expand(len(self.loaded), *average.shape)
        return self.model.weights_given(sites, self._draw())[0]

    def follow_sums(self) -> None:
        """Compute the sums of the sites' central values over the tasks. Later steps add their changes to these sums.

        It runs once per epoch. A resumed fit then sums in the same order, and rounding errors do not accumulate over epochs.
        """
        if self.sums is None:
            return
        self.sums.clear()
        for index in self.own.split(64):
            self.load(index)
            for name, value in self.centres().items():
                row_sum = value.sum(0, dtype=torch.float64)
                self.sums[name] = self.sums[name] + row_sum if name in self.sums else row_sum

    def keep(self) -> None:
        """Store the current values as the best ones."""
        for name, store in self.best.items():
            store.copy_from(self.values[name])
        if self.means is not None:
            self.means.keep()

    def restore(self) -> None:
        """Restore the best values."""
        for name, store in self.values.items():
            store.copy_from(self.best[name])
        self.load(self.loaded)

    def complete(self) -> None:
        """Make the guide's parameters hold the rows of all tasks, without a copy."""
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name].all()
        _drop_first_run(self.guide, self.model.num_tasks)

    def tensors(self) -> dict[str, dict[str, RowTensor]]:
        """The rows by group and name, for a checkpoint; a checkpoint also needs ``counts`` and ``units``."""
        rows = {"parameters": self.values, "best": self.best, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}
        return rows | ({} if self.means is None else self.means.groups())

    def counts(self) -> dict[str, Tensor]:
        """The numbers of steps of each task of this process; 0 for the tasks of other processes."""
        return {"steps": self.count} | ({} if self.means is None else {"mean": self.means.steps})

    def load_counts(self, counts: Mapping[str, Tensor], units: Mapping[str, Tensor], steps: int) -> None:
        """Restore the numbers of steps of this process's tasks, and the units of the moments.

        Args:
            counts: what ``counts`` returned, summed over processes.
            units: the units by latent.
            steps: the number of steps of the fit.
        """
        for name, value in self.counts().items():
            value.zero_()
            value[self.own] = counts.get(name, value)[self.own]
        self.units, self.steps = {name: value.to(self.model.backbone.device) for name, value in units.items()}, steps


def _task_parameters(model: BoRA, guide: AutoGuide) -> dict[str, Parameter]:
    """The guide's parameters with one row per task: those that it reads inside the plate of tasks."""
    rows = {len(site["value"]) for name, site in guide.prototype_trace.iter_stochastic_nodes() if name in task_sites(guide)}
    draw = loaded_tasks(torch.arange(max(rows, default=1), device=model.backbone.device))
    inside = {id(parameter) for parameter in parameters_of_tasks(guide, draw)}
    found = {name: parameter for name, parameter in guide.named_parameters() if id(parameter) in inside}
    if task_sites(guide) and not found:
        raise InputError(
            f"{type(guide).__name__} has no tensors of single tasks, so a step cannot draw tasks; "
            "use a guide with a distribution for each site, or task_subsampling=False"
        )
    return found


def _drop_first_run(guide: AutoGuide, rows: int) -> None:
    """Drop the values of a guide's first run, which are not needed any more; their shapes get ``rows`` rows."""
    for name, node in [*guide.prototype_trace.nodes.items()]:
        if node["type"] == "sample" and node["is_observed"]:
            guide.prototype_trace.remove_node(name)
        elif node["type"] == "sample" and isinstance(node["value"], Tensor) and node["cond_indep_stack"]:
            first = node["value"][:1].clone()
            node["value"] = first.expand(rows, *first.shape[1:])
