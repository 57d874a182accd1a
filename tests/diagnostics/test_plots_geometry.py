"""Plots of distances between tasks: components, dendrograms, and the matrices that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.plots.geometry import distances, principal_components
from bora_pyro.errors import InputError
from tests.diagnostics.plot_data import TASKS, points_of


def test_two_components_hold_points_of_a_plane(ax):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 30)) + rng.normal(size=30)
    matrix = points @ points.T
    plots.task_pca(matrix, TASKS, ax)
    drawn = points_of(ax, "tasks")
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn, axis=-1), distances(matrix), rtol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=1e-8)
    assert principal_components(matrix)[1].sum() == pytest.approx(1)
    assert {text.get_text() for text in ax.texts} == set(TASKS)


def test_components_are_those_of_the_points_about_their_mean():
    points = np.random.default_rng(1).normal(size=(6, 40))
    scores, share = principal_components(points @ points.T)
    centred = points - points.mean(0)
    _, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(share, values[:2] ** 2 / (values**2).sum())
    np.testing.assert_allclose((scores**2).sum(0), values[:2] ** 2)
    assert (scores[np.abs(scores).argmax(0), [0, 1]] > 0).all()
    moved = points + 10.0  # the mean is no matter
    np.testing.assert_allclose(principal_components(moved @ moved.T)[0], scores, rtol=1e-6)


def test_tasks_that_are_all_alike_have_no_variance(ax):
    plots.task_pca(np.ones((3, 3)), ["ada", "bo", "cy"], ax)
    assert ax.get_xlabel() == "component 1 (0% of the variance)"


def test_the_dendrogram_joins_at_average_distances(ax):
    place = np.array([[0.0], [1.0], [10.0]])
    plots.task_dendrogram(place @ place.T, ["ada", "bo", "cy"], ax)
    assert sorted({float(x) for tree in ax.collections for path in tree.get_paths() for x in path.vertices[:, 0]}) == [0, 1, 9.5]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(names) == ["ada", "bo", "cy"]
    assert abs(names.index("ada") - names.index("bo")) == 1


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3), "shape \\(3, 3\\), names 5"),
        (np.full((5, 5), np.nan), "not a symmetric"),
        (np.arange(25.0).reshape(5, 5), "not a symmetric"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(ax, matrix, words):
    for draw in (plots.task_pca, plots.task_dendrogram):
        with pytest.raises(InputError, match=words):
            draw(matrix, TASKS, ax)
    with pytest.raises(InputError, match="one task"):
        plots.task_pca([[1.0]], ["ada"], ax)
