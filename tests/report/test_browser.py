"""The page in a browser: it complains of nothing, sorts by click and key, fits a phone, and is legible in light and dark."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from bora_pyro.diagnostics.plots.style import BLUE
from bora_pyro.report import Cell, Column, Folded, Lines, Number, Page, Pictures, Samples, Section, Table, render
from bora_pyro.report.pictures import draw_picture
from tests.chromium import CHROMIUM, Chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

NAMES = ["b10", "<img src=x onerror=alert(1)>", "b9", "averyveryveryverylongnamewithoutanyspace" * 4]
WIDE = [Column(f"column {n}", 2) for n in range(12)]
ROWS = [[name, value, *([1.5] * 12)] for name, value in zip(NAMES, (2.0, None, 1000.0, 30.0), strict=True)]


def page():
    """A page with every kind of block, wider than a phone."""
    table = Table("Tasks", [Column("task"), Column("perplexity", 2), *WIDE], ROWS, total=["all", 5.0, *([1.5] * 12)])
    pictures = [
        draw_picture("curve", "A curve", "It falls.", lambda ax: ax.plot([0, 1], [1, 0], color=BLUE)),
        draw_picture("wide", "A wide one", "It is wide.", lambda ax: ax.plot([0, 1], [1, 0]), width=14.0),
    ]
    numbers = [Number(f"number {n}", "16.62", "base 36.71") for n in range(7)]
    samples = Samples("Returns the", [("base", "no adapter", " graph" * 40), (NAMES[1], "", "x" * 300)])
    sections = [
        Section("results", "Results", [table], "A sentence."),
        Section("pictures", "Pictures", [Pictures(pictures)]),
        Section("samples", "Samples", [samples]),
        Section("rest", "Rest", [Folded("More", Lines(["one", "two " * 100])), Lines([Cell("x").text])]),
    ]
    return Page("run", NAMES[3], " · ".join(NAMES), numbers, sections, versions={"torch": "2.13.0"})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(page()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


FIRST = "[...document.querySelector('table.sortable').tBodies[0].rows].map(row => row.cells[0].textContent)"
SORTED = "[...document.querySelectorAll('table.sortable th[aria-sort]')].slice(0, 3).map(head => head.ariaSort)"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")])
def test_it_fits_and_complains_of_nothing(browser, file, width, scheme):
    assert browser.load(file, width=width, scheme=scheme) == ([], [])
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.images.length") == 0  # what the hostile name would have made
    browser.evaluate("document.querySelector('details').open = true")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate("[...document.querySelectorAll('.scroll')].map(box => box.scrollWidth > box.clientWidth)")
    assert boxes == [True, False, True]  # what is wider scrolls in a box of its own: the table, and the wide picture


def test_a_click_sorts_and_what_is_missing_stays_last(browser, file):
    browser.load(file)
    assert browser.evaluate(FIRST) == NAMES
    button = "document.querySelectorAll('table.sortable thead button')"
    browser.evaluate(f"{button}[1].click()")
    assert browser.evaluate(FIRST) == [NAMES[0], NAMES[3], NAMES[2], NAMES[1]]
    assert browser.evaluate(SORTED) == ["none", "ascending", "none"]
    browser.evaluate(f"{button}[1].click()")
    assert browser.evaluate(FIRST) == [NAMES[2], NAMES[3], NAMES[0], NAMES[1]]
    assert browser.evaluate(SORTED) == ["none", "descending", "none"]
    browser.evaluate(f"{button}[0].click()")
    assert browser.evaluate(FIRST) == [NAMES[1], NAMES[3], "b9", "b10"]
    assert browser.evaluate(SORTED) == ["ascending", "none", "none"]
    assert browser.evaluate("document.querySelector('tfoot th').textContent") == "all"
    assert browser.complaints() == []


@pytest.mark.parametrize(("key", "code"), [("Enter", 13), (" ", 32)])
def test_the_keyboard_sorts_too(browser, file, key, code):
    browser.load(file)
    browser.evaluate("document.querySelectorAll('table.sortable thead button')[1].focus()")
    browser.press(key, code)
    assert browser.evaluate(FIRST) == [NAMES[0], NAMES[3], NAMES[2], NAMES[1]]


def luminance(color):
    """Of 'rgb(r, g, b)', as WCAG has it."""
    values = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out(browser, file, scheme):
    browser.load(file, scheme=scheme)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    panel = browser.evaluate("getComputedStyle(document.querySelector('.numbers > div')).backgroundColor")
    for chosen, background in (
        ("body", paper),
        (".lead", paper),
        ("figcaption", paper),
        (".note", panel),
        ("thead button", panel),
    ):
        assert contrast(browser.evaluate(f"getComputedStyle(document.querySelector('{chosen}')).color"), background) >= 4.5
    probe = "document.body.style.setProperty('accent-color', 'var(--{})'), getComputedStyle(document.body).accentColor"
    colors = {name: browser.evaluate(probe.format(name)) for name in ("blue", "vermillion", "green", "purple")}
    assert all(contrast(color, paper) >= 3 for color in colors.values()), colors
    assert len({*colors.values()}) == 4


def test_a_picture_is_drawn_in_either_scheme(browser, file, tmp_path):
    shots = {}
    for scheme, width in itertools.product(("light", "dark"), (1200, 360)):
        browser.load(file, scheme=scheme, width=width)
        browser.photograph(tmp_path / f"{scheme}{width}.png")
        with Image.open(tmp_path / f"{scheme}{width}.png") as shot:
            assert shot.width == width
            shots[scheme, width] = np.asarray(shot.convert("L"), float)
    for width in (1200, 360):
        assert np.median(shots["light", width]) > 200
        assert np.median(shots["dark", width]) < 60
        assert all(np.ptp(shots[scheme, width]) > 150 for scheme in ("light", "dark"))
