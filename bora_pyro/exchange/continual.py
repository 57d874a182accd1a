"""Fit tasks one after another: the adapter of a task is merged into the base before the next task is fitted.

    >>> import bora_pyro as bp
    >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
    >>> sequence = continual_fit(backbone, data, adapter=bp.LoRA(rank=2), epochs=1, learning_rate=0.01)
    >>> sequence.order, [round(stage.preserve, 2) for stage in sequence.stages], sequence.matrix.shape
    (['ada', 'bob'], [0.3, 0.7], torch.Size([3, 2]))

At the end there is one base for all tasks, without adapters. What a later task does to an earlier one is its *forgetting*. To
limit it, each adapter is wrapped in :class:`~bora_pyro.adapters.OSFT`: it leaves the leading singular directions of the base
alone, as the earlier tasks have left it. The share of these directions grows from task to task.

A single task has no others to share with, so its prior is Normal(start of the adapter, I/τ), or flat with τ = 0.

Source: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025, arXiv 2504.07097.
Transfer: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bora_pyro.adapters import OSFT, Adapter, LoRA
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import TaskData
from bora_pyro.data.subset import subset
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.exchange.factors import check_gives_change
from bora_pyro.exchange.merge import check_mergeable, merge_into_base
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import fit
from bora_pyro.likelihoods import Likelihood
from bora_pyro.model import BoRA
from bora_pyro.priors import Given, Independent
from bora_pyro.priors.base import check_tau


@dataclass(frozen=True)
class Stage:
    """One task of the sequence, fitted and merged.

    Attributes:
        task: name of the task.
        preserve: the share of the singular directions that its adapter left alone.
        best_epoch: the epoch that was kept; 0: the start, so that the task changed nothing.
        seconds: seconds of the fit.
        rounding: relative error of rounding in the merge (:func:`~bora_pyro.exchange.merge.save_merged`).
        losses: nats per token of the test documents of each task of the order, after this merge.
    """

    task: str
    preserve: float
    best_epoch: int
    seconds: float
    rounding: float
    losses: list[float]


@dataclass
class Continual:
    """What tasks in sequence have learned and forgotten. Losses are in nats per token of test documents; lower is better.

        >>> def stage(task, losses):
        ...     return Stage(task, preserve=0.5, best_epoch=1, seconds=1.0, rounding=0.0, losses=losses)
        >>> done = Continual(["ada", "bob"], [4.0, 4.0], [stage("ada", [2.0, 3.5]), stage("bob", [2.4, 3.0])])
        >>> done.matrix.tolist()
        [[4.0, 4.0], [2.0, 3.5], [2.4, 3.0]]
        >>> round(done.average, 3), round(done.forgetting, 3), round(done.forward, 3), round(done.learning, 3)
        (2.7, 0.4, 0.5, 1.25)

    Attributes:
        order: the names of the tasks in their order.
        base: losses of the base before the first task, in this order.
        stages: the tasks that are done.
    """

    order: list[str]
    base: list[float]
    stages: list[Stage] = field(default_factory=list)

    @property
    def matrix(self) -> Tensor:
        """R, (stages + 1, tasks) float64: R_ij is the loss of task j after i merges."""
        return torch.tensor([self.base, *(stage.losses for stage in self.stages)], dtype=torch.float64)

    @property
    def average(self) -> float:
        """The loss after the last stage, on average over the tasks that have been fitted."""
        return float(self.matrix[-1, : len(self.stages)].mean())

    @property
    def forgetting(self) -> float:
        """How much the loss of a task has risen since its own stage, on average over all tasks but the last; nan for one.

        It is backward transfer with the other sign, because a loss is better if it is lower.
        """
        last = len(self.stages)
        own = self.matrix[1:].diagonal()[: last - 1]
        return float((self.matrix[-1, : last - 1] - own).mean())

    @property
    def forward(self) -> float:
        """How much the earlier tasks have lowered the loss of a task before its stage, on average over all but the first."""
        last = len(self.stages)
        before = self.matrix.diagonal()[1:last]
        return float((self.matrix[0, 1:last] - before).mean())

    @property
    def learning(self) -> float:
        """How much the own stage of a task has lowered its loss, on average. A fit that changes nothing forgets nothing."""
        last = len(self.stages)
        rows = torch.arange(last)
        return float((self.matrix[rows, rows] - self.matrix[rows + 1, rows]).mean())


def continual_fit(
    backbone: Backbone,
    data: TaskData,
    *,
    order: Sequence[str] | None = None,
    adapter: Adapter | None = None,
    preserve: tuple[float, float] = (0.3, 0.7),
    tau: float = 0.0,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    done: Continual | None = None,
    on_stage: Callable[[Continual], object] | None = None,
    **options: Any,
) -> Continual:
    """Fit the tasks in their order, and merge each into the base.

    Args:
        backbone: the language model. **Its weights change**: at the end it is the base for all tasks.
        data: the documents of all tasks. Validation documents choose the epoch that is merged; test documents give the losses.
        order: names of the tasks; default: all, in alphabetical order.
        adapter: the adapter inside :class:`~bora_pyro.adapters.OSFT`; default: ``LoRA()``.
        preserve: the share of the singular directions of a layer that the first and the last adapter leave alone; tasks between
            have shares between, in equal steps. ``(0, 0)`` is plain sequential fine-tuning.
        tau: precision of each task's prior Normal(start of the adapter, I/τ); 0: a flat prior.
        likelihood: the likelihood; default: that of the tokens.
        seed: seed of the adapters' starts and of the order of the documents.
        done: what an earlier call had done when it ended. ``backbone`` is then its base.
        on_stage: called after each merge.
        options: options of ``fit``, for example ``epochs=3``.

    Raises:
        InputError: a task is not in the data, stands twice in the order, or has no test document; a share is not a number from 0
            to 1, or is too small for a layer; τ is negative or infinite; an adapter cannot be merged into this base; or as for
            :func:`~bora_pyro.inference.fit.fit`.
    """
    order = list(data.tasks if order is None else order)
    shares = _shares(preserve, len(order))
    _check(data, order, tau)
    place = [data.tasks.index(task) for task in order]
    adapters = [OSFT(preserve=share, inner=adapter or LoRA()) for share in shares]
    check_gives_change(adapter or LoRA(), backbone)
    for one, slot in itertools.product(adapters, backbone.slots):
        one.preserved(slot)
    judge = BoRA(backbone, max(2, data.num_tasks), adapter=LoRA(rank=1), prior=Independent(), likelihood=likelihood)
    check_mergeable(judge)
    if done is None:
        before = _losses(judge, data)
        done = Continual(order, [before[d] for d in place])
    found = Continual(order, done.base, list(done.stages))
    for task, one in list(zip(order, adapters, strict=True))[len(found.stages) :]:
        model = _alone(backbone, one, tau, likelihood, seed)
        fitted = fit(model, subset(data, [task]), seed=seed, **options)
        rounding = merge_into_base(model, next(theta for _, theta, _ in fitted.each_task()), task=0)
        after = _losses(judge, data)
        found.stages.append(Stage(task, one.preserve, fitted.best_epoch, fitted.seconds, rounding, [after[d] for d in place]))
        if on_stage is not None:
            on_stage(found)
    return found


def _alone(backbone: Backbone, adapter: Adapter, tau: float, likelihood: Likelihood | None, seed: int) -> BoRA:
    """The model of one task, whose prior has the start of its adapter as the centre."""
    model = BoRA(backbone, 1, adapter=adapter, prior=Given({}, {}), likelihood=likelihood, seed=seed)
    model.prior = Given(model.starts, {name: torch.tensor(float(tau)) for name in model.starts})
    return model


def _losses(judge: BoRA, data: TaskData) -> list[float]:
    (scores,) = evaluate(judge, data.test, None)
    return [math.log(scores.perplexity(d) or math.nan) for d in range(data.num_tasks)]


def _shares(preserve: tuple[float, float], tasks: int) -> list[float]:
    for value in preserve:
        if not 0 <= value <= 1:
            raise InputError(f"a preserved share is {value}; give a number from 0 to 1, nearest: {1 if value > 1 else 0}")
    first, last = preserve
    return [first + (last - first) * t / max(1, tasks - 1) for t in range(tasks)]


def _check(data: TaskData, order: Sequence[str], tau: float) -> None:
    check_tau(tau)
    if math.isinf(tau):
        raise InputError("tau is inf, under which a task changes nothing; give a number from 0 up")
    if not order:
        raise InputError("the order has no task; name one or more")
    documents = data.test.documents_per_task
    for task in order:
        if task not in data.tasks:
            raise InputError(f"task {shown(task)} is not in the data, which has {len(data.tasks)}{nearest(task, data.tasks)}")
        if order.count(task) > 1:
            raise InputError(f"task {shown(task)} stands twice in the order; name each task once")
        if not documents[data.tasks.index(task)]:
            raise InputError(f"task {shown(task)} has no test document, so what it forgets cannot be measured; leave it out")
