"""New tasks from a few documents each: Θ and τ stay as a fit has left them, only the new deviations are inferred.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> few = {"num_tasks": 3, "max_tokens": 32, "max_train_documents": 4, "max_eval_documents": 1}
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
>>> model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=100))
>>> fitted = bp.fit(model, data, epochs=2)
>>> adapted = bp.adapt(fitted, {"poems": ["The rose is red.", "The violet is blue."], "silence": []}, steps=4)
>>> adapted.tasks, [bool(norm) for norm in adapted.deviation_norms()]  # no documents: Θ itself
(['poems', 'silence'], [True, False])
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.backbone.texts import longest_read, token_split, tokenizer_of
from bora_pyro.data.tables import Source
from bora_pyro.data.tasks import TaskData, load_tasks
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.guides import GUIDES, make_parameters
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.task_groups import joined_history, joined_perplexity, of_group, task_groups
from bora_pyro.model import BoRA
from bora_pyro.priors import Given

#: Guides of the new deviations.
ALLOWED = ("map", "normal", "low_rank", "auto_normal")
#: The options of ``fit`` that an adaptation takes as well, and why it does not take some that one might look for.
OPTIONS = ("warmup", "accumulate", "gradient_clip", "temperature", "patience", "on_step", "on_epoch")
_NO_OPTIONS = {"epochs": "steps says how long", "checkpoints": "an adaptation takes seconds and keeps none"}


def adapt(
    fitted: Fitted,
    data: TaskData | Mapping[str, Sequence[str]] | Source,
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

    New tasks are independent of each other and of the old ones given Θ and τ: any number of them can be given at once, each is
    fitted as it would be alone, and the old ones are not looked at. Without documents the answer is the prior: Θ, with its
    standard deviation 1/√τ under a guide that has one. Where the fit has a τ of each task's own, the new one has their
    geometric mean; what its adapter shares between tasks stays as it is.

    Args:
        fitted: the fit whose Θ and τ are the prior.
        data: the texts of each new task by name, all to learn from; or a table, as :func:`~bora_pyro.load_tasks` takes it, with
            columns ``task`` and ``text`` (other columns, or a split: :func:`load_new_tasks`); or tokenised tasks, whose
            validation documents, where a task has some, decide which epoch is kept of it. Weights of its tasks count.
        guide: ``map`` for a point, or another of ``ALLOWED`` for a posterior, which is fitted around that point.
        steps: optimiser steps of each task, rounded up to whole passes over its documents: of one whose documents need two
            batches, 30 passes are 60 steps. Tasks with few documents share steps, so that 40 of them take little more time
            than one as long as their documents together fit into ``token_budget``.
        learning_rate: peak of the schedule; deviations are in units of their prior's scale.
        token_budget: tokens of a batch, padding included.
        max_tokens: longer texts are cut; default, and at most: what the base reads.
        scale: the first standard deviations in units of the prior's, for guides that learn them.
        seed: of the order of the documents and of the guide's draws.
        options: of :func:`~bora_pyro.inference.fit`: ``OPTIONS``.

    Returns:
        A fit of the new tasks alone; its Θ and τ are those that were given. Where tasks were fitted one after another, its
        history is the mean over all predicted tokens, and its best epoch the latest.

    Raises:
        InputError: no task, a text without a token, an unknown guide or option, steps below 1; the fit has one adapter for all
            tasks.
    """
    if isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        data = task_data(fitted, data, max_tokens=max_tokens)
    elif not isinstance(data, TaskData):
        data = load_new_tasks(data, fitted, max_tokens=max_tokens)
    model = given_model(fitted, len(data.tasks))
    model.likelihood = model.likelihood.with_task_weights(data.task_weights)
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
        steps: optimiser steps of each task.
        learning_rate: peak of the schedule.
        token_budget: tokens of a batch.
        scale: the first standard deviations.
        seed: of the order and the draws.
        options: of ``fit``.

    Raises:
        InputError: an unknown guide or option, steps below 1.
    """
    if guide not in ALLOWED:
        raise InputError(f"guide is {guide!r}; allowed: {', '.join(ALLOWED)}{nearest(guide, ALLOWED)}")
    if steps < 1:
        raise InputError(f"steps is {steps}; give a whole number from 1 up")
    for name in options:
        if name not in OPTIONS:
            why = _NO_OPTIONS.get(name, f"of fit's it takes {', '.join(OPTIONS)}")
            raise InputError(f"adapt has no option {name!r}: {why}{nearest(name, OPTIONS)}")
    options = {"patience": 0, "accumulate": 1} | options | {"learning_rate": learning_rate, "token_budget": token_budget}
    options |= {"seed": seed, "task_subsampling": False}
    # where a task has no documents its posterior is the prior: Θ, with the prior's own standard deviation
    whole = GUIDES[guide](model, scale=1.0)
    make_parameters(whole, model)
    fits, sizes = [], []
    for group in task_groups(data, token_budget=token_budget):
        part, some = of_group(model, data, group)
        batches = len(some.train.batches(token_budget=token_budget, seed=seed))
        options["epochs"] = -(-steps // -(-batches // options["accumulate"]))
        found = fit(part, some, **options)
        if guide != "map":
            found = fit(part, some, guide=GUIDES[guide](part, found.sites(), scale=scale), **options)
        _put(whole, group, found.guide)
        fits.append(found)
        sizes.append((some.train.num_tokens, some.validation.num_tokens))
    return Fitted(
        model,
        whole,
        data.tasks,
        history=joined_history(fits, [train for train, _ in sizes]),
        best_epoch=max((found.best_epoch for found in fits), default=0),
        validation_perplexity=joined_perplexity(fits, [validation for _, validation in sizes]),
        seconds=sum(found.seconds for found in fits),
        documents=data.train.documents_per_task,
        chat_template=data.chat_template,
    )


@torch.no_grad()
def _put(whole: AutoGuide, tasks: Tensor, part: AutoGuide) -> None:
    """Put the guide of some tasks into that of all; under a ``Given`` prior every tensor of a guide has a row a task."""
    own = dict(part.named_parameters())
    for name, value in whole.named_parameters():
        value[tasks.to(value.device)] = own[name]


def given_model(fitted: Fitted, num_tasks: int) -> BoRA:
    """The model of new tasks: backbone, adapter and likelihood of a fit, its Θ, τ and penalty as the prior; all count alike.

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
    likelihood = model.likelihood.with_task_weights(None)
    prior = Given(mean, precisions, penalty=model.prior.penalty)
    new = copy.copy(model)
    new.num_tasks, new.prior, new.likelihood = num_tasks, prior, likelihood
    return new


