"""Plots of predictions: are they as often right as they say, what does refusing the doubtful ones buy, where lies the doubt.

Each takes an axis and data and returns the axis. The tables are those of ``bora_pyro.diagnostics.calibration``.

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

_STRIP = (-0.30, 0.21)  # where the histogram of a reliability diagram begins below accuracy 0, and its height
_FIRST = 0.02  # the coverage at which risk-coverage curves begin; below, a risk is the mean of few predictions
_TEXT, _LINE, _MONOSPACE = 9.0, 1.7, "DejaVu Sans Mono"  # size of a token in points, lines a size, the font
_FEED = "↵"
_ROUNDING = 1e-4  # nats by which a difference of two entropies of float32 may lie below 0
_DARK = 0.7  # beyond this share of the scale the background wants white letters


def reliability_diagram(tables: Mapping[str, pd.DataFrame], ax: Axes) -> Axes:
    """Accuracy against confidence, bin by bin, with ±2 standard errors; a calibrated model lies on the diagonal.

    Below them stands the share of the predictions in each bin. The legend has each model's expected calibration error and
    number of predictions n.

    Args:
        ax: where to draw.
        tables: the table of `bora_pyro.diagnostics.calibration.reliability` by the model's name.

    Raises:
        InputError: there is no table, one has no rows, or lacks a column.
    """
    _checked(tables, ("lower", "upper", "confidence", "accuracy", "count", "standard_error"), "reliability")
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, gid="diagonal")
    start, height = _STRIP
    strip = ax.inset_axes((0, start, 1, height), transform=ax.transData)
    for (name, table), (color, marker, line) in zip(tables.items(), _looks(), strict=False):
        number = table["count"].sum()
        share = table["count"] / number
        ece = float((share * (table["accuracy"] - table["confidence"]).abs()).sum())
        accuracy, spread = table["accuracy"], 2 * table["standard_error"]
        around = [np.minimum(spread, accuracy), np.minimum(spread, 1 - accuracy)]
        ax.errorbar(table["confidence"], accuracy, around, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.7)
        label = f"{name}: ECE {ece:.3f}, n = {number}"
        ax.plot(table["confidence"], accuracy, color=color, marker=marker, linestyle=line, label=label, gid=name)
        for lower, upper, part in _runs(table, share):
            edges = [*lower, upper]
            strip.stairs(part, edges, color=color, linestyle=line, linewidth=1.2, gid=name)
    strip.set_xlim(0, 1)
    strip.set_ylim(bottom=0)
    strip.set_xticks([])
    strip.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    strip.locator_params(axis="y", nbins=2)
    strip.set_ylabel("share")
    ax.set_xlim(0, 1)
    ax.set_ylim(start, 1)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.spines["left"].set_bounds(0, 1)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    legend_above(ax, ncols=2)
    return ax


def _runs(table: pd.DataFrame, share: pd.Series) -> Iterator[tuple[list[float], float, list[float]]]:
    """Neighbouring bins together: their lower edges, the last one's upper edge, and their shares."""
    lower, upper, parts = table["lower"].tolist(), table["upper"].tolist(), share.tolist()
    start = 0
    for n in range(1, len(lower) + 1):
        if n == len(lower) or not np.isclose(upper[n - 1], lower[n]):
            yield lower[start:n], upper[n - 1], parts[start:n]
            start = n


