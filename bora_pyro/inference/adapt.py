"""Adapting a fit to new tasks with a few documents each: Θ and τ of the fit stay fixed, and only the new deviations are inferred.

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
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.backbone.texts import check_token_ids, longest_read, token_split, tokenizer_of
from bora_pyro.data.splitters import ForNewTasks
from bora_pyro.data.tables import Source
from bora_pyro.data.tasks import TaskData, load_tasks
from bora_pyro.errors import InputError, check_at_least, check_one_of, nearest, shown
from bora_pyro.guides import AROUND_MAP, GUIDES, make_parameters
from bora_pyro.inference.clip_by_task import ClipByTask
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.task_groups import joined_history, joined_score, of_group, task_groups
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Given

#: Guides of the new deviations: all that are fitted by an ELBO. The directions of ``subspace`` are those of one fit's documents.
ALLOWED = tuple(name for name in GUIDES if name not in AROUND_MAP | {"subspace"})
#: The options of ``fit`` that an adaptation accepts.
OPTIONS = (
    "warmup", "accumulate", "gradient_clip", "temperature", "patience", "deviation_reach", "average", "on_step", "on_epoch",
)  # fmt: skip
# Options of ``fit`` that an adaptation does not accept, and the reason for the error message.
_NO_OPTIONS = {"epochs": "give steps instead", "checkpoints": "an adaptation takes seconds and writes none"}


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
    task_group: str | None = None,
    start: Weights | None = None,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Infer the deviations of new tasks under the prior of a fit, θ_new ~ Normal(Θ, I/τ) with Θ and τ fixed.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
        >>> bp.adapt(fitted, {"cleo": ["cleo prefers document 1"]}, steps=2).tasks
        ['cleo']

    Given Θ and τ, new tasks are independent of each other and of the tasks of the fit. Any number of them can be given at once,
    each is fitted as if it were alone, and the documents of the old tasks are not needed. A task without documents gets its
    prior: Θ, with the standard deviation 1/√τ if the guide has one. If each task of the fit has its own τ, a new task gets their
    geometric mean. If each has its own rank, a new task has the largest one. Latents that all tasks share do not change.

    Args:
        fitted: the fit whose Θ and τ are the prior.
        data: the training texts of each new task by name; or a table as for :func:`~bora_pyro.load_tasks`, with columns ``task``
            and ``text`` (for other columns or a split, use :func:`load_new_tasks`); or tokenised tasks. If a tokenised task has
            validation documents, they decide which epoch is kept. Task weights are applied.
        guide: ``map`` for a point estimate, or another of ``ALLOWED`` for a posterior, which is fitted around that estimate.
        steps: optimiser steps of each task, rounded up to whole passes over its documents. For example, a task whose documents
            fill two batches takes 30 passes for 60 steps. Tasks with few documents share steps, so that 40 tasks take little
            more time than one if their documents together fit into ``token_budget``.
        learning_rate: peak of the schedule; deviations are in units of their prior's scale.
        token_budget: tokens of a batch, padding included.
        max_tokens: longer texts are cut. Default and upper limit: the longest text that the base reads.
        scale: the initial standard deviations in units of the prior's, for guides that learn standard deviations.
        task_group: under a prior with groups (:class:`~bora_pyro.priors.GroupedNormal`), the group that all new tasks belong to.
            Their prior is then Normal(Θ_g, 1/τ). None: they belong to no group of the fit, and it is Normal(Θ, 1/τ_g + 1/τ).
        start: the adapters at which the new tasks begin, (D, layers, *shape) by name, for example those of a generator. The
            prior stays the same, so with enough steps the result does too. Default: Θ.
        seed: seed of the order of the documents and of the guide's draws.
        options: options of :func:`~bora_pyro.inference.fit.fit`, those in ``OPTIONS``. ``gradient_clip`` is the largest norm of
            each task's own gradient.

    Returns:
        A fit of the new tasks alone, with the same Θ and τ. If tasks were fitted in several groups, its history is the mean of
        the groups weighted by predicted tokens, and its best epoch is the latest of theirs.

    Raises:
        InputError: there is no task, a text has no token, the guide or an option is unknown, ``steps`` is below 1, ``start`` has
            other latents or tasks, or the fit has one adapter for all tasks.
    """
    data = new_task_data(fitted, data, max_tokens=max_tokens)
    model = given_model(fitted, len(data.tasks), task_group=task_group)
    model.likelihood = model.likelihood.with_task_weights(data.task_weights)
    return fit_deviations(
        model, data, guide=guide, steps=steps, learning_rate=learning_rate, token_budget=token_budget, scale=scale, start=start,
        seed=seed, **options,
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
    start: Weights | None = None,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """As ``adapt``, for a model with a :class:`~bora_pyro.priors.Given` prior.

    Args:
        model: the model, with a ``Given`` prior.
        data: the tasks.
        guide: this and all other arguments are those of ``adapt``.
        steps: optimiser steps of each task.
        learning_rate: peak of the schedule.
        token_budget: tokens of a batch.
        scale: the initial standard deviations.
        start: the adapters at which the tasks begin.
        seed: seed of the order of the documents and of the draws.
        options: options of ``fit``.

    Raises:
        InputError: the guide or an option is unknown, ``steps`` is below 1, or ``start`` has other latents or tasks.
    """
    check_one_of("guide", guide, ALLOWED)
    check_at_least("steps", steps, 1)
    for name in options:
        if name not in OPTIONS:
            why = _NO_OPTIONS.get(name, f"the options of fit that it takes are {', '.join(OPTIONS)}")
            raise InputError(f"adapt has no option {name!r}: {why}{nearest(name, OPTIONS)}")
    if start is not None:
        _check_start(model, start)
    options = {"patience": 0, "accumulate": 1} | options | {"learning_rate": learning_rate, "token_budget": token_budget}
    # each task's gradient is clipped apart; no other callbacks: τ, masks and buffers stay as the fit has left them
    callbacks = [ClipByTask(options.get("gradient_clip", FitOptions.gradient_clip))]
    options |= {"seed": seed, "task_subsampling": False, "gradient_clip": math.inf}
    # a task without documents keeps these initial values: Θ, with the prior's standard deviation
    joint_guide = GUIDES[guide](model, scale=1.0)
    make_parameters(joint_guide, model)
    fits, sizes, measure = [], [], model.likelihood.measure
    for group in task_groups(data, token_budget=token_budget):
        group_model, group_data = of_group(model, data, group)
        batches = len(group_data.train.batches(token_budget=token_budget, seed=seed))
        options["epochs"] = -(-steps // -(-batches // options["accumulate"]))
        begin = None if start is None else GUIDES["map"](group_model, _sites_of(group_model, start, group))
        group_fit = fit(group_model, group_data, guide=begin, callbacks=callbacks, **options)
        if guide != "map":
            around = GUIDES[guide](group_model, group_fit.sites(), scale=scale)
            group_fit = fit(group_model, group_data, guide=around, callbacks=callbacks, **options)
        _copy_rows(joint_guide, group, group_fit.guide)
        fits.append(group_fit)
        sizes.append((group_data.train.num_tokens, *map(measure.observations, (group_data.train, group_data.validation))))
    return Fitted(
        model,
        joint_guide,
        data.tasks,
        history=joined_history(fits, [tokens for tokens, _, _ in sizes], [train for _, train, _ in sizes]),
        best_epoch=max((group_fit.best_epoch for group_fit in fits), default=0),
        validation_score=joined_score(fits, [validation for _, _, validation in sizes], measure),
        seconds=sum(group_fit.seconds for group_fit in fits),
        documents=data.train.documents_per_task,
        chat_template=data.chat_template,
    )


def _check_start(model: BoRA, start: Weights) -> None:
    expected = {name: (model.num_tasks, *value.shape) for name, value in model.starts.items()}
    if (found := {name: tuple(value.shape) for name, value in start.items()}) != expected:
        name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise InputError(
            f"start has {name!r} of shape {found.get(name)}, expected {expected.get(name)}; give an adapter for each new task"
        )


def _sites_of(model: BoRA, start: Weights, tasks: Tensor) -> dict[str, Tensor]:
    """The sample sites at which some tasks have the adapters ``start``. Θ is that of the prior."""
    assert isinstance(model.prior, Given)
    theta = {name: value[tasks.to(value.device)].to(model.starts[name]) for name, value in start.items()}
    return model.sites_given(theta, model.prior.centres)


@torch.no_grad()
def _copy_rows(joint_guide: AutoGuide, tasks: Tensor, group_guide: AutoGuide) -> None:
    """Copy the rows of some tasks into the guide of all tasks. With a ``Given`` prior, all tensors have one row per task."""
    rows = dict(group_guide.named_parameters())
    for name, value in joint_guide.named_parameters():
        value[tasks.to(value.device)] = rows[name]


def given_model(fitted: Fitted, num_tasks: int, *, task_group: str | None = None) -> BoRA:
    """The model of new tasks: the backbone, adapter and likelihood of a fit, with its Θ, τ and penalty as the prior.

    All task weights are 1.

    Args:
        fitted: the fit.
        num_tasks: the number of new tasks.
        task_group: the group of the fit that they belong to, under a prior with groups.

    Raises:
        InputError: there is no such group; τ of the fit is infinite, so that new tasks have no deviations; or its router reads
            the adapters of its own tasks, which new tasks are not.
    """
    model = fitted.model
    if model.router.reads_all_tasks:
        raise InputError(
            f"{model.router} reads a token by the adapters of the fit's own tasks; new tasks need the router by_task"
        )
    _, mean = fitted.weights_of()(torch.tensor([0]))
    mean, precisions = model.prior.of_new_task(fitted.sites(), mean, group=task_group)
    if all(bool(tau.isinf().all()) for tau in precisions.values()):
        raise InputError(
            "tau of the fit is inf: all tasks, new ones too, have the same adapter (adapters/global-mean); to adapt, fit with "
            "--tau learned or a number"
        )
    likelihood = model.likelihood.with_task_weights(None)
    prior = Given(mean, precisions, penalty=model.prior.penalty)
    new = copy.copy(model)
    new.num_tasks, new.prior, new.likelihood = num_tasks, prior, likelihood
    new.adapter, new.tensors = model.adapter.for_tasks(None), model.tensors.for_new_tasks()
    return new


def new_task_data(
    fitted: Fitted, data: TaskData | Mapping[str, Sequence[str]] | Source, *, max_tokens: int | None = None
) -> TaskData:
    """New tasks in any form that ``adapt`` takes, as tokenised tasks; tokenised tasks stay as they are.

    Raises:
        InputError: see `task_data` and `load_new_tasks`.
    """
    if isinstance(data, TaskData):
        return data
    if isinstance(data, Mapping) and not isinstance(data, datasets.DatasetDict):
        return task_data(fitted, data, max_tokens=max_tokens)
    return load_new_tasks(data, fitted, max_tokens=max_tokens)


def task_data(fitted: Fitted, texts: Mapping[str, Sequence[str]], *, max_tokens: int | None = None) -> TaskData:
    """Tokenise the texts of new tasks, all for training.

    Raises:
        InputError: there is no task, a task has something else than a list of texts, a text has no token, or the base has no
            tokenizer.
    """
    if not texts:
        raise InputError("there is no new task; give texts by the task's name, for example {'ada': ['Hello.']}")
    rows: list[tuple[int, str]] = []
    for task, task_texts in texts.items():
        if not isinstance(task, str):
            raise InputError(f"a task has the name {shown(task)}; give a text")
        if isinstance(task_texts, str):
            raise InputError(f"task {shown(task)} has a single text; give a list of texts, for example [{task_texts!r:.40}]")
        if not isinstance(task_texts, Iterable):
            raise InputError(f"task {shown(task)} has {shown(task_texts)}; give a list of texts")
    tasks = sorted(texts)
    for d, task in enumerate(tasks):
        rows += [(d, text) for text in texts[task]]
    train = token_split(
        fitted.model.backbone, [text for _, text in rows], task=[d for d, _ in rows], num_tasks=len(tasks), max_tokens=max_tokens
    )
    none = train.subset(torch.arange(0))
    return TaskData(tasks, train, none, none)


def load_new_tasks(source: Source, fitted: Fitted, *, max_tokens: int | None = None, **options: Any) -> TaskData:
    """Read new tasks from a table. All documents are for training, unless ``split_column`` or the data say otherwise.

    One task is enough.

    Args:
        source: as for :func:`~bora_pyro.load_tasks`.
        fitted: the fit to adapt; its tokenizer is used.
        max_tokens: longer documents are cut. The default, and the maximum, is the context of the base model.
        options: arguments of ``load_tasks``: the columns, ``max_train_documents``, ``task_weights``, ...

    Raises:
        InputError: see ``load_tasks``; or the base model has no tokenizer.
    """
    tokenizer, most = tokenizer_of(fitted.model.backbone), longest_read(fitted.model.backbone, max_tokens)
    data = load_tasks(source, tokenizer, split=ForNewTasks(), max_tokens=most, **options)
    check_token_ids(fitted.model.backbone, data.train, data.validation, data.test)
    if max_tokens is not None and most < max_tokens:
        data.notes.insert(0, f"max_tokens {max_tokens} is more than the base model reads; {most} is used")
    return data
