"""New tasks from a few documents each: Θ and τ stay as a fit has left them, only the new deviations are inferred.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, num_tasks=3, max_train_documents=4, max_eval_documents=1)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=100))
>>> fitted = bp.fit(model, data, epochs=2)
>>> adapted = bp.adapt(fitted, {"poems": ["The rose is red.", "The violet is blue."], "silence": []}, steps=4)
>>> adapted.tasks, [bool(norm) for norm in adapted.deviation_norms()]  # no documents: Θ itself
(['poems', 'silence'], [True, False])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.tables import Source
from bora_pyro.data.tasks import TaskData, load_tasks
from bora_pyro.errors import InputError, nearest
from bora_pyro.fit import fit
from bora_pyro.fitted import Fitted
from bora_pyro.guides import GUIDES, make_parameters
from bora_pyro.likelihoods import without_task_weights
from bora_pyro.model import BoRA
from bora_pyro.priors import Given
from bora_pyro.texts import token_split, tokenizer_of

#: Guides of the new deviations.
ALLOWED = ("map", "normal", "low_rank", "auto_normal")


def adapt(
    fitted: Fitted,
    data: TaskData | Mapping[str, Sequence[str]],
    *,
    guide: str = "map",
    steps: int = 60,
    learning_rate: float = 1e-2,
    token_budget: int = 4096,
    max_tokens: int | None = None,
    scale: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Infer the deviations of new tasks under the prior that a fit has learned, θ_new ~ Normal(Θ, I/τ) with Θ and τ held.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> bp.adapt(fitted, {"cleo": ["cleo prefers document 1"]}, steps=2).tasks
        ['cleo']

    New tasks are independent of each other and of the old ones given Θ and τ, so any number of them is fitted at once, and the
    old ones are not looked at. Without documents the answer is Θ. Where the fit has a τ of each task's own, the new one has
    their geometric mean.

    Args:
        fitted: the fit whose Θ and τ are the prior.
        data: the texts of each new task by name, all to learn from; or tokenised tasks, whose validation split, if it has
            documents, decides which epoch is kept.
        guide: ``map`` for a point, or another of ``ALLOWED`` for a posterior, which is fitted around that point.
        steps: optimiser steps, rounded up to whole passes over the documents.
        learning_rate: peak of the schedule; deviations are in units of their prior's scale.
        token_budget: tokens of a batch, padding included.
        max_tokens: longer texts are cut; default: what the base reads.
        scale: the first standard deviations in units of the prior's, for guides that learn them.
        seed: of the order of the documents and of the guide's draws.
        options: further ones of :func:`~bora_pyro.fit`.

    Returns:
        A fit of the new tasks alone; its Θ and τ are those that were given.

    Raises:
        InputError: no task, a text without a token, an unknown guide, steps below 1; the fit has one adapter for all tasks.
    """
    if not isinstance(data, TaskData):
        data = task_data(fitted, data, max_tokens=max_tokens)
    model = given_model(fitted, len(data.tasks))
    return fit_deviations(
        model, data, guide=guide, steps=steps, learning_rate=learning_rate, token_budget=token_budget, scale=scale, seed=seed,
        **options,
    )  # fmt: skip


def fit_deviations(
    model: BoRA,
    data: TaskData,
    *,
    guide: str = "map",
    steps: int = 60,
    learning_rate: float = 1e-2,
    token_budget: int = 4096,
    scale: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """As ``adapt``, under a :class:`~bora_pyro.priors.Given` prior of one's own.

    Args:
        model: with a ``Given`` prior.
        data: the tasks.
        guide: as for ``adapt``, as are all that follow.
        steps: optimiser steps.
        learning_rate: peak of the schedule.
        token_budget: tokens of a batch.
        scale: the first standard deviations.
        seed: of the order and the draws.
        options: of ``fit``.

    Raises:
        InputError: an unknown guide, steps below 1.
    """
    if guide not in ALLOWED:
        raise InputError(f"guide is {guide!r}; allowed: {', '.join(ALLOWED)}{nearest(guide, ALLOWED)}")
    if steps < 1:
        raise InputError(f"steps is {steps}; give a whole number from 1 up")
    batches = len(data.train.batches(token_budget=token_budget, seed=seed))
    if not batches:
        unfitted = GUIDES[guide](model, data=data, scale=scale)  # at the prior's centre
        make_parameters(unfitted, model)
        return Fitted(model, unfitted, data.tasks, documents=data.train.documents_per_task)
    options = {"patience": 0, "task_subsampling": False, "seed": seed, "token_budget": token_budget} | options
    options |= {"epochs": -(-steps // batches), "learning_rate": learning_rate}
    point = fit(model, data, **options)
    return point if guide == "map" else fit(model, data, guide=GUIDES[guide](model, point.sites(), scale=scale), **options)


def given_model(fitted: Fitted, num_tasks: int) -> BoRA:
    """The model of new tasks: backbone, adapter and likelihood of a fit, and its Θ and τ as the prior; they have no weights.

    Raises:
        InputError: τ of the fit is infinite, so that a new task has nothing of its own.
    """
    model = fitted.model
    _, mean = fitted.weights_of()(torch.tensor([0]))
    sites = fitted.sites()
    precisions = {name: _of_no_task(model.prior.precision(name, start, sites), start) for name, start in model.starts.items()}
    if all(bool(tau.isinf().all()) for tau in precisions.values()):
        raise InputError(
            "tau of the fit is inf, one adapter for all tasks, and a new task has that one too (adapters/global-mean); "
            "fit with --tau learned, or a number, to adapt"
        )
    likelihood = without_task_weights(model.likelihood)
    new = BoRA(model.backbone, num_tasks, adapter=model.adapter, prior=Given(mean, precisions), likelihood=likelihood)
    new.fixed = model.fixed
    return new


def task_data(fitted: Fitted, texts: Mapping[str, Sequence[str]], *, max_tokens: int | None = None) -> TaskData:
    """Texts by task, all to train on.

    Raises:
        InputError: no task; a text without a token; a base without tokenizer.
    """
    tasks = sorted(texts)
    if not tasks:
        raise InputError("there is no new task; give texts by the task's name, as {'ada': ['Hello.']}")
    rows: list[tuple[int, str]] = []
    for d, task in enumerate(tasks):
        if isinstance(texts[task], str):
            raise InputError(f"task {task!r} has a single text; give a list of texts, as [{texts[task]!r:.40}]")
        rows += [(d, text) for text in texts[task]]
    train = token_split(
        fitted.model.backbone, [text for _, text in rows], task=[d for d, _ in rows], num_tasks=len(tasks), max_tokens=max_tokens
    )
    none = train.subset(torch.arange(0))
    return TaskData(tasks, train, none, none)


def load_new_tasks(source: Source, fitted: Fitted, **options: Any) -> TaskData:
    """New tasks from a table: all their documents to train on, or as ``split_column`` says. One task is enough.

    Args:
        source: as for :func:`~bora_pyro.load_tasks`.
        fitted: the fit that they are adapted from, whose tokenizer reads them.
        options: of ``load_tasks``: the columns, ``max_tokens``, ``max_train_documents``, ...

    Raises:
        InputError: as ``load_tasks``; the base has no tokenizer.
    """
    return load_tasks(source, tokenizer_of(fitted.model.backbone), new_tasks=True, **options)


def _of_no_task(tau: Tensor, start: Tensor) -> Tensor:
    """τ of a task that is none of those that it was learned for: where each has its own, the geometric mean."""
    return tau.log().mean(0).exp() if tau.dim() > start.dim() else tau
