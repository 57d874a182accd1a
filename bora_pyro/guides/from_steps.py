"""Guides that are made of the steps of their own fit: a point mass while it runs, a distribution around its mean afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor


class FromSteps:
    """What a guide that is made of the steps of its fit says before the fit, and gets after it.

    A fit of such a guide keeps its learning rate (``--schedule constant``), and keeps the mean of the steps of one of its epochs,
    without the steps of the warm-up. The guide's parameters are then that mean.

    Attributes:
        columns: K, how many deviations from the running mean it gets: the newest ones.
        per_epoch: how many of them an epoch gives, at equal distances.
    """

    columns: int
    per_epoch: int

    @abstractmethod
    def begin_fit(self) -> None:
        """Be a point mass; called before the first step. A guide that was fitted before forgets its spread."""

    @abstractmethod
    def take_steps(self, variances: Mapping[str, Tensor], columns: Sequence[Mapping[str, Tensor]], number: int) -> None:
        """Get the spread of the steps around their mean. The tensors are not copied.

        Args:
            variances: the variance of each entry over the steps, by name of the guide's parameter.
            columns: K deviations of the parameters from their running mean, in any order, each by name of the parameter.
            number: how many of the columns are filled; the others are 0.
        """
