"""Plots of predictions: calibration, risk against coverage, scores of texts, and the uncertainty of each token of a text.

Each function takes data and an axis, and returns the axis. The tables are those of ``bora_pyro.diagnostics.calibration``.

>>> import matplotlib.pyplot as plt
>>> from bora_pyro.diagnostics.calibration import reliability
>>> figure, ax = plt.subplots()
>>> ax = reliability_diagram({"MAP": reliability([0.9, 0.9, 0.4], [True, False, False])}, ax)
>>> ax.get_legend().get_texts()[0].get_text()
'MAP: ECE 0.400, n = 3'
>>> plt.close(figure)
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Affine2D, ScaledTranslation
from numpy.typing import ArrayLike

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import GREY, LINES, MARKERS, PALETTE
from bora_pyro.errors import InputError, nearest

_HISTOGRAM = (-0.30, 0.21)  # lower edge of a reliability diagram's histogram in units of accuracy, and its height
_MIN_COVERAGE = 0.02  # risk-coverage curves begin here; below, the risk is a mean of few predictions
_FONT_SIZE, _LINE_HEIGHT, _FONT = 9.0, 1.7, "DejaVu Sans Mono"  # of a text's tokens: points, font sizes per line, font
_LINE_FEED = "↵"
_ROUNDING = 1e-4  # nats by which rounding may take a difference of two float32 entropies below 0
_WHITE_ABOVE = 0.7  # letters are white on a background above this fraction of the colour scale


def reliability_diagram(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Draw accuracy against confidence for each bin, with ±2 standard errors. A calibrated model lies on the diagonal.

    A histogram below shows the share of the predictions in each bin. The legend has each model's expected calibration error
    and number of predictions n.

    Args:
        ax: the axis to draw on.
        tables: tables of `bora_pyro.diagnostics.calibration.reliability`, by name of the model.

    Raises:
        InputError: if there is no table, or one has no rows or lacks a column.
    """
    _check_tables(tables, ("lower", "upper", "confidence", "accuracy", "count", "standard_error"), "reliability")
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, gid="diagonal")
    start, height = _HISTOGRAM
    histogram = ax.inset_axes((0, start, 1, height), transform=ax.transData)
    for (name, table), (color, marker, line) in zip(tables.items(), _line_styles(), strict=False):
        number = table["count"].sum()
        share = table["count"] / number
        ece = float((share * (table["accuracy"] - table["confidence"]).abs()).sum())
        accuracy, spread = table["accuracy"], 2 * table["standard_error"]
        errors = [np.minimum(spread, accuracy), np.minimum(spread, 1 - accuracy)]
        ax.errorbar(table["confidence"], accuracy, errors, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.7)
        label = f"{name}: ECE {ece:.3f}, n = {number}"
        ax.plot(table["confidence"], accuracy, color=color, marker=marker, linestyle=line, label=label, gid=name)
        for edges, shares in _adjacent_bins(table, share):
            histogram.stairs(shares, edges, color=color, linestyle=line, linewidth=1.2, gid=name)
    histogram.set_xlim(0, 1)
    histogram.set_ylim(bottom=0)
    histogram.set_xticks([])
    histogram.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    histogram.locator_params(axis="y", nbins=2)
    histogram.set_ylabel("share")
    ax.set_xlim(0, 1)
    ax.set_ylim(start, 1)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.spines["left"].set_bounds(0, 1)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    legend_above(ax, ncols=2)
    return ax


def _adjacent_bins(table: pd.DataFrame, share: pd.Series) -> Iterator[tuple[list[float], list[float]]]:
    """The edges and the shares of each group of adjacent bins. Empty bins, which have no row, separate the groups."""
    lower, upper, shares = table["lower"].tolist(), table["upper"].tolist(), share.tolist()
    start = 0
    for n in range(1, len(lower) + 1):
        if n == len(lower) or not np.isclose(upper[n - 1], lower[n]):
            yield [*lower[start:n], upper[n - 1]], shares[start:n]
            start = n


