"""Load balancing without a loss (Wang et al., 2024, arXiv 2408.15664): a bias of each expert's choice follows its load.

>>> counting, load = Counting(), torch.zeros(3, dtype=torch.int64)
>>> counting.count(torch.tensor([[0, 1], [0, 2]]), load)  # no step of a fit runs: nothing is counted
>>> counting.on = True
>>> counting.count(torch.tensor([[0, 1], [0, 2]]), load)
>>> load.tolist(), next_bias(torch.zeros(3), load, rate=0.5).tolist()
([2, 1, 1], [-0.5, 0.5, 0.5])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bora_pyro.backbone.fit_hooks import FitHooks
from bora_pyro.errors import InputError

#: Names of an adapter's buffers: the bias b, (experts,), and how many tokens were given to each expert, (experts,) int64.
BIAS, LOAD = "gate_bias", "load"


class Counting:
    """Counts the tokens of each expert while the passes of a step run, and at no other time.

    Validation, the gradients that teach τ, and predictions run the same layers; what they read is no load.

    Attributes:
        on: whether the passes of a step run.
    """

    on: bool = False

    def count(self, chosen: Tensor, load: Tensor) -> None:
        """Add the experts that some tokens were given to.

        Args:
            chosen: numbers of experts, int64, in any shape.
            load: (experts,) int64; it changes in place, which needs no synchronisation with an accelerator.
        """
        if self.on and torch.is_grad_enabled():
            load.index_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())


def next_bias(bias: Tensor, count: Tensor, *, rate: float) -> Tensor:
    """b + u sign(mean count − count): an expert with fewer tokens than the mean becomes more likely.

    Args:
        bias: b, (..., experts).
        count: tokens of each expert in a step, (..., experts) int64.
        rate: u.
    """
    # in whole numbers: Σ count and experts x count instead of the mean
    sign = torch.sign(count.sum(-1, keepdim=True) - count.shape[-1] * count)
    return bias + rate * sign.to(bias)


class LoadBalance(FitHooks):
    """Moves the bias of every layer after each step's passes by the load of that step.

    The buffer ``load`` has the tokens of the epoch so far. After each epoch the metric ``load_variation`` is the coefficient of
    variation of the load over the experts of a layer, on average over the layers: 0 if all have the same load.

    All tokens of a batch count, also the padding of shorter documents, which a layer cannot tell from other tokens. Batches are
    made of documents of similar length, so that it is little. Where a layer is computed again in the backward pass (gradient
    checkpointing) its tokens count twice, which changes neither the sign nor the coefficient of variation.

    Args:
        counting: the switch that the adapter looks at.
        rate: u, how far a bias moves in a step.

    Raises:
        InputError: the adapted layers lie on several devices, to which the buffers would be copied.
    """

    name = "load_balance"

    def __init__(self, counting: Counting, rate: float) -> None:
        self.counting, self.rate = counting, rate
        #: The epoch that the load is of, and the load before the passes of the step.
        self.epoch, self.before = -1, dict[str, Tensor]()

    def begin(self, model: Any, data: Any) -> None:
        device = model.backbone.device
        for slot in model.backbone.slots:
            for path in slot.paths:
                found = model.backbone.model.get_submodule(path).weight.device
                if found.type != "meta" and found != device:
                    raise InputError(
                        f"the load of experts cannot be counted where layers lie on several devices ({path} on {found}, the "
                        f"embedding on {device}); leave device_map out, or give the adapter balance=0"
                    )

    def before_passes(self, loop: Any) -> None:
        loads = dict(_loads(loop.model))
        if loop.epoch != self.epoch:
            self.epoch = loop.epoch
            for load in loads.values():
                load.zero_()
        self.before = {name: load.clone() for name, load in loads.items()}
        self.counting.on = True

    @torch.no_grad()
    def before_step(self, loop: Any) -> None:
        self.counting.on = False
        for name, load in _loads(loop.model):
            count = loop.processes.all_reduce(load - self.before[name])
            load.copy_(self.before[name] + count)
            bias = loop.model.tensors.buffers[name.removesuffix(LOAD) + BIAS]
            bias.copy_(next_bias(bias, count, rate=self.rate))

    def after_epoch(self, loop: Any) -> None:
        found = torch.cat([variation(load) for _, load in _loads(loop.model)])
        loop.report["load_variation"] = float(found.nanmean())

    def state(self) -> dict[str, Tensor]:
        return {"epoch": torch.tensor(self.epoch)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.epoch = int(state["epoch"])


def variation(load: Tensor) -> Tensor:
    """The coefficient of variation of a load over the experts: (...,) float64, nan without any token.

    >>> variation(torch.tensor([[4, 4], [8, 0]])).tolist()
    [0.0, 1.0]

    Args:
        load: (..., experts).
    """
    load = load.double().cpu()
    return load.std(-1, correction=0) / load.mean(-1)


def _loads(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The loads of each kind of layer, (layers, experts), by the name of the buffer."""
    return ((name, value) for name, value in model.tensors.buffers.items() if name.rpartition(".")[-1] == LOAD)
