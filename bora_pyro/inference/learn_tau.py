"""Learn τ during a fit: every few steps, some validation documents show whether tasks should deviate more or less.

:class:`~bora_pyro.priors.LearnedPrecision` has the mathematics. The callback here gives it the documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bora_pyro.data.batch import loaded_tasks
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.callbacks import Callback, FitLoop
from bora_pyro.inference.fitted import tau_by_group
from bora_pyro.inference.optimizer import GROUP, gradient_factors, precisions
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.model import BoRA, Weights


class LearnTau(Callback):
    """Shows the prior the next batch of validation documents every ``prior.every`` steps, and records the path of τ.

    The prior gets two things for each document (:meth:`~bora_pyro.priors.Prior.learn`): the gradient with respect to the weights
    of its task, and the deviation of these weights from the average of all tasks. A fit adds this callback by itself if its prior
    has something to learn (:func:`~bora_pyro.inference.loop.usual_callbacks`). The learned values are part of the prior's state,
    which checkpoints store.
    """

    name = "learn_tau"
    needs_sums = True

    def begin(self, model: BoRA, data: TaskData) -> None:
        if model.router.reads_all_tasks:
            raise InputError(f"tau cannot be learned under {model.router}, which reads a token by all tasks; give a number")
        if data.validation.num_tokens == 0:
            raise InputError(
                f"{model.prior} is learned from validation documents, and there are none; give more documents, or a fixed tau"
            )

    def after_step(self, loop: FitLoop) -> None:
        every, step = loop.model.prior.every, loop.step_number + 1
        if every and step % every == 0:
            self.show_batch(loop, step // every - 1)
            loop.report.setdefault("tau_path", []).append({"step": step, "tau": tau_of_path(loop)})

    def show_batch(self, loop: FitLoop, number: int) -> None:
        """Show the prior the ``number``-th batch of validation documents; after the last one the first comes again."""
        model, device = loop.model, loop.model.backbone.device
        # empty tensors first: a process without validation documents takes part too
        nothing = {name: start.new_zeros((0, *start.shape)) for name, start in model.starts.items()}
        deviations, gradients, tasks = [nothing], [nothing], [torch.zeros(0, dtype=torch.int64, device=device)]
        totals = loop.state.totals(loop.processes)
        shown = [batches[number % len(batches)] for batches in loop.validation_batches() if len(batches)]
        for batch in loop.processes.lockstep(shown):
            if batch is None:
                model.backbone.dummy_pass(backward=True)
                continue
            if loop.draws_tasks:
                batch = replace(batch, tasks=loaded_tasks(batch.task.unique()))
            batch, theta, average = loop.state.view(batch, totals)
            batch = batch.to(device)
            gradients.append(document_gradients(model, theta, batch))
            first = batch.first_rows
            deviations.append({name: (value - average[name]).index_select(0, batch.row[first]) for name, value in theta.items()})
            tasks.append(batch.task[first])
        names = [*model.starts, *(GROUP + name for name in model.starts if model.prior.groups)]
        before, sites = precisions(model.prior, model.starts, names), loop.state.sites() if model.prior.groups else None
        joined = _joined(deviations), _joined(gradients), torch.cat(tasks)
        model.prior.learn(*joined, sites=sites, all_reduce=loop.processes.all_reduce)
        loop.state.rescale(gradient_factors(before, precisions(model.prior, model.starts, names)))


def tau_of_path(loop: FitLoop) -> dict[str, Any]:
    """τ of each latent, as the path records it. If many tasks have a τ each, it is their geometric mean.

    Latents that all tasks share have an infinite τ and are left out.
    """
    tau = tau_by_group(loop.model, loop.state.sites())
    tau = {name: value for name, value in tau.items() if value != math.inf}
    many = {name: value for name, value in tau.items() if isinstance(value, list) and len(value) > MANY_TASKS}
    return tau | {name: math.exp(sum(map(math.log, value)) / len(value)) for name, value in many.items()}


def _joined(parts: Sequence[Weights]) -> Weights:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
