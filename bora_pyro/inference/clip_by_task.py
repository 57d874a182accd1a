"""Clip the gradient of each task apart, where tasks are independent: every task is then fitted as if it were alone."""

from __future__ import annotations

import torch

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.ivon import IvonGuide
from bora_pyro.inference.callbacks import Callback, FitLoop
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA


class ClipByTask(Callback):
    """Scales the gradient of each task to the task's own objective, and clips it by its own norm.

    The gradient of a fit is that of −ELBO per observation of all its tasks. A task alone has fewer observations, so its gradient
    is larger by N / N_d (N_d are the observations of task d, N those of all tasks) and is clipped earlier. Give the fit itself no
    limit (``gradient_clip=inf``), because its norm is over all tasks. The gradients of the guide ``ivon`` stay as they are: its
    steps do not depend on the number of observations, and a clipped gradient would falsify its curvature.

        >>> ClipByTask(1.0)
        ClipByTask(1)

    Args:
        limit: largest norm of one task's gradient; inf: no clipping.

    Raises:
        InputError: the limit is not a number above 0.
    """

    def __init__(self, limit: float) -> None:
        FitOptions(gradient_clip=limit).validate()
        self.limit = limit

    def begin(self, model: BoRA, data: TaskData) -> None:
        of_task = [data.train.subset((data.train.task == d).nonzero()[:, 0]) for d in range(len(data.tasks))]
        observations = torch.tensor([model.likelihood.observations_of(split) for split in of_task])
        # a task without observations has no gradient but the prior's
        self.gradient_factor = (observations.sum() / observations.where(observations > 0, 1)).to(model.backbone.device)

    @torch.no_grad()
    def before_step(self, loop: FitLoop) -> None:
        if isinstance(loop.state.guide, IvonGuide):
            return
        gradients = [value.grad for value in (*loop.state.shared, *loop.state.own) if value.grad is not None]
        # every parameter has one row for each task: (tasks, ...)
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
        factor = self.gradient_factor.to(squares)
        factor = factor * (self.limit / (factor * squares.sqrt() + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))

    def __repr__(self) -> str:
        return f"ClipByTask({self.limit:g})"
