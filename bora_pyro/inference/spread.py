"""How the steps of a fit spread around their mean (`averaging`), for guides that are made of it (`guides.from_steps`).

The variance of an entry has the weights of the mean. When step t moves the mean by the part a_t = w_t / W_t of the way to its
state x_t, whose deviation from the mean before it is d, the variance becomes (West, 1979)

    v ← (1 − a_t) (v + a_t d²).

This is Σ w_s x_s² / W_t minus the square of the mean, but no digits cancel. At some moments the deviation of the state from the
mean with this state is kept as a column (Maddox et al., 2019, section 3.2); a new column takes the place of the oldest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.inference.options import FitOptions

#: The groups of a checkpoint with the spread; those of the kept spread have the prefix ``BEST``.
VARIANCE, COLUMN, BEST = "variance", "column.{}", "best_"


@dataclass
class Collection:
    """The steps of a fit that count, and those whose deviations are kept.

        >>> collection = Collection(after=4, columns=2, per_epoch=2, steps_per_epoch=6)
        >>> [(step, collection.place(step)) for step in range(1, 19) if collection.takes(step)]
        [(6, 0), (9, 1), (12, 0), (15, 1), (18, 0)]

    Attributes:
        after: the number of steps at the start that do not count: those of the warm-up.
        columns: K, the number of columns.
        per_epoch: the number of columns that an epoch gives.
        steps_per_epoch: the number of steps of the first epoch.
    """

    after: int
    columns: int
    per_epoch: int
    steps_per_epoch: int

    def number(self, step: int) -> int:
        """How many columns the first ``step`` steps have given."""
        each = min(self.per_epoch, self.steps_per_epoch)
        return max(0, step * each // self.steps_per_epoch - self.after * each // self.steps_per_epoch)

    def takes(self, step: int) -> bool:
        """Whether the step, counted from 1, gives a column."""
        return self.number(step) > self.number(step - 1)

    def place(self, step: int) -> int:
        """The column that a step gives."""
        return (self.number(step) - 1) % self.columns

    def groups(self) -> list[str]:
        """The names of the groups of tensors."""
        return [VARIANCE, *(COLUMN.format(number) for number in range(self.columns))]


def extended(variance: Tensor, deviation: Tensor, part: Tensor | float) -> Tensor:
    """(1 − a) (v + a d²), in the memory of ``variance``.

    >>> extended(torch.tensor([0.0]), torch.tensor([2.0]), 0.25)  # three parts at 0 and one at 2
    tensor([0.7500])
    """
    return variance.add_(part * deviation.square()).mul_(1 - part)


class Spread:
    """The spread of some tensors around their mean.

    Args:
        tensors: the tensors by name.
        collection: the steps that count.

    Attributes:
        now: the spread over the steps so far, by group and name.
        best: the spread that was kept.
        best_step: the number of steps of the fit when it was kept; 0: none was.
    """

    def __init__(self, tensors: Mapping[str, Tensor], collection: Collection) -> None:
        self.collection, self.best_step = collection, 0
        self.now, self.best = (
            {group: {name: torch.zeros_like(value) for name, value in tensors.items()} for group in collection.groups()}
            for _ in range(2)
        )

    def extend(self, name: str, deviation: Tensor, part: float) -> None:
        """Add a step that deviates from the mean of the steps before it, and moves this mean by ``part`` of the way."""
        if name in self.now[VARIANCE]:
            extended(self.now[VARIANCE][name], deviation, part)

    def take_column(self, step: int, values: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """Keep the deviations of the values from their means, if the step gives a column."""
        if self.collection.takes(step):
            for name, column in self.now[COLUMN.format(self.collection.place(step))].items():
                torch.sub(values[name].detach(), means[name], out=column)

    def keep(self, step: int) -> None:
        """Store the current spread as the best one."""
        self.best_step = step
        for group, tensors in self.now.items():
            for name, value in tensors.items():
                self.best[group][name].copy_(value)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by group."""
        return self.now | {f"{BEST}{group}": tensors for group, tensors in self.best.items()}

    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what ``groups`` returned."""
        for group, tensors in self.groups().items():
            for name, value in tensors.items():
                value.copy_(groups[group][name])


def give_spread(guide: AutoGuide, spread: Spread, rows: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
    """Give a guide the spread that was kept, if one was.

    Args:
        guide: a guide that is made of its steps.
        spread: the spread of the parameters that all tasks share.
        rows: that of the parameters with a row for each task, by group and name; None: ``spread`` has all parameters.
    """
    assert isinstance(guide, FromSteps)
    if spread.best_step:
        variances, *columns = ({**tensors, **(rows or {}).get(group, {})} for group, tensors in spread.best.items())
        guide.take_steps(variances, columns, min(spread.collection.number(spread.best_step), spread.collection.columns))


def collection_of(guide: AutoGuide, options: FitOptions, steps_per_epoch: int) -> Collection | None:
    """The steps that a guide is made of; None if it is not made of its steps.

    Args:
        guide: the guide.
        options: options of the fit.
        steps_per_epoch: the number of steps of an epoch.

    Raises:
        InputError: the guide is made of the steps, and the fit does not keep their mean.
    """
    if not isinstance(guide, FromSteps):
        return None
    check_average(guide, options)
    after = round(options.warmup * steps_per_epoch * options.epochs)
    return Collection(after, guide.columns, guide.per_epoch, steps_per_epoch)


def check_average(guide: AutoGuide, options: FitOptions) -> None:
    """Check that a fit keeps the mean of the steps if its guide is made of them.

    Raises:
        InputError: it does not.
    """
    if isinstance(guide, FromSteps) and not options.average:
        raise InputError(f"average is false, but {type(guide).__name__} is the mean of the steps and their spread; leave it out")
