"""Docstrings of installed packages as texts.

``builtin:documentation`` is the documentation of networkx, with one task for each sub-package. These are real and related texts
that every machine with torch has. They are read at run time. The embedded base model was pretrained with the same reader.

    >>> from bora_pyro.data.documentation import read_docstrings
    >>> first = next(read_docstrings("networkx"))
    >>> sorted(first)
    ['module', 'object', 'text']
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bora_pyro.errors import InputError

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_docstrings(package: str, *, min_characters: int = 80) -> Iterator[dict[str, str]]:
    """Yield the docstrings of an installed package without importing it.

    Args:
        package: name of an importable top-level package or module.
        min_characters: shorter docstrings are skipped.

    Yields:
        ``{"module": dotted module name, "object": name of the top-level object or "", "text": docstring}``, in the order of the
        sorted file names. Tests of the package are skipped.

    Raises:
        InputError: the package is not installed, or has no Python source.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # for a dotted name, importlib imports the parent
        spec = None
    if spec is None or spec.origin is None:
        raise InputError(f"package {package!r} is not installed; install it with: pip install {package}")
    origin = Path(spec.origin)
    root = origin.parent if spec.submodule_search_locations else origin
    if not root.exists():
        raise InputError(f"package {package!r} has no Python source to read docstrings from")
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    for file in files:
        parts = file.relative_to(root.parent).with_suffix("").parts
        if any(part in ("tests", "test", "_vendor", "testing") for part in parts[:-1]):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, node in _documented_nodes(tree):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
            if len(text) >= min_characters:
                yield {"module": module, "object": name, "text": text}


def _documented_nodes(tree: ast.Module) -> Iterator[tuple[str, _Documented]]:
    """Each node that may have a docstring, with the name of the top-level object that contains it."""
    yield "", tree
    for top in tree.body:
        for node in ast.walk(top):
            if isinstance(node, _Documented):
                yield getattr(top, "name", ""), node


def documentation_rows(package: str = "networkx", *, min_documents: int = 12) -> list[dict[str, str]]:
    """Rows (task, text, doc_id) of ``builtin:documentation``. A task is a sub-package, and a document is a docstring.

    The docstrings of one class have the same ``doc_id``, so that a split by group keeps them together. A repeated docstring is
    kept once.

    Args:
        package: name of an installed package.
        min_documents: sub-packages with fewer documents are left out.
    """
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for entry in read_docstrings(package):
        if entry["text"] in seen:
            continue
        seen.add(entry["text"])
        parts = entry["module"].split(".")
        # networkx.algorithms.centrality.closeness -> algorithms.centrality; networkx.classes.graph -> classes
        task = ".".join(parts[1:-1][:2]) or parts[-1]
        rows.append({"task": task, "text": entry["text"], "doc_id": f"{entry['module']}:{entry['object']}"})
    counts = Counter(row["task"] for row in rows)
    return [row for row in rows if counts[row["task"]] >= min_documents]
