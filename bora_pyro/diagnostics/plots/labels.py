"""Labels beside points, and a legend, that do not overlap points or each other.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> _ = ax.plot([0, 1, 1], [0, 1, 1], "o")
>>> [label.get_text() for label in place_labels(ax, [0, 1], [0, 1], ["first", "second"])]
['second', 'first']
>>> plt.close(figure)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from bora_pyro.diagnostics.plots.style import GREY, SMALL

# Positions of a label around its point: direction, and gap in typographic points. Beyond the first gap a thin line joins them.
_DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)], float)
_GAPS = (5.0, 10.0, 16.0, 24.0)
_MARKER = 3.5  # half the size of a marker, in points


def legend_above(ax: Axes, *, ncols: int = 1) -> None:
    """Put a legend at the top inside the axis, and extend the y axis upwards so that no data lie behind the legend.

    Args:
        ax: the axis, with everything drawn.
        ncols: number of columns of the legend. Fewer are used if the legend would be wider than the axis.
    """
    for columns in range(ncols, 0, -1):
        legend = ax.legend(loc="upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
        legend.set_in_layout(False)  # it is inside the axis, so the layout needs no space for it
        ax.figure.figure.draw_without_rendering()  # computes the layout and the size of the legend
        box, room = legend.get_window_extent(), ax.get_window_extent()
        if box.width <= room.width:
            break
    share = box.height / room.height + 0.04
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.array(ax.get_ylim()))
    ax.set_ylim(top=float(scale.inverted().transform(low + (high - low) / (1 - min(share, 0.6)))))


def place_labels(ax: Axes, x: ArrayLike, y: ArrayLike, texts: Sequence[str]) -> list[Annotation]:
    """Write each text beside its point, where it covers no point and no other text. Texts without such a place are left out.

    Points far from the median are labelled first. Call this function last: it uses the present limits of the axis and the
    present layout of the figure.

    Args:
        ax: the axis, with its points and its legend.
        x: (points,) x in data coordinates.
        y: (points,) y in data coordinates.
        texts: (points,) the labels; an empty text is skipped.

    Returns:
        The labels that were drawn.
    """
    figure = ax.figure.figure
    figure.draw_without_rendering()  # computes the layout and the pixel coordinates of the points
    pixels = figure.dpi / 72
    where = np.column_stack([np.asarray(x, float), np.asarray(y, float)])
    points = ax.transData.transform(where)
    room, taken = ax.get_window_extent(), [Bbox([point - _MARKER * pixels, point + _MARKER * pixels]) for point in points]
    taken += [text.get_window_extent() for text in ax.texts if text.get_text()]
    if (legend := ax.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    labels = []
    for index in np.argsort(-np.hypot(*(points - np.median(points, axis=0)).T), kind="stable"):
        if not texts[index]:
            continue
        half = _half_size(ax, texts[index])
        found = _free_place(index, points, half, pixels, taken, room)
        if found is None:
            continue
        box, gap = found
        shift = ((box.p0 + box.p1) / 2 - points[index]) / pixels
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2} if gap > _GAPS[0] else None
        labels.append(
            ax.annotate(
                texts[index], tuple(where[index]), tuple(shift), textcoords="offset points", fontsize=SMALL, ha="center",
                va="center", arrowprops=line,
            )
        )  # fmt: skip
        taken.append(box)
        if line is not None:  # later labels must not cover this line either
            way = points[index] + np.linspace(0.15, 1, 30)[:, None] * (shift * pixels)
            taken += [Bbox([place - 2, place + 2]) for place in way]
    return labels


def _half_size(ax: Axes, text: str) -> np.ndarray:
    """Half the width and height of a text, in pixels."""
    probe = ax.text(0, 0, text, fontsize=SMALL, transform=ax.transAxes)
    extent = probe.get_window_extent()
    probe.remove()
    return np.array([extent.width, extent.height]) / 2


def _free_place(
    index: int, points: np.ndarray, half: np.ndarray, pixels: float, taken: list[Bbox], room: Bbox
) -> tuple[Bbox, float] | None:
    """The nearest free box of half size ``half`` (pixels) around a point, and its gap (typographic points), or None."""
    point = points[index]
    for gap in _GAPS:
        for direction in _DIRECTIONS:
            centre = point + direction * (half + gap * pixels)
            box = Bbox([centre - half - 1, centre + half + 1])
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if not inside or any(box.overlaps(other) for other in taken):
                continue
            if gap == _GAPS[0]:
                # without a line the label must be nearer to its own point than to any other, except to points at the same place
                away = np.hypot(*(points - (centre - direction * half)).T)
                apart = np.hypot(*(points - point).T) > 2
                if not (away[apart] < 1.3 * away[index]).any():
                    return box, gap
                continue
            # the line to the label must not cross another label
            line = point + np.linspace(0.15, 1, 30)[:, None] * (centre - point)
            if not any(other.contains(*place) for other in taken for place in line):
                return box, gap
    return None
