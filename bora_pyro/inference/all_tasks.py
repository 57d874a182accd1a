"""The state of a fit whose steps change the adapters of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.data.batch import Batch
from bora_pyro.inference.averaging import TrajectoryMean, log_tau, mean_shapes
from bora_pyro.inference.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors
from bora_pyro.inference.optimizer import (
    GROUP,
    Rates,
    deviation_parameters,
    group_parameters,
    optimizer_of,
    precisions,
    rescale,
    take_step,
)
from bora_pyro.inference.processes import Processes
from bora_pyro.inference.spread import Collection, give_spread
from bora_pyro.inference.state import MODEL, check_kind, check_model_state, check_shapes, shapes
from bora_pyro.model import BoRA, Weights


class AllTasks:
    """The state of a fit whose steps change the adapters of all tasks: one optimiser of all parameters of the guide.

    Args:
        model: the BoRA model.
        guide: the guide after its first run.
        average: keep the mean of all steps.
        own_rate: whether whitened deviations have a learning rate of their own.
        collection: the steps that a guide is made of.
    """

    def __init__(
        self,
        model: BoRA,
        guide: AutoGuide,
        *,
        average: bool = True,
        own_rate: bool = True,
        collection: Collection | None = None,
    ) -> None:
        self.model, self.guide = model, guide
        self.parameters = dict(guide.named_parameters())
        self.shared: list[Parameter] = [*self.parameters.values()]
        self.own: list[Parameter] = []
        self.latent_of = deviation_parameters(guide) if own_rate else {}
        self.group_of = {name: GROUP + latent for name, latent in group_parameters(guide).items()} if own_rate else {}
        self.optimizer = optimizer_of(guide, self.parameters, self.latent_of, self.group_of)
        self.mean = TrajectoryMean(self.parameters, collection) if average else None
        self.best: dict[str, Tensor] = {}

    def begin_epoch(self) -> None:
        """Nothing to prepare."""

    def begin(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def step(self, rates: Rates) -> None:
        whitened = {**self.latent_of, **self.group_of}
        tau = precisions(self.model.prior, self.model.starts, whitened.values())
        take_step(self.optimizer, rates, {self.parameters[name]: tau[key] for name, key in whitened.items()})
        if self.mean is not None:
            self.mean.add({**self.parameters, **log_tau(self.model)})

    def rescale(self, factors: Weights) -> None:
        whitened = {**self.latent_of, **self.group_of}
        rescale(self.optimizer, ((self.parameters[name], factors[key]) for name, key in whitened.items()))

    def averaged(self) -> AbstractContextManager[None]:
        assert self.mean is not None
        return self.mean.in_place_of(self.parameters, self.model)

    def sites(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.guide.median().items()}

    def adapters(self) -> Weights:
        return self.model.weights_given(self.sites())[0]

    def global_mean(self) -> Weights:
        _, mean = self.model.weights_given(self.sites())
        return {name: value.expand(self.model.num_tasks, *value.shape) for name, value in mean.items()}

    def totals(self, processes: Processes) -> Weights:
        return {}

    def view(self, batch: Batch, totals: Weights) -> tuple[Batch, Weights, Weights]:
        theta = self.adapters()
        return batch, theta, self.model.prior.average(self.sites(), theta)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()} | self.model.state()

    def keep(self) -> None:
        self.best = self._copy()
        if self.mean is not None:
            self.mean.keep()

    def restore(self) -> None:
        self._put(self.best)
        if self.mean is not None and self.mean.spread is not None:
            give_spread(self.guide, self.mean.spread)

    def _put(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(state[name])
        self.model.load_state({name: value for name, value in state.items() if name.startswith(MODEL)})

    def complete(self, processes: Processes) -> None:
        """The guide always holds all tasks."""

    def save(self, processes: Processes) -> dict[str, dict[str, Tensor]]:
        groups = {"parameters": self._copy(), "optimizer": optimizer_tensors(self.optimizer), "best": self.best}
        return groups | ({} if self.mean is None else self.mean.save())

    def load(self, checkpoint: Checkpoint, processes: Processes) -> None:
        check_kind(checkpoint, drawn=False)
        parameters, best = checkpoint.group("parameters"), checkpoint.group("best")
        found = [shapes(parameters), shapes(best)]
        if self.mean is not None:
            found += mean_shapes(checkpoint, self.mean).values()
        check_shapes(checkpoint, [shapes(self.parameters)] * len(found), found)
        check_model_state(checkpoint, self.model, parameters, best)
        self._put(parameters)
        load_optimizer_tensors(self.optimizer, checkpoint.group("optimizer"))
        if self.mean is not None:
            self.mean.load(checkpoint)
        self.best = best
