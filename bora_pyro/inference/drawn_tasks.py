"""The state of a fit whose steps change Θ and only the adapters of the tasks that they draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.files.row_file import RowTensor
from bora_pyro.inference.averaging import STEPS, TrajectoryMean, log_tau, mean_shapes
from bora_pyro.inference.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors
from bora_pyro.inference.optimizer import GROUP, Rates, group_parameters, optimizer_of, precisions, rescale, take_step
from bora_pyro.inference.processes import Processes
from bora_pyro.inference.spread import give_spread
from bora_pyro.inference.state import MODEL, check_kind, check_model_state, check_shapes
from bora_pyro.inference.task_rows import TaskRows
from bora_pyro.model import Weights


class DrawnTasks:
    """The state of a fit whose steps change Θ and only the adapters of the tasks that they draw.

    Args:
        rows: the adapters of the tasks, with the model and the guide.
    """

    def __init__(self, rows: TaskRows) -> None:
        self.rows, self.model, self.guide = rows, rows.model, rows.guide
        task_parameters = {id(parameter) for parameter in self.rows.parameters.values()}
        self.of_all = {name: value for name, value in self.guide.named_parameters() if id(value) not in task_parameters}
        self.shared, self.own = [*self.of_all.values()], [*self.rows.parameters.values()]
        own_rate = bool(rows.latent_of)
        self.group_of = {name: GROUP + latent for name, latent in group_parameters(self.guide).items()} if own_rate else {}
        self.optimizer = optimizer_of(self.guide, self.of_all, (), self.group_of) if self.shared else None
        self.mean = None if rows.means is None else TrajectoryMean(self.of_all, rows.means.collection)
        self.best: dict[str, Tensor] = {}

    def begin_epoch(self) -> None:
        self.rows.follow_sums()

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return self.rows.begin(batches)

    def step(self, rates: Rates) -> None:
        if self.optimizer is not None:
            tau = precisions(self.model.prior, self.model.starts, self.group_of.values())
            take_step(self.optimizer, rates, {self.of_all[name]: tau[key] for name, key in self.group_of.items()})
        if self.mean is not None:
            self.mean.add({**self.of_all, **log_tau(self.model)})
        self.rows.step(rates)

    def rescale(self, factors: Weights) -> None:
        self.rows.rescale(factors)
        if self.optimizer is not None:
            rescale(self.optimizer, ((self.of_all[name], factors[key]) for name, key in self.group_of.items()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self.mean is not None
        with self.mean.in_place_of(self.of_all, self.model), self.rows.averaged():
            yield

    def sites(self) -> dict[str, Tensor]:
        return self.rows.sites()

    def adapters(self) -> Callable[[Tensor], Weights]:
        return self.rows.weights

    def global_mean(self) -> Callable[[Tensor], Weights]:
        return self.rows.global_mean

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
        if self.mean is not None:
            self.mean.keep()

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
        spread = None if self.mean is None else self.mean.spread
        best = self.rows.means.best if self.rows.means is not None and spread is not None and spread.best_step else {}
        for store in (store for group in best.values() for store in group.values()):
            processes.gather_rows(store, self.rows.own)
        if processes.rank:
            return
        self.rows.complete()
        if spread is not None and best:
            rows = {group: {name: store.all() for name, store in stores.items()} for group, stores in best.items()}
            give_spread(self.guide, spread, rows)

    def save(self, processes: Processes) -> dict[str, dict[str, Tensor | RowTensor]]:
        rows = self.rows.tensors()
        for group in rows.values():
            for store in group.values():
                processes.gather_rows(store, self.rows.own)
        count = {name: processes.all_reduce(value.clone()) for name, value in self.rows.counts().items()}
        sums = {name: processes.all_reduce(value.clone()) for name, value in (self.rows.sums or {}).items()}
        if processes.rank:
            return {}
        groups: dict[str, dict[str, Tensor | RowTensor]] = {name: {**group} for name, group in rows.items()}
        groups["parameters"] |= self._copy()
        groups["best"] |= self.best
        groups["optimizer"] = {**optimizer_tensors(self.optimizer)} if self.optimizer is not None else {}
        for name, tensors in ({} if self.mean is None else self.mean.save()).items():
            groups[name] |= tensors
        groups["count"], groups["sums"], groups["units"] = {**count}, {**sums}, {**self.rows.units}
        groups["units"] |= {STEPS: torch.tensor(self.rows.steps)}
        return groups

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        check_kind(checkpoint, drawn=True)
        tasks = self.model.num_tasks
        shapes = {name: value.shape for name, value in self.of_all.items()}
        shapes |= {name: torch.Size((tasks, *value.shape[1:])) for name, value in self.rows.parameters.items()}
        groups = self.rows.tensors()
        row_shapes = {name: torch.Size((tasks, *value.shape[1:])) for name, value in self.rows.parameters.items()}
        expected = {"parameters": shapes, "best": shapes, "exp_avg": row_shapes, "exp_avg_sq": row_shapes}
        found = {group: checkpoint.shapes(group) for group in expected}
        if self.mean is not None:
            of_mean = mean_shapes(checkpoint, self.mean)
            expected |= dict.fromkeys(of_mean, shapes)
            found |= of_mean
        check_shapes(checkpoint, [*expected.values()], [*found.values()])
        for group, stores in groups.items():
            for name, store in stores.items():
                for index in self.rows.own.split(64):
                    store.write(index, checkpoint.rows(group, name, index))
                store.release_memory()
        self.rows.load(self.rows.own[:1])
        parameters, self.best = (checkpoint.group(group, without=[*row_shapes]) for group in ("parameters", "best"))
        check_model_state(checkpoint, self.model, parameters, self.best)
        self._put(parameters)
        if self.mean is not None:
            self.mean.load(checkpoint, without=[*row_shapes])
        units = checkpoint.group("units")
        self.rows.load_counts(checkpoint.group("count"), units, steps=int(units.pop(STEPS)))
        if self.rows.sums is not None:
            # rank 0 gets the sums over all tasks and the others 0, because only the sum over processes is used
            device, factor = self.model.backbone.device, float(processes.rank == 0)
            self.rows.sums |= {name: factor * value.to(device) for name, value in checkpoint.group("sums").items()}
        if self.optimizer is not None:
            load_optimizer_tensors(self.optimizer, checkpoint.group("optimizer"))
