"""A page as a strict reader sees it: every tag closed in its order, tables as rows of texts."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "input", "wbr"}


class PageParser(HTMLParser):
    """Reads a page; an element that is closed out of order is an ``AssertionError``."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.scripts, self.attributes = [], [], [], [], []
        self.tables, self.texts, self.tags = [], {}, []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, first, heading=None):
        """Rows by their first cell, each a text by heading, of the first table whose first heading is ``first``."""
        for heads, *rows in self.tables:
            heads = [" ".join(head.split()) for head in heads]
            if heads[0] == first and (heading is None or heading in heads):
                return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
        raise AssertionError(f"no table begins with {first!r}: {[table[0] for table in self.tables]}")


def check(html):
    """The page parsed; nothing in it is from elsewhere, and the project's script is the only one."""
    page = PageParser(html)
    assert html.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids))
    assert len(page.texts["script"]) == 1
    assert "alert" not in page.texts["script"][0]
    for link in page.links:
        assert link.startswith(("#", "data:")), link
        assert not link.startswith("#") or link[1:] in page.ids
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import|https?://", re.sub(r"base64,[\w+/=\n]+", "", html))
    references = re.findall(r"url\(#([^)]+)\)", html)
    assert set(references) <= set(page.ids)
    return page