def risk_coverage_curves(
    tables: Mapping[str, pd.DataFrame], ax: Axes, *, risk: str = "mean loss of the predictions kept"
) -> Axes:
    """Draw the risk of the predictions kept against their share, when the most uncertain predictions are rejected.

    The curves begin at a coverage of 2 %, because below it the risk is a mean of few predictions. If all curves end at the same
    risk, a dotted line shows this risk of all predictions.

    Args:
        ax: the axis to draw on.
        tables: tables of `bora_pyro.diagnostics.calibration.risk_coverage`, by name of the uncertainty or the model.
        risk: the label of the y axis.

    Raises:
        InputError: if there is no table, or one has no rows or lacks a column.
    """
    _check_tables(tables, ("coverage", "risk"), "risk_coverage")
    for n, ((name, table), (color, marker, line)) in enumerate(zip(tables.items(), _line_styles(), strict=False)):
        table = table[table["coverage"] >= _MIN_COVERAGE]
        # markers at equal steps of coverage, shifted between curves so that they do not hide each other
        coverages = (np.arange(10) + (n + 0.5) / len(tables)) / 10
        marked = np.unique(np.searchsorted(table["coverage"], coverages)).tolist()
        ax.plot(
            table["coverage"], table["risk"], color=color, linestyle=line, marker=marker, markevery=marked, label=name, gid=name
        )
    ends = np.array([table["risk"].iloc[-1] for table in tables.values()])
    if np.allclose(ends, ends[0]):
        ax.axhline(ends[0], color=GREY, linestyle=(0, (1, 2)), linewidth=1, label="nothing refused")
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("coverage: share of the predictions kept")
    ax.set_ylabel(risk)
    legend_above(ax, ncols=2)
    return ax


