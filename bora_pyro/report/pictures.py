"""Matplotlib drawings as ``svg`` elements of a page. One drawing serves the light and the dark colours of the page.

    >>> picture = draw_picture("line", "A line", "It rises.", lambda ax: ax.plot([0, 1], [0, 1]))
    >>> str(picture.svg)[:11], "var(--blue)" in picture.svg
    ('<svg viewBo', True)

Colours of ``bora_pyro.diagnostics.plots.style`` become CSS variables, which the page's style sheet defines. Texts are drawn as
outlines, so that nothing depends on the reader's fonts. A screen reader gets the title and the caption.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bora_pyro.diagnostics.plots import style as figure_style
from bora_pyro.diagnostics.plots.style import BLACK, BLUE, GREEN, GREY, LIGHT, LIGHT_BLUE, ORANGE, PURPLE, SKY, SMALL, VERMILLION
from bora_pyro.files.text import replaced
from bora_pyro.report.blocks import Picture

#: Size of a drawing in inches. The smallest letters are then over 8 pixels high on a phone and over 14 on a desktop screen.
WIDTH, HEIGHT = 4.1, 3.2
#: CSS variables of the colours in drawings. "#B0B0B0" is matplotlib's colour of grid lines.
COLORS = {
    BLACK: "ink", "#FFFFFF": "paper", GREY: "muted", LIGHT: "faint", LIGHT_BLUE: "wash", "#B0B0B0": "grid", BLUE: "blue",
    VERMILLION: "vermillion", GREEN: "green", ORANGE: "orange", PURPLE: "purple", SKY: "sky",
}  # fmt: skip
_LONGEST = 26  # characters of a task's name in a drawing, at most
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_REFERENCE = re.compile(r"#([^)\s]+)")


def draw_picture(
    key: str, title: str, caption: str, draw: Callable[[Axes], Any], *, width: float = WIDTH, height: float = HEIGHT
) -> Picture:
    """Draw one picture.

    Args:
        key: prefix of the ids in the drawing; each picture of a page needs its own.
        title: what the picture shows.
        caption: how to read the picture.
        draw: function that draws on the axes it is given.
        width: width in inches.
        height: height in inches.
    """
    file = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "bora_pyro"}
    with figure_style(), mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # the name is also in the table
        figure = Figure(figsize=(width, height))
        draw(figure.subplots())
        _keep_labels_inside(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Picture(title, caption, Markup(_element(file.getvalue(), key)), width * 96)


def _keep_labels_inside(figure: Figure) -> None:
    """Align, shrink or break axis labels that would reach beyond the edge of the drawing."""
    figure.draw_without_rendering()  # settles the layout
    width, height = figure.bbox.width, figure.bbox.height
    for ax in figure.axes:
        x_label, y_label = ax.xaxis.label, ax.yaxis.label
        if x_label.get_window_extent().x1 > width:
            x_label.set(x=1.0, ha="right")
        elif x_label.get_window_extent().x0 < 0:
            x_label.set(x=0.0, ha="left")
        for label, inside in (
            (x_label, lambda box: box.x0 >= 0 and box.x1 <= width),
            (y_label, lambda box: box.y0 >= 0 and box.y1 <= height),
        ):
            if not inside(label.get_window_extent()):
                label.set_fontsize(SMALL)
            for _ in range(2):
                if inside(label.get_window_extent()):
                    break
                label.set_text("\n".join(_halved(line) for line in label.get_text().split("\n")))


def _halved(line: str) -> str:
    """Break a line at the space that is nearest to its middle."""
    spaces = [n for n, letter in enumerate(line) if letter == " "]
    middle = min(spaces, key=lambda n: abs(2 * n - len(line)), default=None)
    return line if middle is None else f"{line[:middle]}\n{line[middle + 1 :]}"


def name_labels(names: Iterable[str]) -> dict[str, str]:
    """Labels of tasks in a drawing, by task name: one short line each, printable, no formula, no two alike.

    >>> labels = name_labels(["two  spaces", "a very long name of a task, with a comma", "a very long name of a task, alas"])
    >>> list(labels.values())
    ['two spaces', 'a very long name of a tas…', 'a very long name of a tas… (2)']
    """
    labels: dict[str, str] = {}
    for name in names:
        line = replaced(" ".join(name.split())) or "–"
        line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1].rstrip()}…"
        line = line.replace("\\", "∖").replace("$", r"\$")
        label, number = line, 1
        while label in labels.values():
            number += 1
            label = f"{line} ({number})"
        labels[name] = label
    return labels


def _element(document: str, key: str) -> str:
    """The ``svg`` element of matplotlib's document, with ids that begin with ``key`` and with the page's colours."""
    root = ElementTree.fromstring(replaced(document, keep="\n"))  # comments repeat all texts, also ones that XML does not allow
    used = {name for element in root.iter() for value in element.attrib.values() for name in _REFERENCE.findall(value)}
    for element in root.iter():
        for child in [*element]:
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {name.removeprefix(_XLINK): value for name, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        for name, value in attributes.items():
            element.set(name, f"{key}-{value}" if name == "id" else _value(name, value, key))
    size = root.attrib["viewBox"]
    root.attrib.clear()
    # matplotlib writes no colour for black and sets line joins in a style sheet, which would apply to the whole page
    root.attrib.update(
        {"viewBox": size, "aria-hidden": "true", "fill": "currentColor", "stroke-linejoin": "round", "stroke-linecap": "butt"}
    )
    return ElementTree.tostring(root, encoding="unicode")


def _value(name: str, value: str, key: str) -> str:
    if name in ("href", "clip-path") and not value.startswith("data:"):
        return _REFERENCE.sub(lambda found: f"#{key}-{found[1]}", value)
    if name in ("style", "fill", "stroke"):
        return re.sub(r"#[0-9a-fA-F]{6}", lambda found: _color(found[0]), value)
    return value


def _color(color: str) -> str:
    name = COLORS.get(color.upper())
    return color if name is None else f"var(--{name})"
