"""The plate of tasks where a batch speaks of some of them only."""

from __future__ import annotations

from typing import Any

import pyro

from bora_pyro.data.batch import TaskDraw


class TaskPlate(pyro.plate):
    """``pyro.plate("tasks", D, subsample=draw.index, dim=-1)``, where each task has a weight of its own.

        >>> import torch
        >>> draw = TaskDraw(torch.tensor([1, 7]), torch.tensor([4.0, 2.0]))
        >>> with TaskPlate(10, draw):
        ...     x = pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        >>> x.shape
        torch.Size([2])

    Pyro scales the log-densities of n drawn of D tasks by D/n, which supposes that all are drawn equally often. Here documents
    are drawn, and tasks with them: one with many documents comes up more often, and weighs less each time.

    Where the draw has ``rows_loaded``, parameters inside the plate have the drawn tasks' rows alone and are not subsampled.

    Args:
        num_tasks: D.
        draw: the tasks, and the factor of each one's log-density.
    """

    def __init__(self, num_tasks: int, draw: TaskDraw) -> None:
        super().__init__("tasks", num_tasks, subsample=draw.index, dim=-1)
        self.weight, self.rows_loaded = draw.weight, draw.rows_loaded

    def _process_message(self, msg: Any) -> None:
        scale = msg["scale"]
        super()._process_message(msg)
        msg["scale"] = scale * self.weight if msg["type"] == "sample" else scale
        if self.rows_loaded:  # a guide makes its tensors of this size
            frame, *outer = msg["cond_indep_stack"]
            msg["cond_indep_stack"] = (frame._replace(full_size=self.subsample_size), *outer)

    def _postprocess_message(self, msg: Any) -> None:
        if not self.rows_loaded:  # else a parameter has the drawn rows already
            super()._postprocess_message(msg)
