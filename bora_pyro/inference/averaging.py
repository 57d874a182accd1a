"""The mean of a fit's steps (Polyak and Juditsky, 1992), with weights that grow with the step.

The state of step s has the weight w_s = s (s + 1) among the first t steps. The sum of the weights is

    W_t = t (t + 1) (t + 2) / 3,

and the mean moves by w_t / W_t = 3 / (t + 2) of the way to the newest state. Half of the weight lies on the last fifth of the
steps. So the mean forgets the start, at whatever step the fit ends (Shamir and Zhang, 2013, equation 4, with η = 2).

>>> mean = TrajectoryMean({"x": torch.tensor([0.0])})
>>> for value in (1.0, 2.0, 4.0):
...     mean.add({"x": torch.tensor([value])})
>>> mean.values["x"]  # (2 · 1 + 6 · 2 + 12 · 4) / 20
tensor([3.1000])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import Checkpoint
from bora_pyro.model import BoRA

#: The group of a checkpoint with the means and the number of steps.
GROUP = "mean"
STEPS = "steps"
_TAU = "prior/tau."


def weight_sum(steps: Tensor | int) -> Tensor:
    """W_t of the first t steps, float64; exact up to a million steps.

    >>> weight_sum(torch.tensor([0, 1, 2]))
    tensor([0., 2., 8.], dtype=torch.float64)
    """
    t = torch.as_tensor(steps, dtype=torch.float64)
    return t * (t + 1) * (t + 2) / 3


class TrajectoryMean:
    """The mean of some tensors over the steps of a fit.

    Attributes:
        values: the means by name. Before the first step they are the given tensors, which are copied.
        steps: t, the number of steps so far.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.values = {name: value.detach().clone() for name, value in tensors.items()}
        self.steps = 0

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the state after one more step. A tensor that is new is taken to have had this value from the start."""
        self.steps += 1
        for name, value in tensors.items():
            if name in self.values:
                self.values[name].lerp_(value.detach(), 3 / (self.steps + 2))
            else:
                self.values[name] = value.detach().clone()

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, Parameter], model: BoRA) -> Iterator[None]:
        """Exchange the parameters and the learned τ with their means, without a copy, while the block runs."""
        last = model.state()
        self._exchange(parameters)
        model.load_state(last | {name: value.exp() for name, value in self.values.items() if name.startswith(_TAU)})
        try:
            yield
        finally:
            self._exchange(parameters)
            model.load_state(last)

    def _exchange(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data

    def save(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint's group ``GROUP``."""
        return {name: value.clone() for name, value in self.values.items()} | {STEPS: torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``save`` returned; the shapes have been checked."""
        for name, value in tensors.items():
            if name != STEPS:
                self.values[name] = value.to(self.values[name].device if name in self.values else value.device)
        self.steps = int(tensors[STEPS])


def log_tau(model: BoRA) -> dict[str, Tensor]:
    """The logarithms of the τ that the prior learns, by the names of the model's state: their mean is the geometric one."""
    if not model.prior.every:
        return {}
    return {name: value.log() for name, value in model.state().items() if name.startswith(_TAU)}


def check_has_mean(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has the mean of the steps.

    Raises:
        InputError: it has none.
    """
    if STEPS not in checkpoint.shapes(GROUP):
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} has no mean of the steps; resume it with --average false, or start afresh with "
            "--overwrite true"
        )
