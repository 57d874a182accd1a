"""How a fit begins: the tasks of each process, and the parameters that the steps update."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.data.batch import Batch, TaskDraw
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.base import begins_at_sites
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.inference.all_tasks import AllTasks
from bora_pyro.inference.drawn_tasks import DrawnTasks
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.processes import Processes, partition_tasks
from bora_pyro.inference.row_means import copies_of
from bora_pyro.inference.spread import Collection
from bora_pyro.inference.state import FitState
from bora_pyro.inference.task_rows import MANY_TASKS, TaskRows
from bora_pyro.model import BoRA


def partition_of(model: BoRA, data: TaskData, processes: Processes, *, task_subsampling: bool | None) -> Sequence[Tensor] | None:
    """The tasks of each process if steps draw tasks; None if every step updates all tasks.

    Args:
        model: the BoRA model.
        data: the documents; each process gets about the same number of training tokens.
        processes: the processes that share the fit.
        task_subsampling: whether a step draws tasks; None: with more than 64 tasks, or several processes.

    Raises:
        InputError: ``task_subsampling`` is False with several processes; or the router uses all tasks, and there are several
            processes or ``task_subsampling`` is True.
    """
    size, tasks = processes.size, len(data.tasks)
    if model.router.reads_all_tasks:
        if size > 1 or task_subsampling:
            raise InputError(f"{model.router} reads a token by all tasks; use one process, and leave task_subsampling out")
        return None
    drawn = size > 1 or tasks > MANY_TASKS if task_subsampling is None else task_subsampling
    if not drawn and size > 1:
        raise InputError("task_subsampling is false, but several processes share the tasks; leave it out, or start one process")
    if size > 1:
        return partition_tasks(data.train.tokens_per_task, size)
    return [torch.arange(tasks)] if drawn else None


def first_state(
    model: BoRA,
    guide: AutoGuide,
    document: Batch,
    options: FitOptions,
    *,
    own: Sequence[Tensor] | None,
    folder: Path | None = None,
    keep_sums: bool = False,
    collection: Collection | None = None,
) -> FitState:
    """Run the guide for the first time, and return the state that updates its parameters.

    Args:
        model: the BoRA model.
        guide: the guide, which has not run yet.
        document: a short batch for the first run of the guide.
        options: options of the fit.
        own: the tasks of this process, in parts, if steps draw tasks; None: every step updates all tasks.
        folder: folder for files of tensors that do not fit in memory; default: the folder of temporary files.
        keep_sums: keep sums over all tasks up to date, for callbacks that need them.
        collection: the steps that a guide is made of.
    """
    if isinstance(guide, FromSteps):
        guide.begin_fit()
    kept: dict[str, Any] = {"average": options.average, "own_rate": options.deviation_reach > 0, "collection": collection}
    with torch.no_grad(), poutine.seed(rng_seed=options.seed):
        if own is None:
            guide(document)
            return AllTasks(model, guide, **kept)
        budget = options.task_memory * 2**30
        numbers = sum(start.numel() for start in model.starts.values())
        size = 4 * copies_of(options.average, collection) * numbers * model.num_tasks
        all_rows = size <= budget or begins_at_sites(guide)
        _set_up(model, guide, document, all_rows=all_rows)
        place = Path(tempfile.gettempdir()) if folder is None else folder
        tasks = torch.cat([*own]).unique()
        rows = TaskRows(model, guide, own=tasks, budget=budget, folder=place, keep_sums=keep_sums, **kept)
        return DrawnTasks(rows)


def _set_up(model: BoRA, guide: AutoGuide, batch: Batch, *, all_rows: bool) -> None:
    """Run a guide for the first time, with one row for each task (``all_rows``) or one row for all tasks."""
    if guide.prototype_trace is None:
        device = model.backbone.device
        index = torch.arange(model.num_tasks, device=device) if all_rows else batch.task.unique()[:1]
        draw = TaskDraw(index, torch.ones(len(index), device=device), rows_loaded=True)
        guide(replace(batch, task=index[:1].repeat(len(batch.task)), tasks=draw))