def scores_by_origin(scores: Mapping[str, ArrayLike], ax: Axes, *, score: str = "score") -> Axes:
    """Draw the cumulative distribution of a score for each origin of texts, for instance own and foreign texts.

    Args:
        ax: the axis to draw on.
        scores: the scores of the texts, (texts,), by name of their origin.
        score: the label of the x axis, with the unit.

    Raises:
        InputError: if there is no origin, or one has no scores or a NaN.
    """
    if not scores:
        raise InputError("0 origins given; give the scores of 1 or more, by name")
    for (name, given), (color, marker, line) in zip(scores.items(), _line_styles(), strict=False):
        values = np.sort(np.asarray(given, float).reshape(-1))
        if not len(values) or np.isnan(values).any():
            raise InputError(f"the scores of {name!r} are {'NaN in part' if len(values) else 'none'}; give numbers, one per text")
        share = np.arange(1, len(values) + 1) / len(values)
        every = max(1, len(values) // 8)
        ax.plot(
            np.r_[values[0], values], np.r_[0, share], drawstyle="steps-post", color=color, linestyle=line, marker=marker,
            markevery=(every // 2, every), label=f"{name} (n = {len(values)})", gid=name,
        )  # fmt: skip
    ax.set_ylim(0, 1.02)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel(score)
    ax.set_ylabel("share of the texts at or below")
    legend_above(ax, ncols=2)
    return ax


def token_uncertainty(
    tokens: Sequence[str],
    values: ArrayLike,
    ax: Axes,
    *,
    label: str = "epistemic uncertainty (nats)",
    highest: float | None = None,
) -> Axes:
    """Draw a text with a colour bar. The background of each token is darker, the higher its uncertainty.

    Lines break between words, inside words that are longer than a line, and after a line feed, which is drawn as ↵. Call this
    function last, because the length of a line depends on the layout of the figure at the time of the call.

    Args:
        ax: the axis to draw on. Its spines and ticks are removed, and the colour bar takes some of its space.
        tokens: the tokens as texts, spaces included.
        values: (tokens,) the uncertainty of each token, 0 or more.
        label: the label of the colour bar, with the unit.
        highest: the value of the darkest colour; default: the highest of ``values``. Give it to compare several texts.

    Raises:
        InputError: if the sizes differ, there are no tokens, a value is NaN or below 0, or the axis has too little space for the
            lines of the text.
    """
    amounts = np.asarray(values, float).reshape(-1)
    if not len(tokens) or len(tokens) != len(amounts):
        raise InputError(f"{len(tokens)} tokens and {len(amounts)} values given; give 1 or more, a value each")
    valid = (amounts >= -_ROUNDING) & np.isfinite(amounts)
    if not valid.all():
        n = int(np.argmin(valid))
        raise InputError(f"the value of token {n} ({tokens[n]!r}) is {amounts[n]:g}; give uncertainties of 0 or more")
    amounts = amounts.clip(0)
    if highest is not None and not 0 < highest < math.inf:
        raise InputError(f"highest is {highest}; give a number above 0, or None for the highest value")
    figure = ax.figure.figure
    ax.set_axis_off()
    norm = Normalize(0, highest or float(amounts.max()) or 1.0)
    colors = mpl.colormaps["Blues"]
    bar = figure.colorbar(
        ScalarMappable(norm, colors), ax=ax, location="bottom", fraction=0.06, pad=0.04, aspect=40, shrink=0.7,
        extend="max" if (amounts > norm.vmax).any() else "neither", ticks=MaxNLocator(6),
    )  # fmt: skip
    bar.set_label(label)
    figure.draw_without_rendering()  # computes the layout, which fixes the number of letters per line
    probe = ax.text(0, 0, "m" * 100, fontsize=_FONT_SIZE, family=_FONT)
    letter, height = probe.get_window_extent().width / figure.dpi / 100, _LINE_HEIGHT * _FONT_SIZE / 72  # inches
    probe.remove()
    room = ax.get_window_extent()
    columns, lines = int(room.width / figure.dpi / letter), int(room.height / figure.dpi / height)
    pieces = list(_wrapped(tokens, max(columns, 2)))
    needed = 1 + max((piece.line for piece in pieces), default=0)
    if needed > lines:
        size = figure.get_figheight() * needed / max(lines, 1)
        raise InputError(
            f"the text has {needed} lines and the axis room for {lines}; give fewer tokens or a figure {size:.1f} inches high"
        )
    # units of letters and lines from the axis' upper left corner, so that letters stay in their boxes if the layout changes
    corner = ScaledTranslation(0, 1, ax.transAxes)  # type: ignore[arg-type]  # it is affine, though not declared so
    place = Affine2D().scale(letter, -height) + figure.dpi_scale_trans + corner
    for piece in pieces:
        level, gid = float(norm(amounts[piece.token])), f"token {piece.token}"
        start = (piece.column, piece.line + 0.08)
        box_style: dict[str, Any] = {"facecolor": colors(level), "edgecolor": "white", "linewidth": 0.6}
        ax.add_artist(Rectangle(start, piece.width, 0.84, transform=place, gid=gid, **box_style))
        ax.text(
            piece.column, piece.line + 0.5, piece.text, transform=place, fontsize=_FONT_SIZE, family=_FONT,
            va="center_baseline", color="white" if level > _WHITE_ABOVE else "black", parse_math=False, gid=gid,
        )  # fmt: skip
    return ax


class _Piece(NamedTuple):
    """A token, or a part of a token that is longer than a line, and its position in lines and letters."""

    token: int
    text: str
    line: int
    column: int
    width: int


def _wrapped(tokens: Sequence[str], columns: int) -> Iterator[_Piece]:
    """The position of each token in lines of ``columns`` letters."""
    line = column = 0
    for word in _words(tokens):
        whole = sum(_width(text) for _, text in word)
        if column and column + whole > columns:
            line, column = line + 1, 0
            first, text = word[0]
            word[0] = first, text.lstrip(" ") or text  # no space at the beginning of a line
        for token, text in word:
            for part in _parts(text, columns):
                if column + _width(part) > columns:
                    line, column = line + 1, 0
                yield _Piece(token, part, line, column, _width(part))
                column += _width(part)
                if part.endswith(_LINE_FEED):
                    line, column = line + 1, 0


def _words(tokens: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Groups of tokens that end before a space or after a line feed, as (index, text to draw). Empty tokens are left out."""
    word: list[tuple[int, str]] = []
    for n, token in enumerate(tokens):
        shown = (_LINE_FEED if c == "\n" else " " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in token)
        text = "".join(shown)
        if word and (text.startswith(" ") or _LINE_FEED in word[-1][1]):
            yield word
            word = []
        if text:
            word.append((n, text))
    if word:
        yield word


def _parts(text: str, columns: int) -> Iterator[str]:
    """Split a text into parts that fit into a line. A part also ends after each line feed."""
    part = ""
    for letter in text:
        if part and (part.endswith(_LINE_FEED) or _width(part + letter) > columns):
            yield part
            part = ""
        part += letter
    yield part


def _width(text: str) -> int:
    """The width of a text in letters of the font. A wide character counts two, a combining character none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _line_styles() -> Iterator[tuple[str, str, Any]]:
    """Colour, marker and line style of the first series, the second series, and so on."""
    for n in itertools.count():
        yield PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)], LINES[n % len(LINES)]


def _check_tables(tables: Mapping[str, pd.DataFrame], columns: Sequence[str], source: str) -> None:
    if not tables:
        raise InputError(f"0 tables given; give 1 or more of bora_pyro.diagnostics.calibration.{source}, by name")
    for name, table in tables.items():
        for column in columns:
            if column not in table.columns:
                there = f"it has {', '.join(map(str, table.columns))}{nearest(column, map(str, table.columns))}"
                raise InputError(f"the table {name!r} has no column {column!r}; {there}")
        if table.empty:
            raise InputError(f"the table {name!r} has no rows; give one of bora_pyro.diagnostics.calibration.{source}")
