"""Docstrings of installed packages, as text.

``builtin:documentation`` is the documentation of networkx, one task a sub-package: real, related texts that are on every
machine where torch is, read at run time. The same reader feeds the pretraining of the embedded base model.

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
        min_characters: shorter docstrings are passed over.

    Yields:
        ``{"module": dotted module name, "object": name of the top-level object or "", "text": docstring}``, in the order
        of the sorted file names; tests of the package are left out.

    Raises:
        InputError: the package is not installed.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a dotted name is looked for in its parent
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
    """Each node that may carry a docstring, with the name of the top-level object that it belongs to."""
    yield "", tree
    for top in tree.body:
        for node in ast.walk(top):
            if isinstance(node, _Documented):
                yield getattr(top, "name", ""), node


def documentation_rows(package: str = "networkx", *, min_documents: int = 12) -> list[dict[str, str]]:
    """Rows (task, text, doc_id) of ``builtin:documentation``: a task is a sub-package, a document is a docstring.

    The docstrings of one class share a ``doc_id``, so that a split by group keeps them together. Repeated docstrings are
    kept once, sub-packages with fewer than ``min_documents`` documents are left out.
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
