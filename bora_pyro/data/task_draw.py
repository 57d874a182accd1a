"""Which tasks a batch speaks of, where there are too many to hold the adapters of all in every step.

>>> draw = TaskDraw(torch.tensor([3, 8]), torch.tensor([10.0, 5.0]))
>>> draw.positions(torch.tensor([8, 3, 8]))
tensor([1, 0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskDraw:
    """Some of the tasks, and how often each one's prior counts for them.

    Attributes:
        index: (tasks,) int64, rising: the tasks.
        weight: (tasks,) float32: the factor of each one's log-prior. With S steps in an epoch, m_d of them with task d, S/m_d
            makes their average the log-prior of all tasks.
        held: whether the guide's tensors have a row for each of these tasks alone, and not one for each task of the model.
    """

    index: Tensor
    weight: Tensor
    held: bool = False

    def positions(self, task: Tensor) -> Tensor:
        """Where the tasks ``task`` (rows,) stand in ``index``; they must be there."""
        return torch.searchsorted(self.index, task)

    def widened(self, index: Tensor) -> TaskDraw:
        """The same among more tasks, ``index``, rising; those that were not drawn weigh nothing."""
        weight = self.weight.new_zeros(len(index))
        weight[torch.searchsorted(index, self.index)] = self.weight
        return replace(self, index=index, weight=weight)

    def to(self, device: torch.device | str) -> TaskDraw:
        """The same on another device."""
        return replace(self, index=self.index.to(device), weight=self.weight.to(device))


def looked_at(index: Tensor) -> TaskDraw:
    """The tasks ``index`` as held rows, each with weight 1: to look at their adapters, not to train them."""
    return TaskDraw(index, torch.ones(len(index), device=index.device), held=True)
