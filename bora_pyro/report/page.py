"""From a page's parts to one HTML file that needs nothing but itself.

    >>> from bora_pyro.report.blocks import Number
    >>> page = Page("run", "demo", "two tasks", [Number("test perplexity", "16.62")], [])
    >>> html = render(page)
    >>> html.startswith("<!doctype html>"), "https://" in html
    (True, False)

Style sheet and script stand in the page. A content security policy lets no other script run and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.report.blocks import Page

# Control characters, halves of surrogate pairs, and what is no character at all. Marks of direction stay: each text that others
# have written is isolated from what stands around it.
_UNHOLDABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(page: Page) -> str:
    """The page as HTML; whatever a page's parts hold is shown as text, in which U+FFFD stands for what no page can hold."""
    loader = PackageLoader("bora_pyro.report", "template")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_holdable,
    )
    environment.filters["breakable"] = breakable
    style, script = (loader.get_source(environment, name)[0].strip() for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # these two are the project's own files
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
    )


def breakable(text: str) -> Markup:
    """A text whose lines may also end behind a point, a dash, a slash or an underscore.

    >>> breakable("algorithms.flow<b>")
    Markup('algorithms.<wbr>flow&lt;b&gt;')
    """
    return Markup(re.sub(r"([./_-])(?=\w)", r"\1<wbr>", str(escape(_holdable(text)))))


def _holdable(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else _UNHOLDABLE.sub("\ufffd", value)


def check_output(file: Path) -> None:
    """See that the file can be written, before the long work begins; its folder is made where it is missing.

    Raises:
        InputError: it cannot.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # finds out whether files can be written, also for root
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"output {file} cannot be written ({getattr(error, 'strerror', None) or error}); give another --output"
        ) from None


def write_page(page: Page, file: Path) -> None:
    """Write the page in one piece: a reader finds the old file or the new one."""
    html = render(page)
    replace_file(file, lambda temporary: temporary.write_text(html, encoding="utf-8"))