def risk_coverage_curves(
    tables: Mapping[str, pd.DataFrame], ax: Axes, *, risk: str = "mean loss of the predictions kept"
) -> Axes:
    """What refusing the most uncertain predictions buys: the risk of those kept, against the share that is kept.

    The curves begin at a coverage of 2 %; below, a risk is the mean of few predictions. A dotted line is the risk with nothing
    refused, where all curves end in the same one.

    Args:
        ax: where to draw.
        tables: the table of `bora_pyro.diagnostics.calibration.risk_coverage` by the uncertainty's or the model's name.
        risk: the label of the y axis.

    Raises:
        InputError: there is no table, one has no rows, or lacks a column.
    """
    _checked(tables, ("coverage", "risk"), "risk_coverage")
    for n, ((name, table), (color, marker, line)) in enumerate(zip(tables.items(), _looks(), strict=False)):
        table = table[table["coverage"] >= _FIRST]
        # markers at even coverages, shifted from curve to curve so that they do not hide one another
        places = (np.arange(10) + (n + 0.5) / len(tables)) / 10
        marked = np.unique(np.searchsorted(table["coverage"], places)).tolist()
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
    """How a score of texts is distributed by where they come from, as cumulative shares: the tasks' own, foreign ones.

    Args:
        ax: where to draw.
        scores: a score each text, (texts,), by origin.
        score: the label of the x axis, with the unit.

    Raises:
        InputError: there is no origin, or one has no scores or a NaN among them.
    """
    if not scores:
        raise InputError("0 origins given; give the scores of 1 or more, by name")
    for (name, given), (color, marker, line) in zip(scores.items(), _looks(), strict=False):
        values = np.sort(np.asarray(given, float).reshape(-1))
        if not len(values) or np.isnan(values).any():
            raise InputError(f"the scores of {name!r} are {'NaN in part' if len(values) else 'none'}; give numbers, one a text")
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
    """A text, each token on a background as dark as its uncertainty, with a colour bar.

    Lines are broken between words, within one that is longer than a line, and behind a line feed, drawn as ↵. Call it last, for
    the lines are as long as the figure's layout has room for them then.

    Args:
        ax: where to draw; it loses its spines and ticks, and some of its room to the colour bar.
        tokens: the tokens as texts, spaces included.
        values: (tokens,) the uncertainty of each, 0 or more.
        label: of the colour bar, with the unit.
        highest: the value that is darkest, default the highest of ``values``; give one to compare several texts.

    Raises:
        InputError: sizes disagree, there are no tokens, a value is NaN or below 0, or the text has more lines than the axis has
            room for.
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
    figure.draw_without_rendering()  # settles the layout, and with it how many letters a line has
    probe = ax.text(0, 0, "m" * 100, fontsize=_TEXT, family=_MONOSPACE)
    letter, height = probe.get_window_extent().width / figure.dpi / 100, _LINE * _TEXT / 72  # inches
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
    # letters and lines from the axis' upper left corner: the letters keep to their boxes should the layout change after all
    corner = ScaledTranslation(0, 1, ax.transAxes)  # type: ignore[arg-type]  # it is affine, though not declared so
    place = Affine2D().scale(letter, -height) + figure.dpi_scale_trans + corner
    for piece in pieces:
        level, gid = float(norm(amounts[piece.token])), f"token {piece.token}"
        start = (piece.column, piece.line + 0.08)
        look: dict[str, Any] = {"facecolor": colors(level), "edgecolor": "white", "linewidth": 0.6}
        ax.add_artist(Rectangle(start, piece.width, 0.84, transform=place, gid=gid, **look))
        ax.text(
            piece.column, piece.line + 0.5, piece.text, transform=place, fontsize=_TEXT, family=_MONOSPACE,
            va="center_baseline", color="white" if level > _DARK else "black", parse_math=False, gid=gid,
        )  # fmt: skip
    return ax


class _Piece(NamedTuple):
    """A token, or a part of one that is longer than a line, and where it stands, in lines and letters."""

    token: int
    text: str
    line: int
    column: int
    width: int


def _wrapped(tokens: Sequence[str], columns: int) -> Iterator[_Piece]:
    """Where each token stands in lines of ``columns`` letters."""
    line = column = 0
    for word in _words(tokens):
        whole = sum(_width(text) for _, text in word)
        if column and column + whole > columns:
            line, column = line + 1, 0
            first, text = word[0]
            word[0] = first, text.lstrip(" ") or text  # a line needs no space at its beginning
        for token, text in word:
            for part in _parts(text, columns):
                if column + _width(part) > columns:
                    line, column = line + 1, 0
                yield _Piece(token, part, line, column, _width(part))
                column += _width(part)
                if part.endswith(_FEED):
                    line, column = line + 1, 0


def _words(tokens: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Tokens up to the next space or line feed together, with what is drawn of them; empty ones are left out."""
    word: list[tuple[int, str]] = []
    for n, token in enumerate(tokens):
        shown = (_FEED if c == "\n" else " " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in token)
        text = "".join(shown)
        if word and (text.startswith(" ") or _FEED in word[-1][1]):
            yield word
            word = []
        if text:
            word.append((n, text))
    if word:
        yield word


def _parts(text: str, columns: int) -> Iterator[str]:
    """A text in parts that fit into a line each, and end at its line feeds."""
    part = ""
    for letter in text:
        if part and (part.endswith(_FEED) or _width(part + letter) > columns):
            yield part
            part = ""
        part += letter
    yield part


def _width(text: str) -> int:
    """How many letters of the font a text takes: wide ones two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _looks() -> Iterator[tuple[str, str, Any]]:
    """Colour, marker and line of one series after another."""
    for n in itertools.count():
        yield PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)], LINES[n % len(LINES)]


def _checked(tables: Mapping[str, pd.DataFrame], columns: Sequence[str], source: str) -> None:
    if not tables:
        raise InputError(f"0 tables given; give 1 or more of bora_pyro.diagnostics.calibration.{source}, by name")
    for name, table in tables.items():
        for column in columns:
            if column not in table.columns:
                there = f"it has {', '.join(map(str, table.columns))}{nearest(column, map(str, table.columns))}"
                raise InputError(f"the table {name!r} has no column {column!r}; {there}")
        if table.empty:
            raise InputError(f"the table {name!r} has no rows; give one of bora_pyro.diagnostics.calibration.{source}")
