"""The plate of tasks for a batch that has documents of only some tasks."""

from __future__ import annotations

from typing import Any

import pyro

from bora_pyro.data.batch import TaskDraw


class TaskPlate(pyro.plate):
    """``pyro.plate("tasks", D, subsample=draw.index, dim=-1)`` in which each task has its own weight.

        >>> import torch
        >>> draw = TaskDraw(torch.tensor([1, 7]), torch.tensor([4.0, 2.0]))
        >>> with TaskPlate(10, draw):
        ...     x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        >>> x.shape
        torch.Size([2])

    Pyro scales the log-densities of n of D tasks by D/n, which is right if all tasks are drawn equally often. Here documents are
    drawn, and each document brings its task. A task with many documents is drawn more often, so it has a smaller weight.

    If the draw has ``rows_loaded``, parameters inside the plate have rows of the drawn tasks only, and are not subsampled.

    Args:
        num_tasks: D.
        draw: the tasks, and the factor of each task's log-density.
    """

    def __init__(self, num_tasks: int, draw: TaskDraw) -> None:
        super().__init__("tasks", num_tasks, subsample=draw.index, dim=-1)
        self.weight, self.rows_loaded = draw.weight, draw.rows_loaded

    def _process_message(self, msg: Any) -> None:
        scale = msg["scale"]
        super()._process_message(msg)
        msg["scale"] = scale * self.weight if msg["type"] == "sample" else scale
        if self.rows_loaded:  # a guide creates tensors of this size
            frame, *outer = msg["cond_indep_stack"]
            msg["cond_indep_stack"] = (frame._replace(full_size=self.subsample_size), *outer)

    def _postprocess_message(self, msg: Any) -> None:
        if not self.rows_loaded:  # otherwise a parameter already has only the drawn rows
            super()._postprocess_message(msg)
