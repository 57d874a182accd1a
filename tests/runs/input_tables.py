"""Tables with one thing changed, and the notes on them."""

from __future__ import annotations

from tests.tiny_base import documents, write_table


def frame(make):
    return lambda folder: {"data": write_table(folder / "table.csv", make(documents()))}


TWO_SMALL = [("Ada", 10), ("Bo", 2), ("Cleo", 10), ("Dan", 1)]
