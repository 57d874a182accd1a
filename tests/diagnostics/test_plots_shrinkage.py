"""Plots of a container: deviations and pooling factors are drawn as the draws have them."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import xarray as xr

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.containers import has_inference_data
from bora_pyro.diagnostics.plots.shrinkage import _INTERVALS
from tests.diagnostics.plot_data import DOCUMENTS, TASKS, groups, lines_of, points_of

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz


def test_deviation_by_documents_of_a_container_names_its_tasks(ax):
    container = groups((1, 5))
    plots.deviation_by_documents(container, ax)
    middle = np.median(container["posterior"]["distance"].values[0], axis=0)
    np.testing.assert_allclose(points_of(ax, "distance "), np.column_stack([DOCUMENTS, middle]))
    assert {text.get_text() for text in ax.texts} == set(TASKS)


def containers():
    yield "mapping", groups
    yield "DataTree", lambda *args: xr.DataTree.from_dict(groups(*args))
    if has_inference_data(arviz.__version__):
        yield "InferenceData", lambda *args: arviz.InferenceData(**groups(*args))


@pytest.mark.parametrize(("kind", "container"), list(containers()))
@pytest.mark.parametrize("draws", [(1, 1), (2, 30)])
def test_the_forest_is_in_order_and_its_intervals_are_quantiles(ax, kind, container, draws):
    data = container(draws)
    plots.shrinkage_forest(data, ax)
    values = np.asarray(data["posterior"]["distance"]).reshape(-1, 5)
    middle = np.median(values, axis=0)
    order = np.argsort(middle)
    np.testing.assert_allclose(points_of(ax, "distance"), np.column_stack([middle[order], np.arange(5)]))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{TASKS[d]} ({DOCUMENTS[d]})" for d in order]
    assert len(ax.collections) == (2 if draws[1] > 1 else 0)
    for lines, (probability, _) in zip(ax.collections, _INTERVALS, strict=False):
        ends = np.array([segment[:, 0] for segment in lines.get_segments()])
        np.testing.assert_allclose(ends.T, np.quantile(values[:, order], [(1 - probability) / 2, (1 + probability) / 2], axis=0))


def test_the_ridge_of_one_draw_marks_every_group(ax):
    container = groups()
    plots.shrinkage_ridge(container, ax)
    rms = container["posterior"]["rms_deviation"].sel(task="cleo").values[0, 0]
    marks = [line.get_xdata() for line in lines_of(ax, "marks cleo")]
    for factor in range(2):
        np.testing.assert_allclose(np.sort(marks[factor]), np.sort(rms[..., factor].ravel()))
    assert len(ax.collections) == 5  # a density a task
    assert ax.get_xscale() == "log"


def test_the_ridge_of_many_draws_shows_the_distances(ax):
    container = groups((2, 40))
    plots.shrinkage_ridge(container, ax)
    assert len(ax.collections) == 5
    assert not any(str(line.get_gid()).startswith("marks") for line in ax.lines)
    order = np.argsort(np.median(container["posterior"]["distance"].values.reshape(-1, 5), axis=0))
    assert [label.get_text() for label in ax.get_yticklabels()] == [TASKS[d] for d in order]
    for row, density in enumerate(ax.collections):
        heights = density.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(row)
        assert heights.max() == pytest.approx(row + 0.9)


def test_modules_that_a_layer_lacks_are_passed_over(ax):
    container = groups()
    container["posterior"]["rms_deviation"][..., 2, 1, :] = np.nan
    container["posterior"]["pooling_factor"][..., 1, 1] = np.nan
    plots.shrinkage_ridge(container, ax)
    assert sum(len(line.get_xdata()) for line in lines_of(ax, "marks ada")) == 3 * 2 * 2 - 2
    ax.clear()
    plots.pooling_factors(container, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["q_proj A", "q_proj B", "fc1 A"]


def test_pooled_tasks_have_no_density(ax):
    plots.shrinkage_ridge(groups(scale=0.0), ax)
    assert not ax.collections
    assert ax.get_xscale() == "linear"


@pytest.mark.parametrize("draws", [(1, 1), (2, 3)])
def test_the_heatmap_adds_in_quadrature(ax, draws):
    container = groups(draws)
    plots.deviation_heatmap(container, ax)
    rms = container["posterior"]["rms_deviation"]
    expected = np.sqrt((rms**2).mean(("module", "factor"))).mean(("chain", "draw")).transpose("layer", "task")
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert "units of weight" in ax.figure.axes[1].get_ylabel()


def test_pooling_factors_are_a_line_for_each_module_and_factor(ax):
    container = groups((2, 30))
    plots.pooling_factors(container, ax)
    draws = container["posterior"]["pooling_factor"]
    for module, factor in itertools.product(("q_proj", "fc1"), ("A", "B")):
        points = points_of(ax, f"{module} {factor}")
        np.testing.assert_allclose(points[:, 1], draws.sel(module=module, factor=factor).median(("chain", "draw")))
        np.testing.assert_allclose(points[:, 0], np.arange(3) + points[0, 0])
    assert len(ax.collections) == 2 * 4


def test_a_pooling_factor_of_all_draws_is_read_from_the_constant_data(ax):
    container = groups((1, 30))
    factors = container["posterior"]["pooling_factor"].isel(chain=0, draw=0, drop=True)
    container["posterior"] = container["posterior"].drop_vars("pooling_factor")
    container["constant_data"]["pooling_factor"] = factors
    plots.pooling_factors(container, ax)
    np.testing.assert_allclose(points_of(ax, "q_proj B")[:, 1], factors.sel(module="q_proj", factor="B"))
    assert not ax.collections


def test_deviation_by_documents_has_the_intervals_of_draws(ax):
    container = groups((1, 30))
    plots.deviation_by_documents(container, ax)
    values = container["posterior"]["distance"].values[0]
    assert len(ax.collections) == 2
    for lines, (probability, _) in zip(ax.collections, _INTERVALS, strict=True):
        segments = np.array(lines.get_segments())  # (task, end, coordinate)
        np.testing.assert_allclose(segments[:, 0, 0], DOCUMENTS)
        np.testing.assert_allclose(
            segments[..., 1].T, np.quantile(values, [(1 - probability) / 2, (1 + probability) / 2], axis=0)
        )
    assert "90 % of the draws" in ax.get_ylabel()


def test_the_displacement_is_drawn_where_there_is_one(ax):
    container = groups((1, 30))
    values = container["posterior"]["distance"] - 1.0
    container["posterior"]["displacement"] = values
    plots.shrinkage_forest(container, ax)
    middle = np.median(values[0], axis=0)
    np.testing.assert_allclose(points_of(ax, "distance")[:, 0], np.sort(middle))
    assert "component of" in ax.get_xlabel()
    assert ax.get_xlim()[0] == pytest.approx(1.05 * float(values.min()))
    ax.clear()
    plots.deviation_by_documents(container, ax)
    np.testing.assert_allclose(points_of(ax, "distance "), np.column_stack([DOCUMENTS, middle]))


def test_the_heatmap_of_draws_is_that_of_the_centre(ax):
    container = groups((1, 30))
    centre = groups(seed=1)["posterior"]["rms_deviation"].isel(chain=0, draw=0, drop=True)
    container["constant_data"]["centre_rms_deviation"] = centre
    plots.deviation_heatmap(container, ax)
    np.testing.assert_allclose(
        ax.images[0].get_array(), np.sqrt((centre**2).mean(("module", "factor"))).transpose("layer", "task")
    )
