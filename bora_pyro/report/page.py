"""Render a page as one self-contained HTML file.

    >>> from bora_pyro.report.blocks import Number
    >>> page = Page("run", "demo", "two tasks", [Number("test perplexity", "16.62")], [])
    >>> html = render(page)
    >>> html.startswith("<!doctype html>"), "https://" in html
    (True, False)

The file contains its style sheet and its script. A content security policy forbids all other scripts and all requests.
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

# Control characters, single surrogates and noncharacters. Marks of the writing direction are kept: the template isolates each
# text from the data, so that they cannot affect the text around it.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(page: Page) -> str:
    """Render the page as HTML. All values are escaped, and U+FFFD replaces characters that HTML does not allow."""
    loader = PackageLoader("bora_pyro.report", "template")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_allowed,
    )
    environment.filters["breakable"] = breakable
    style, script = (loader.get_source(environment, name)[0].strip() for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # style and script are the project's own files, so they need no escaping
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
    )


def breakable(text: str) -> Markup:
    """Allow line breaks after a full stop, a dash, a slash or an underscore.

    >>> breakable("algorithms.flow<b>")
    Markup('algorithms.<wbr>flow&lt;b&gt;')
    """
    return Markup(re.sub(r"([./_-])(?=\w)", r"\1<wbr>", str(escape(_allowed(text)))))


def _allowed(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else _FORBIDDEN.sub("\ufffd", value)


def check_output(file: Path) -> None:
    """Check that the file can be written, before the long work begins. A missing folder is created.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # root passes a check of permissions even where writing fails
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"output {file} cannot be written ({getattr(error, 'strerror', None) or error}); give another --output"
        ) from None


def write_page(page: Page, file: Path) -> None:
    """Write the page atomically: a reader sees the old file or the new one, never a part."""
    html = render(page)
    replace_file(file, lambda temporary: temporary.write_text(html, encoding="utf-8"))