def task_data(fitted: Fitted, texts: Mapping[str, Sequence[str]], *, max_tokens: int | None = None) -> TaskData:
    """Texts by task, all to train on.

    Raises:
        InputError: no task; what is no list of texts, or a text without a token; a base without tokenizer.
    """
    if not texts:
        raise InputError("there is no new task; give texts by the task's name, as {'ada': ['Hello.']}")
    rows: list[tuple[int, str]] = []
    for task, of_task in texts.items():
        if not isinstance(task, str):
            raise InputError(f"a task has the name {shown(task)}; give a text")
        if isinstance(of_task, str):
            raise InputError(f"task {task!r} has a single text; give a list of texts, as [{of_task!r:.40}]")
        if not isinstance(of_task, Iterable):
            raise InputError(f"task {task!r} has {shown(of_task)}; give a list of texts")
    tasks = sorted(texts)
    for d, task in enumerate(tasks):
        rows += [(d, text) for text in texts[task]]
    train = token_split(
        fitted.model.backbone, [text for _, text in rows], task=[d for d, _ in rows], num_tasks=len(tasks), max_tokens=max_tokens
    )
    none = train.subset(torch.arange(0))
    return TaskData(tasks, train, none, none)


def load_new_tasks(source: Source, fitted: Fitted, *, max_tokens: int | None = None, **options: Any) -> TaskData:
    """New tasks from a table: all their documents to train on, or as ``split_column`` says. One task is enough.

    Args:
        source: as for :func:`~bora_pyro.load_tasks`.
        fitted: the fit that they are adapted from, whose tokenizer reads them.
        max_tokens: longer documents are cut; default, and at most: what the base reads.
        options: of ``load_tasks``: the columns, ``max_train_documents``, ``task_weights``, ...

    Raises:
        InputError: as ``load_tasks``; the base has no tokenizer.
    """
    tokenizer, most = tokenizer_of(fitted.model.backbone), longest_read(fitted.model.backbone, max_tokens)
    data = load_tasks(source, tokenizer, new_tasks=True, max_tokens=most, **options)
    if max_tokens is not None and most < max_tokens:
        data.notes.insert(0, f"max_tokens {max_tokens} is more than the base model reads; {most} is used")
    return data


def _of_no_task(tau: Tensor, start: Tensor) -> Tensor:
    """τ of a task that is none of those that it was learned for: where each has its own, the geometric mean."""
    return tau.log().mean(0).exp() if tau.dim() > start.dim() else tau
