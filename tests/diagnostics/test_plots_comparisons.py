"""Plots of comparisons and of paths, and where labels and legends lie."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.stored_bytes import SHIFT
from bora_pyro.errors import InputError
from tests.diagnostics.plot_data import RECORDS, compare_table, forms_table, points_of

# comparisons and paths


@pytest.mark.parametrize("sign", [1, -1])  # of elpd_diff, which ArviZ has written both ways
def test_the_comparison_is_to_the_best(ax, sign):
    table = compare_table()
    plots.compare_forest(table.assign(elpd_diff=sign * table["elpd_diff"]), ax)
    np.testing.assert_allclose(points_of(ax, "difference"), [[0, 0], [-30, 1], [-100, 2]])
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["tau 100", "tau 10", "pooled"]
    bars = [segment for bar in ax.containers[0].lines[2] for segment in bar.get_segments()]
    np.testing.assert_allclose([np.ptp(bar[:, 0]) for bar in bars], [0, 20, 40])


def test_the_path_of_tau_is_a_line_for_each_group(ax):
    plots.tau_path(RECORDS, ax)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert lines["q_proj.lora_A"] == ([10, 20], pytest.approx([50, 80]))
    assert lines["q_proj.lora_B"] == ([10, 20], pytest.approx([100, 10]))
    assert ax.get_yscale() == "log"
    with pytest.raises(InputError, match="no record has a tau"):
        plots.tau_path([{"step": 1}], ax)


def test_perplexity_by_bytes_joins_the_sizes_of_an_adapter(ax):
    rows = [("lora@8", 0, 8000, 17.0), ("lora@8", 1, 8000, 19.0), ("lora@1", 0, 1000, 20.0), ("nola@1", 0, 900, 21.0)]
    table = pd.DataFrame([*rows, ("own@1", 0, 10, 9.0)], columns=["arm", "seed", "stored_bytes", "test_perplexity"])
    plots.perplexity_by_bytes(table, ax)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    lora, nola = (SHIFT ** (n - 4) for n in (0, 2))  # so that adapters of the same size do not overlap
    assert lines["LoRA"] == (pytest.approx([lora, 8 * lora]), [20.0, 18.0])
    assert lines["NOLA"] == (pytest.approx([0.9 * nola]), [21.0])
    assert len(lines) == 2
    spans = [segment[:, 1].tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert spans == [[20.0, 20.0], [17.0, 19.0], [21.0, 21.0]]


def test_form_curves_are_a_line_for_each_form_and_rate(ax):
    plots.form_curves(forms_table().sample(frac=1, random_state=0), ax, value="validation_perplexity")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert set(lines) == {f"{form}, rate {rate}" for form in ("centered", "noncentered") for rate in ("0.01", "0.1")}
    assert lines["centered, rate 0.1"] == ([0, 10, 20], pytest.approx([31.1, 26.1, 21.1]))
    with pytest.raises(InputError, match="no number in the column 'test_perplexity'"):
        plots.form_curves(forms_table(), ax, value="test_perplexity")
    with pytest.raises(InputError, match=r"no column 'validation_perplexty'.* did you mean 'validation_perplexity'"):
        plots.form_curves(forms_table(), ax, value="validation_perplexty")


# labels


def test_labels_in_a_crowd_cover_nothing_or_are_left_out(ax):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 80))
    ax.plot(x, y, "o")
    labels = plots.place_labels(ax, x, y, [f"task number {n}" for n in range(80)])
    assert 15 < len(labels) < 80
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = ax.transData.transform(np.column_stack([x, y]))
    assert not any(box.contains(*point) for box in boxes for point in points)
    room = ax.get_window_extent()
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1 for box in boxes)


def test_an_empty_label_is_left_out(ax):
    ax.plot([0, 1, 2], [0, 1, 0], "o")
    assert [label.get_text() for label in plots.place_labels(ax, [0, 1, 2], [0, 1, 0], ["", "bo", ""])] == ["bo"]


def test_a_legend_is_no_wider_than_its_axis(ax):
    ax.figure.set_size_inches(2.5, 3)
    for n in range(3):
        ax.plot([0, 1], [0, n], label=f"line number {n}")
    legend_above(ax, ncols=3)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().width <= ax.get_window_extent().width


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_nothing_lies_behind_the_legend(ax, scale):
    ax.plot([0, 1, 2], [1, 100, 100], label="one")
    ax.plot([0, 1, 2], [100, 100, 1], label="two")
    ax.set_yscale(scale)
    legend_above(ax)
    ax.figure.canvas.draw()
    _, top = ax.transData.transform((0, 100))
    assert top < ax.get_legend().get_window_extent().y0
