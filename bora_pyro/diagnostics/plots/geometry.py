"""Plots of the tasks' relative positions, from their Gram matrix (``bora_pyro.diagnostics.deviations.task_gram``).

>>> import matplotlib.pyplot as plt, numpy as np
>>> weights = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
>>> scores, share = principal_components(weights @ weights.T)
>>> np.allclose(np.linalg.norm(scores[:, None] - scores, axis=-1), [[0, 3, 5], [3, 0, 4], [5, 4, 0]])
True
>>> float(share.sum().round(6))
1.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from bora_pyro.diagnostics.plots.labels import place_labels
from bora_pyro.diagnostics.plots.style import GREY, MARKERS, PALETTE, SMALL
from bora_pyro.errors import InputError


def task_pca(gram: ArrayLike, names: Sequence[str], ax: Axes, *, groups: Sequence[str] | None = None) -> Axes:
    """Draw the tasks on their first two principal components, as the released code of the BoRA paper does for its speakers.

    Args:
        gram: (D, D) Gram matrix G_de = ⟨x_d, x_e⟩. x_d is a vector of task d, for instance its weights or its ΔW. The global
            mean may be subtracted or not.
        names: (D,) names of the tasks.
        ax: the axis to draw on.
        groups: (D,) the group of each task, for instance a speaker's party, shown by colour and marker. None: no groups.

    Raises:
        InputError: if gram is not a symmetric D x D matrix for D names.
    """
    scores, share = principal_components(check_gram(gram, names))
    x, y = scores[:, 0], scores[:, 1]
    ax.axhline(0, color=GREY, linewidth=0.4)
    ax.axvline(0, color=GREY, linewidth=0.4)
    labels = [""] * len(names) if groups is None else list(groups)
    for n, group in enumerate(dict.fromkeys(sorted(labels))):
        chosen = [d for d, label in enumerate(labels) if label == group]
        ax.plot(
            x[chosen], y[chosen], linestyle="none", marker=MARKERS[n % len(MARKERS)], color=PALETTE[n % len(PALETTE)],
            label=group, gid="tasks",
        )  # fmt: skip
    ax.margins(0.12)
    ax.set_xlabel(f"component 1 ({share[0]:.0%} of the variance)")
    ax.set_ylabel(f"component 2 ({share[1]:.0%} of the variance)")
    if groups is not None:
        ax.legend()
    place_labels(ax, x, y, list(names))
    return ax


def principal_components(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (D, 2) and shares of the variance (2,) of D points with the Gram matrix ``gram`` (D, D).

    The doubly centred matrix J G J with J = I − 1/D is the Gram matrix of the points about their mean. The scores are its
    eigenvectors times the square roots of its eigenvalues. The sign of a component makes its largest score positive.
    """
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    scores = vectors[:, :2] * np.sqrt(values[:2])
    signs = np.sign(scores[np.abs(scores).argmax(0), [0, 1]])
    total = values.sum()
    return scores * np.where(signs == 0, 1, signs), values[:2] / total if total else np.zeros(2)


def task_dendrogram(gram: ArrayLike, names: Sequence[str], ax: Axes) -> Axes:
    """Draw a dendrogram of the tasks: average linkage of the distances ‖x_d − x_e‖ = √(G_dd + G_ee − 2 G_de).

    Args:
        gram: (D, D) Gram matrix G_de = ⟨x_d, x_e⟩, as for :func:`task_pca`.
        names: (D,) names of the tasks.
        ax: the axis to draw on, with a height of at least 0.2 inches per task.

    Raises:
        InputError: if gram is not a symmetric D x D matrix for D names.
    """
    tree = linkage(squareform(distances(check_gram(gram, names)), checks=False), method="average")
    dendrogram(
        tree, labels=list(names), ax=ax, orientation="left", color_threshold=0, above_threshold_color=PALETTE[0],
        leaf_font_size=SMALL,
    )  # fmt: skip
    ax.spines["left"].set_visible(False)  # the names stand on the right
    ax.set_xlabel("distance between tasks (average linkage)")
    return ax


def distances(gram: np.ndarray) -> np.ndarray:
    """The distances ‖x_d − x_e‖, (D, D), of points with the Gram matrix ``gram``."""
    norms = np.diag(gram)
    distance = np.sqrt(np.clip(norms + norms[:, None] - 2 * gram, 0, None))
    np.fill_diagonal(distance, 0)
    return (distance + distance.T) / 2


def check_gram(gram: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """Check a Gram matrix and return it as an array.

    Raises:
        InputError: if it is not a symmetric D x D matrix for D names, or D is below 2.
    """
    array = np.asarray(gram, float)
    if array.shape != (len(names), len(names)):
        raise InputError(f"gram has shape {array.shape}, names {len(names)} entries; give a number for each pair of tasks")
    if len(names) < 2:
        raise InputError("gram has one task; give two or more")
    if not np.isfinite(array).all() or not np.allclose(array, array.T, rtol=1e-4, atol=1e-6 * np.abs(array).max()):
        raise InputError("gram is not a symmetric matrix of finite numbers; give the inner products of the tasks' weights")
    return array
