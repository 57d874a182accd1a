"""The pictures of one run: shrinkage of the tasks, learning curves, and the path of τ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bora_pyro.diagnostics import plots
from bora_pyro.likelihoods import PERPLEXITY, Measure
from bora_pyro.report.blocks import Picture
from bora_pyro.report.pictures import WIDTH, draw_picture, name_labels

#: With more tasks than this, pictures with one row a task are left out.
MANY_TASKS = 80
# What tasks are compared by, and how they deviate in it, by space.
_SPACES = {
    "delta_w": ("ΔW", "changes of the weights, ΔW_d − ΔW_Θ"),
    "weights": ("θ", "latents, θ_d − Θ, because the change of a layer depends on its input"),
}
_POINTS = 400  # points of a path of τ that are drawn, at most


def shrinkage_pictures(tasks: Sequence[str], container: Any, gram: np.ndarray, *, space: str = "delta_w") -> Iterator[Picture]:
    """Draw how far the tasks are from Θ, in which layers, and how far they are from each other.

    Args:
        tasks: names of the D tasks.
        container: result of :func:`bora_pyro.diagnostics.shrinkage`.
        gram: Gram matrix of the tasks' deviations, of shape (D, D) (:func:`bora_pyro.diagnostics.deviations.task_gram`).
        space: its space, ``delta_w`` or ``weights``.
    """
    names = list(name_labels(tasks).values())
    groups = {
        group: container[group].to_dataset() if hasattr(container[group], "to_dataset") else container[group]
        for group in ("posterior", "constant_data")
    }
    groups = {group: data.assign_coords(task=names) if "task" in data.dims else data for group, data in groups.items()}
    by_task = 1.0 + 0.19 * len(names)  # inches
    if len(names) <= MANY_TASKS:
        yield draw_picture(
            "forest",
            "Distance from the global mean",
            "Distance of each task's adapter from Θ, which all tasks share. The number of training documents is in parentheses. "
            "A task at the left end is like the average of all tasks.",
            partial(_call, plots.shrinkage_forest, groups),
            height=by_task,
        )
        yield draw_picture(
            "documents",
            "Distance against data",
            "Each task's distance from Θ against its number of training documents. All tasks have the same prior, so tasks with "
            "more data can move farther away.",
            partial(_call, plots.deviation_by_documents, groups),
        )
        yield draw_picture(
            "heatmap",
            "Where the tasks deviate",
            "Root mean square deviation of an adapter's entries from Θ, by layer and task. Brighter means farther.",
            partial(_call, plots.deviation_heatmap, groups),
            width=max(WIDTH, 1.6 + 0.14 * len(names)),
            height=3.8,
        )
    # a single task has no pooling factor
    if any("pooling_factor" in data and np.isfinite(data["pooling_factor"]).any() for data in groups.values()):
        yield draw_picture(
            "pooling",
            "How strongly each part is pooled",
            "Gelman and Pardoe's pooling factor by layer, kind of layer and factor. At 1 all tasks share that part, at 0 each "
            "task has its own.",
            partial(_call, plots.pooling_factors, groups),
        )
    if 2 <= len(names) <= MANY_TASKS:
        own, deviation = _SPACES[space]
        yield draw_picture(
            "pca",
            "Tasks by what their adapters do",
            f"Principal components of the tasks' {deviation}. Tasks that lie close together have similar adapters. A name "
            "without room is left out.",
            lambda ax: plots.task_pca(gram, names, ax),
            height=3.8,
        )
        yield draw_picture(
            "tree",
            "Which tasks are near one another",
            f"Average linkage of the distances between the tasks' {own}. The farther left two tasks meet, the less they share.",
            lambda ax: plots.task_dendrogram(gram, names, ax),
            height=by_task,
        )


def gate_picture(by_layer: Mapping[str, float], blocks: Mapping[str, Sequence[int]], tasks: int) -> Picture:
    """Draw in which layers the gates of a routed model know the task of a token.

    Args:
        by_layer: how often the gates are right, by ``<slot>.<layer>``.
        blocks: the numbers of the layers of each slot.
        tasks: D, the number of tasks.
    """
    return draw_picture(
        "gates",
        "Where the gates know the task",
        "The share of the tokens of the test documents at which the largest gate is that of the document's task, by layer and "
        "kind of layer.",
        lambda ax: plots.gate_accuracy(by_layer, blocks, ax, chance=1 / tasks),
    )


def learning_pictures(
    history: Sequence[Mapping[str, Any]], *, unit: str, measure: Measure = PERPLEXITY, best_epoch: int | None
) -> Iterator[Picture]:
    """Draw the measure of the documents and τ over the course of the fit.

    Args:
        history: the records of ``metrics.jsonl``.
        unit: unit of a likelihood of tokens, ``tokens`` or ``documents``.
        measure: the measure of the likelihood.
        best_epoch: the epoch whose state was kept.
    """
    history = [record for record in history if record.get("epoch") is not None]
    scored = any(record.get(f"validation_{measure.name}") is not None for record in history)
    if scored or any(unit == "tokens" and record.get("loss") for record in history):
        title = measure.unit[0].upper() + measure.unit[1:]
        yield draw_picture(
            "learning",
            "Learning curves",
            f"{title} of the training documents during each epoch, and of the validation documents after it. The fit kept the "
            "state of the epoch with the ring.",
            lambda ax: plots.learning_curves(history, ax, unit=unit, measure=measure, best_epoch=best_epoch),
        )
    path = [
        {"step": point["step"], "tau": {group: tau for group, tau in point["tau"].items() if _is_finite(tau)}}
        for record in history
        for point in record.get("tau_path") or ()
    ]
    if any(point["tau"] for point in path):
        every = -(-len(path) // _POINTS)
        yield draw_picture(
            "tau",
            "Path of the learned precision",
            "τ of each kind of layer and factor while it was learned. A large τ means that the tasks share that part, a small τ "
            "that they differ in it. A prior with standard deviation σ has τ = 1/σ².",
            lambda ax: plots.tau_path([*path[:-1:every], path[-1]], ax),
        )


def _is_finite(tau: Any) -> bool:
    """Whether a group has a finite τ. What all tasks share has an infinite τ, which JSON writes as null."""
    return None not in (tau if isinstance(tau, list) else [tau])


def _call(draw: Any, groups: Mapping[str, Any], ax: Axes) -> Any:
    return draw(groups, ax)
