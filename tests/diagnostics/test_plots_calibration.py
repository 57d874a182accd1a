"""Plots of predictions: what is drawn equals the tables, no text covers another, and grey is enough to read them."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.calibration import reliability, risk_coverage
from bora_pyro.diagnostics.plots.calibration import _wrapped
from bora_pyro.errors import InputError
from tests.diagnostics.plot_data import check_legible


def reliability_table(number=900, *, power=1.5, seed=0):
    generator = np.random.default_rng(seed)
    confidence = generator.beta(0.8, 1.2, number)
    return reliability(confidence, generator.random(number) < confidence**power)


def risk_table(noise=0.0, *, number=400, seed=0):
    generator = np.random.default_rng(seed)
    doubt = generator.gamma(2, 1, number)
    loss = generator.random(number) < doubt / 8
    return risk_coverage(doubt + noise * generator.normal(size=number), loss)


RELIABILITY = {"MAP": reliability_table(), "mixture": reliability_table(seed=1, power=1.1), "base": reliability_table(90)}
RISKS = {"total": risk_table(), "epistemic": risk_table(2.0), "aleatoric": risk_table(0.5)}
SCORES = {"own": np.linspace(0, 1, 40), "foreign": np.linspace(0.4, 2, 9), "one": [0.7]}
TOKENS = ["Return", " the", " betw", "een", "ness", " of", " $k$", " nodes", ".", "\n\n   ", "Done", ""]
VALUES = np.linspace(0, 1.1, len(TOKENS))

DRAWINGS = {
    "reliability_diagram": lambda ax: plots.reliability_diagram(RELIABILITY, ax),
    "reliability_diagram, few": lambda ax: plots.reliability_diagram({"five": reliability([0.1, 0.5, 1], [0, 1, 1])}, ax),
    "risk_coverage_curves": lambda ax: plots.risk_coverage_curves(RISKS, ax),
    "risk_coverage_curves, one": lambda ax: plots.risk_coverage_curves({"one": risk_coverage([1.0], [0.3])}, ax),
    "scores_by_origin": lambda ax: plots.scores_by_origin(SCORES, ax, score="mean epistemic uncertainty (nats a token)"),
}


def shown_texts(figure):
    """Every text that is seen, of the axes within axes too, with its box in pixels."""
    figure.canvas.draw()
    axes = [*figure.axes, *(child for ax in figure.axes for child in ax.child_axes)]
    seen = []
    for axis in itertools.chain.from_iterable((ax.xaxis, ax.yaxis) for ax in axes if ax.axison):
        low, high = sorted(axis.get_view_interval())
        seen += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        seen.append(axis.label)
    for ax in axes:
        seen += [ax.title, *ax.texts]
        if ax.get_legend() is not None:
            seen += ax.get_legend().get_texts()
    return [(text, text.get_window_extent()) for text in seen if text.get_text().strip()]


def line_of(ax, gid):
    [line] = [line for line in ax.lines if line.get_gid() == gid]
    return np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("name", [*DRAWINGS, "token_uncertainty"])
def test_the_axis_comes_back_and_no_text_is_small_cut_or_covered(ax, name):
    draw = DRAWINGS.get(name, lambda ax: plots.token_uncertainty(TOKENS, VALUES, ax))
    assert draw(ax) is ax
    texts = shown_texts(ax.figure)
    assert len(texts) > 8
    check_legible(ax.figure, texts)


@pytest.mark.parametrize("name", DRAWINGS)
def test_axes_are_named_and_series_are_told_apart_in_grey(ax, name):
    DRAWINGS[name](ax)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    looks = [(str(handle.get_marker()), str(handle.get_linestyle())) for handle in ax.get_legend().get_lines()]
    assert len(set(looks)) == len(looks)


# reliability


def test_the_diagram_draws_the_table(ax):
    plots.reliability_diagram(RELIABILITY, ax)
    np.testing.assert_array_equal(line_of(ax, "diagonal"), [[0, 0], [1, 1]])
    [strip] = ax.child_axes
    for (name, table), bars in zip(RELIABILITY.items(), ax.containers, strict=True):
        np.testing.assert_allclose(line_of(ax, name), table[["confidence", "accuracy"]])
        ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
        spread = 2 * table["standard_error"]
        np.testing.assert_allclose(ends[:, 0], (table["accuracy"] - spread).clip(0), atol=1e-12)
        np.testing.assert_allclose(ends[:, 1], (table["accuracy"] + spread).clip(upper=1), atol=1e-12)
        stairs = [patch.get_data() for patch in strip.patches if patch.get_gid() == name]
        assert sum(data.values.sum() for data in stairs) == pytest.approx(1)
    table = RELIABILITY["MAP"]
    ece = np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["count"])
    assert legend_texts(ax)[0] == f"MAP: ECE {ece:.3f}, n = 900"


def test_the_histogram_has_gaps_where_bins_are_empty(ax):
    plots.reliability_diagram({"five": reliability([0.1, 0.3, 0.3, 0.9], [0, 1, 0, 1], bins=5)}, ax)
    [strip] = ax.child_axes
    first, second = (patch.get_data() for patch in strip.patches)
    np.testing.assert_allclose(first.edges, [0, 0.2, 0.4])
    np.testing.assert_allclose(first.values, [0.25, 0.5])
    np.testing.assert_allclose(second.edges, [0.8, 1])
    np.testing.assert_allclose(second.values, [0.25])


def test_the_histogram_lies_below_the_points_on_the_same_confidences(ax):
    plots.reliability_diagram(RELIABILITY, ax)
    ax.figure.canvas.draw()
    [strip] = ax.child_axes
    inner, outer = strip.get_window_extent(), ax.get_window_extent()
    assert inner.y1 < ax.transData.transform((0, 0))[1]
    assert (inner.x0, inner.x1) == pytest.approx((outer.x0, outer.x1))
    assert strip.get_xlim() == ax.get_xlim() == (0, 1)


# risk and coverage


def test_the_curves_are_the_tables_from_a_coverage_of_2_percent_on(ax):
    plots.risk_coverage_curves(RISKS, ax, risk="share of wrong tokens")
    for name, table in RISKS.items():
        np.testing.assert_array_equal(line_of(ax, name), table.loc[table["coverage"] >= 0.02, ["coverage", "risk"]])
    assert len(line_of(ax, "total")) == 393
    assert ax.get_ylabel() == "share of wrong tokens"
    assert legend_texts(ax) == [*RISKS, "nothing refused"]


def test_without_a_common_end_there_is_no_line_for_nothing_refused(ax):
    other = risk_coverage([1.0, 2.0], [0.0, 1.8])
    plots.risk_coverage_curves({"one": RISKS["total"], "other": other}, ax)
    assert legend_texts(ax) == ["one", "other"]


# foreign texts


def test_the_shares_are_those_at_or_below_each_score(ax):
    plots.scores_by_origin({"own": [3.0, 1.0, 2.0, 2.0]}, ax)
    np.testing.assert_array_equal(line_of(ax, "own"), [[1, 0], [1, 0.25], [2, 0.5], [2, 0.75], [3, 1]])
    assert ax.lines[0].get_drawstyle() == "steps-post"
    assert legend_texts(ax) == ["own (n = 4)"]


# tokens


def wrapped(tokens, columns):
    """The lines, as they are read."""
    lines = {}
    for piece in _wrapped(tokens, columns):
        before = lines.setdefault(piece.line, "")
        assert piece.column == len(before)
        assert piece.column + piece.width <= columns
        lines[piece.line] = before + piece.text
    assert sorted(lines) == list(range(len(lines)))
    return [*lines.values()]


@pytest.mark.parametrize(
    ("tokens", "columns", "lines"),
    [
        (["one", " two", " three"], 20, ["one two three"]),
        (["one", " two", " three"], 9, ["one two", "three"]),
        (["one", " two", " three"], 7, ["one two", "three"]),
        (["one", " tw", "o", " three"], 6, ["one", "two", "three"]),  # a word of two tokens stays together
        (["a", " abcdefgh", "ij"], 5, ["a", "abcde", "fghij"]),  # unless it is longer than a line
        (["one", "\n", "two"], 20, ["one↵", "two"]),
        (["one", "\n\n  ", "two"], 20, ["one↵", "↵", "  two"]),
        (["one\ttwo", "", "\r"], 20, ["one two "]),
        ([" one", " two"], 20, [" one two"]),
    ],
)
def test_lines_are_broken_between_words(tokens, columns, lines):
    assert wrapped(tokens, columns) == lines


def test_wide_letters_take_two_columns_and_accents_none():
    pieces = list(_wrapped(["日本", "e\u0301"], 10))
    assert [(piece.column, piece.width) for piece in pieces] == [(0, 4), (4, 1)]


def test_each_token_stands_on_its_uncertainty(ax):
    plots.token_uncertainty(TOKENS, VALUES, ax)
    ax.figure.canvas.draw()
    colors = plt.get_cmap("Blues")
    boxes = {int(patch.get_gid().split()[1]): patch for patch in ax.patches if str(patch.get_gid()).startswith("token")}
    assert sorted(boxes) == list(range(len(TOKENS) - 1))  # the last is an empty text
    for n, box in boxes.items():
        assert box.get_facecolor() == colors(VALUES[n] / VALUES.max())
    for text in ax.texts:
        n = int(text.get_gid().split()[1])
        assert to_rgba(text.get_color()) == to_rgba("white" if VALUES[n] > 0.7 * VALUES.max() else "black")
        if text.get_text().strip() and n != 9:  # the one of several lines
            outer, inner = boxes[n].get_window_extent(), text.get_window_extent()
            assert outer.x0 - 1 <= inner.x0 <= inner.x1 <= outer.x1 + 1, text
            assert outer.y0 <= (inner.y0 + inner.y1) / 2 <= outer.y1, text
    assert any(text.get_text() == " $k$" and not text.get_parse_math() for text in ax.texts)
    [bar] = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_xlabel() == "epistemic uncertainty (nats)"
    assert bar.get_xlim() == (0, VALUES.max())


def test_the_boxes_keep_to_their_letters_when_the_layout_changes(ax):
    plots.token_uncertainty(TOKENS, VALUES, ax)
    ax.figure.set_size_inches(7, 5)
    ax.figure.canvas.draw()
    [box] = [patch for patch in ax.patches if patch.get_gid() == "token 0"]
    [text] = [text for text in ax.texts if text.get_gid() == "token 0"]
    outer, inner, room = box.get_window_extent(), text.get_window_extent(), ax.get_window_extent()
    assert outer.x0 == pytest.approx(room.x0)
    assert inner.width == pytest.approx(outer.width, abs=3)
    assert outer.y0 <= (inner.y0 + inner.y1) / 2 <= outer.y1


@pytest.mark.parametrize(("highest", "extend"), [(0.5, "max"), (2.0, "neither")])
def test_several_texts_share_a_scale(ax, highest, extend):
    plots.token_uncertainty(TOKENS, VALUES, ax, highest=highest, label="total (nats)")
    [bar] = [other for other in ax.figure.axes if other is not ax]
    assert bar._colorbar.extend == extend
    assert bar.get_xlim() == (0, highest)
    [box] = [patch for patch in ax.patches if patch.get_gid() == "token 4"]
    assert box.get_facecolor() == plt.get_cmap("Blues")(VALUES[4] / highest)


def test_a_text_without_uncertainty_is_drawn(ax):
    plots.token_uncertainty(TOKENS, np.full(len(TOKENS), -1e-7), ax)  # as rounding leaves it
    assert {patch.get_facecolor() for patch in ax.patches if patch.get_gid()} == {plt.get_cmap("Blues")(0.0)}


# bad input


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda ax: plots.reliability_diagram({}, ax),
            "0 tables given; give 1 or more of bora_pyro.diagnostics.calibration.reliability",
        ),
        (
            lambda ax: plots.reliability_diagram({"MAP": RISKS["total"]}, ax),
            "'MAP' has no column 'lower'; it has coverage, risk, threshold",
        ),
        (
            lambda ax: plots.risk_coverage_curves({"MAP": pd.DataFrame({"coverage": [1.0], "risks": [1.0]})}, ax),
            "no column 'risk'; it has coverage, risks; did you mean 'risks'",
        ),
        (lambda ax: plots.risk_coverage_curves({"MAP": RISKS["total"][:0]}, ax), "table 'MAP' has no rows"),
        (lambda ax: plots.scores_by_origin({}, ax), "0 origins given"),
        (lambda ax: plots.scores_by_origin({"own": []}, ax), "scores of 'own' are none"),
        (lambda ax: plots.scores_by_origin({"own": [1.0, np.nan]}, ax), "scores of 'own' are NaN in part"),
        (lambda ax: plots.token_uncertainty(["a"], [1.0, 2.0], ax), "1 tokens and 2 values given"),
        (lambda ax: plots.token_uncertainty([], [], ax), "0 tokens and 0 values given"),
        (lambda ax: plots.token_uncertainty(["a", "\n"], [1.0, -2.0], ax), r"value of token 1 \('\\n'\) is -2"),
        (lambda ax: plots.token_uncertainty(["a"], [np.inf], ax), "value of token 0 .* is inf"),
        (lambda ax: plots.token_uncertainty(["a"], [1.0], ax, highest=0), "highest is 0; give a number above 0"),
        (
            lambda ax: plots.token_uncertainty([" word"] * 400, [1.0] * 400, ax),
            r"has \d+ lines .* or a figure \d+\.\d inches high",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(ax, draw, message):
    with pytest.raises(InputError, match=message) as caught:
        draw(ax)
    assert "\n" not in str(caught.value)


def test_the_height_that_is_asked_for_is_enough():
    plt.switch_backend("Agg")
    tokens = [" word"] * 400
    with plots.style():
        figure, ax = plt.subplots(figsize=(5, 4))
        with pytest.raises(InputError) as caught:
            plots.token_uncertainty(tokens, np.ones(400), ax)
        plt.close(figure)
        figure, ax = plt.subplots(figsize=(5, float(str(caught.value).split()[-3])))
        plots.token_uncertainty(tokens, np.ones(400), ax)
        plt.close(figure)
