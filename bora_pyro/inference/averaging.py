"""The mean of a fit's steps (Polyak and Juditsky, 1992), with weights that grow with the step.

The state of step s has the weight w_s = s (s + 1) among the first t steps. The sum of the weights is

    W_t = t (t + 1) (t + 2) / 3,

and the mean moves by w_t / W_t = 3 / (t + 2) of the way to the newest state. Half of the weight lies on the last fifth of the
steps. So the mean forgets the start, at whatever step the fit ends (Shamir and Zhang, 2013, equation 4, with η = 2). For a guide
that is made of the steps, s counts from the end of the warm-up, and their spread around the mean is kept too (`spread`).

>>> mean = TrajectoryMean({"x": torch.tensor([0.0])})
>>> for value in (1.0, 2.0, 4.0):
...     mean.add({"x": torch.tensor([value])})
>>> mean.values["x"]  # (2 · 1 + 6 · 2 + 12 · 4) / 20
tensor([3.1000])
"""

from __future__ import annotations

from collections.abc import Collection as Names
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import Checkpoint
from bora_pyro.inference.spread import Collection, Spread
from bora_pyro.model import BoRA

#: The group of a checkpoint with the means and the numbers of steps.
GROUP = "mean"
#: In that group: the number of steps; and for a guide that is made of them, what its collection is, and the step that was kept.
COUNTS = STEPS, AFTER, COLUMNS, PER_EPOCH, BEST_STEP = ("steps", "after", "columns", "per_epoch", "best_step")
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

    Args:
        tensors: the tensors by name.
        collection: the steps that count, for a guide that is made of them; None: all steps.

    Attributes:
        values: the means by name. Before the first step they are the given tensors, which are copied.
        steps: t, the number of steps so far.
        spread: how the steps spread around the means; None without a collection.
    """

    def __init__(self, tensors: Mapping[str, Tensor], collection: Collection | None = None) -> None:
        self.values = {name: value.detach().clone() for name, value in tensors.items()}
        self.steps = 0
        self.spread = None if collection is None else Spread(self.values, collection)

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the state after one more step. A tensor that is new is taken to have had this value from the start."""
        self.steps += 1
        count = self.steps - (0 if self.spread is None else self.spread.collection.after)
        part = 3 / (count + 2) if count > 0 else 1.0
        for name, value in tensors.items():
            if name not in self.values:
                self.values[name] = value.detach().clone()
                continue
            if self.spread is not None:
                self.spread.extend(name, value.detach() - self.values[name], part)
            self.values[name].lerp_(value.detach(), part)
        if self.spread is not None:
            self.spread.take_column(self.steps, tensors, self.values)

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, Parameter], model: BoRA) -> Iterator[None]:
        """Exchange the parameters and the learned τ with their means, without a copy, while the block runs."""
        last = model.state()
        self._exchange(parameters)
        means = {name: value for name, value in self.values.items() if name.startswith(_TAU)}
        # a τ that never changed stays as it is: exp(log τ) is rounded
        means = {name: torch.where(value == last[name].log(), last[name], value.exp()) for name, value in means.items()}
        model.load_state(last | means)
        try:
            yield
        finally:
            self._exchange(parameters)
            model.load_state(last)

    def _exchange(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data

    def keep(self) -> None:
        """Store the spread of the steps so far as the best one."""
        if self.spread is not None and self.steps:
            self.spread.keep(self.steps)

    def save(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by group."""
        counts = {STEPS: self.steps}
        if self.spread is not None:
            of_guide = self.spread.collection
            counts |= {AFTER: of_guide.after, COLUMNS: of_guide.columns, PER_EPOCH: of_guide.per_epoch}
            counts[BEST_STEP] = self.spread.best_step
        means = {name: value.clone() for name, value in self.values.items()}
        groups = {} if self.spread is None else self.spread.groups()
        return {GROUP: means | {name: torch.tensor(count) for name, count in counts.items()}} | groups

    def load(self, checkpoint: Checkpoint, *, without: Names[str] = ()) -> None:
        """Restore what ``save`` returned; the shapes have been checked.

        Args:
            checkpoint: the checkpoint.
            without: names of tensors in the same groups that are not of this mean.
        """
        tensors = checkpoint.group(GROUP, without=without)
        self.steps = int(tensors[STEPS])
        if self.spread is not None:
            self.spread.collection.after, self.spread.best_step = int(tensors[AFTER]), int(tensors[BEST_STEP])
            self.spread.load({group: checkpoint.group(group, without=without) for group in self.spread.groups()})
        for name, value in tensors.items():
            if name not in COUNTS:
                self.values[name] = value.to(self.values[name].device if name in self.values else value.device)


def log_tau(model: BoRA) -> dict[str, Tensor]:
    """The logarithms of the τ that the prior learns, by the names of the model's state: their mean is the geometric one."""
    if not model.prior.every:
        return {}
    return {name: value.log() for name, value in model.state().items() if name.startswith(_TAU)}


def mean_shapes(checkpoint: Checkpoint, mean: TrajectoryMean) -> dict[str, dict[str, torch.Size]]:
    """The shapes of a checkpoint's groups for a mean, without the counts.

    Raises:
        InputError: the checkpoint has no mean of the steps, or not the spread that the mean keeps.
    """
    found = checkpoint.shapes(GROUP)
    if STEPS not in found:
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} has no mean of the steps; resume it with --average false, or start afresh with "
            "--overwrite true"
        )
    stored = checkpoint.group(GROUP, without=[name for name in found if name not in (COLUMNS, PER_EPOCH)])
    options = {name: int(value) for name, value in stored.items()}
    own = {} if mean.spread is None else {name: getattr(mean.spread.collection, name) for name in (COLUMNS, PER_EPOCH)}
    if options != own:
        what = (
            " and ".join(f"{name} {value}" for name, value in options.items()) or "none, for its guide is not made of its steps"
        )
        raise InputError(
            f"checkpoint {str(checkpoint.path)!r} has another spread of the steps ({what}); give the guide of its fit, or start "
            "afresh with --overwrite true"
        )
    groups = [] if mean.spread is None else [*mean.spread.groups()]
    return {GROUP: {name: shape for name, shape in found.items() if name not in COUNTS}} | {
        group: checkpoint.shapes(group) for group in groups
    }
