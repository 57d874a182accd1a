"""The parts of a page: texts, cells, pictures, labels."""

from __future__ import annotations

import re
import unicodedata
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.figure import Figure

from bora_pyro.diagnostics import plots
from bora_pyro.report import Cell, Column, Number, Page, Samples, Section, Table, render
from bora_pyro.report.blocks import MISSING
from bora_pyro.report.pictures import _keep_labels_inside, draw_picture, name_labels
from tests.page_parser import check


def test_whatever_a_page_holds_is_text():
    attack = "</title></style><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    html = render(
        Page(
            attack,
            attack,
            attack,
            [Number(attack, attack, attack)],
            [Section("part", attack, [Table(attack, [Column(attack), Column("n", 2)], [[attack, float("nan")]])], attack)],
            versions={attack: attack},
        )
    )
    page = check(html)
    assert "img" not in page.tags
    assert page.tables[0][1] == [attack, MISSING]
    assert page.texts["title"][0].startswith(attack)


UNSEEN = "\x01\x1b[31m\uffff\ud800\x9b"


def test_letters_that_no_page_can_hold_are_replaced():
    samples = Samples("two\nlines" + UNSEEN, [(UNSEEN, UNSEEN, UNSEEN)])
    table = Table(UNSEEN, [Column(UNSEEN), Column("n", 2)], [[UNSEEN, 1.0]])
    page = Page("run", UNSEEN, UNSEEN, [Number(UNSEEN, UNSEEN)], [Section("part", UNSEEN, [table, samples], UNSEEN)])
    html = render(page)
    html.encode()
    assert not [letter for letter in html if unicodedata.category(letter) in ("Cc", "Cs", "Cn") and letter != "\n"]
    assert check(html).table("\ufffd\ufffd[31m\ufffd\ufffd\ufffd")["\ufffd\ufffd[31m\ufffd\ufffd\ufffd"]
    assert check(html).texts["blockquote"] == ["two\nlines" + "\ufffd\ufffd[31m\ufffd\ufffd\ufffd" * 2]


def test_texts_of_others_are_isolated():
    override = "\u202egnp.exe"
    table = Table("Tasks", [Column("task")], [[override], [Cell(override, override, link="#part")]])
    samples = Samples(override, [(override, "note", override)])
    page = check(render(Page("run", "a", "b", [], [Section("part", "Part", [table, samples])])))
    assert page.texts["bdi"] == [override] * 4  # two names in the table, who writes, and the prompt
    assert ("blockquote", "dir", "auto") in page.attributes


@pytest.mark.parametrize("name", ["\x01", "\x1b[31m", "\uffff", "a\u202eb", "\ud800", "]]>", "-->"])
def test_every_name_can_be_drawn(name):
    labels = name_labels([name, "plain"])
    assert len({*labels.values()}) == 2
    for label in (labels[name], name if name != "\ud800" else ""):  # also a text that nobody has looked at
        picture = draw_picture("names", "Names", "Of tasks.", lambda ax, label=label: ax.set_title(label))
        ElementTree.fromstring(str(picture.svg))


def test_cells_sort_as_numbers_whatever_they_show():
    column = Column("perplexity", 1)
    assert [column.cell(value).key for value in (1234.5, float("inf"), float("nan"), None, 3)] == [
        "1234.5", "Infinity", "", "", "3.0",
    ]  # fmt: skip
    assert [column.cell(value).text for value in (1234.5, float("inf"), None)] == ["1,234.5", "∞", MISSING]


def test_a_picture_keeps_its_ids_to_itself():
    def draw(ax):
        ax.imshow([[0.0, 1.0]])

    first, second = (str(draw_picture(key, "a", "b", draw).svg) for key in ("first", "second"))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert all(f"#{name}" in first for name in ids[0])
    assert 'href="data:image/png;base64,' in first


@pytest.mark.parametrize(
    "label",
    [
        "short",
        "a label that is rather longer than its own axis",
        "a label that would be far too long for one line if it had not two of them",
    ],
    ids=len,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_stay_within_their_drawing(label, side):
    figure = Figure(figsize=(4, 3), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks([0.5], ["a name that takes some room"])
    ax.yaxis.set_tick_params(labelleft=side == "left", labelright=side == "right")
    ax.set_xlabel(label)
    ax.set_ylabel(label)
    _keep_labels_inside(figure)
    figure.draw_without_rendering()
    for text in (ax.xaxis.label, ax.yaxis.label):
        box = text.get_window_extent()
        assert (box.x0 >= 0, box.y0 >= 0, box.x1 <= 400, box.y1 <= 300) == (True,) * 4
        assert text.get_text().replace("\n", " ") == label


def test_learning_curves_show_the_records():
    history = [{"epoch": n, "loss": 3.0 - n / 8, "validation_perplexity": 20.0 - n} for n in (1, 2, 3)]
    ax = plots.learning_curves(history, Figure().subplots(), best_epoch=2)
    lines = {drawn.get_gid(): drawn for drawn in ax.lines}
    assert lines["training, mean of the epoch"].get_ydata() == pytest.approx(torch.tensor([2.875, 2.75, 2.625]).exp().tolist())
    assert list(lines["validation, after the epoch"].get_ydata()) == [19.0, 18.0, 17.0]
    assert [list(data) for data in lines["kept"].get_data()] == [[2], [18.0]]
    one = plots.learning_curves(history[:1], Figure().subplots())
    low, high = one.get_xlim()
    assert [tick for tick in one.get_xticks() if low <= tick <= high] == [1.0]  # an epoch is a whole number
    documents_only = plots.learning_curves(history, Figure().subplots(), unit="documents")
    assert [drawn.get_gid() for drawn in documents_only.lines] == ["validation, after the epoch"]
