"""Every plot: the axis is named, no text covers another, and grey is enough to read it."""

from __future__ import annotations

import pytest

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.plots.style import LINES, MARKERS, PALETTE
from tests.diagnostics.plot_data import RECORDS, TASKS, check_legible, compare_table, forms_table, gram, groups, sweep, texts_of

DRAWINGS = {
    "tau_curve": lambda ax: plots.tau_curve(sweep(), ax),
    "tau_curve, base near": lambda ax: plots.tau_curve(sweep(base=32.0), ax),
    "shrinkage_forest": lambda ax: plots.shrinkage_forest(groups(), ax),
    "shrinkage_forest, draws": lambda ax: plots.shrinkage_forest(groups((2, 40)), ax),
    "shrinkage_ridge": lambda ax: plots.shrinkage_ridge(groups(), ax),
    "shrinkage_ridge, draws": lambda ax: plots.shrinkage_ridge(groups((2, 40)), ax),
    "shrinkage_ridge, pooled": lambda ax: plots.shrinkage_ridge(groups(scale=0.0), ax),
    "deviation_by_documents": lambda ax: plots.deviation_by_documents(groups(), ax),
    "deviation_by_documents, sweep": lambda ax: plots.deviation_by_documents(sweep(), ax),
    "deviation_heatmap": lambda ax: plots.deviation_heatmap(groups(), ax),
    "deviation_heatmap, pooled": lambda ax: plots.deviation_heatmap(groups(scale=0.0), ax),
    "pooling_factors": lambda ax: plots.pooling_factors(groups(), ax),
    "pooling_factors, draws": lambda ax: plots.pooling_factors(groups((2, 40)), ax),
    "task_pca": lambda ax: plots.task_pca(gram(), TASKS, ax),
    "task_pca, groups": lambda ax: plots.task_pca(gram(), TASKS, ax, groups=["left", "right", "left", "left", "right"]),
    "task_dendrogram": lambda ax: plots.task_dendrogram(gram(), TASKS, ax),
    "compare_forest": lambda ax: plots.compare_forest(compare_table(), ax),
    "tau_path": lambda ax: plots.tau_path(RECORDS, ax),
    "task_gain": lambda ax: plots.task_gain(sweep(), ax, tau="100", reference="0"),
    "form_curves": lambda ax: plots.form_curves(forms_table(), ax, value="objective"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_axis_comes_back_named_and_legible(ax, name):
    assert DRAWINGS[name](ax) is ax
    assert ax.get_xlabel() or ax.get_xticklabels()
    assert ax.get_ylabel() or ax.get_yticklabels()
    texts = texts_of(ax.figure)
    assert len(texts) > 4
    check_legible(ax.figure, texts)


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_series_can_be_told_apart_in_grey(ax, name):
    legend = DRAWINGS[name](ax).get_legend()
    if legend is None:
        return
    looks = [
        (str(handle.get_marker()), str(handle.get_linestyle()), handle.get_markerfacecolor() == "white")
        for handle in legend.get_lines()
    ]
    assert len(set(looks)) == len(looks)


def test_the_palette_is_as_long_as_the_markers_and_lines():
    assert len(PALETTE) == len(set(PALETTE)) == len(MARKERS) == len(LINES) == 8


def test_a_figure_within_the_style_draws_without_a_display(ax, tmp_path):
    plots.tau_curve(sweep(), ax).figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
