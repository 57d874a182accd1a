"""A number for each task, from a file that names the tasks: weights, ranks, and the like.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     file = Path(folder) / "weights.yaml"
...     _ = file.write_text("Ada: 2\\nno: 0.5\\n")
...     read_by_task(file, "weight", "task_weights")
{'Ada': '2', 'no': '0.5'}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bora_pyro.data.files import one_line, read_file, table_ending
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.regular import read_regular
from bora_pyro.files.safe_yaml import YamlError, parse_mapping

#: The largest .yaml or .json file, in bytes. A million tasks take some 16 MiB. A table may be larger.
MAX_BYTES = 2**25


def read_by_task(path: Path, column: str, label: str) -> Mapping[str, Any]:
    """Read a table (.csv and the like) with columns ``task`` and ``column``, or a .yaml or .json mapping from tasks to values.

    Task names in YAML stay texts: ``no`` is the task "no", ``010`` the task "010".

    Args:
        path: the file.
        column: what the values are, and their column in a table, such as ``weight``.
        label: names the file in error messages.

    Returns:
        The values by task, as they are in the file.

    Raises:
        InputError: the file cannot be read, has no such column or no values, or gives a task twice.
    """
    if table_ending(path) not in (None, ".json") and path.is_file():
        return _read_table(path, column, label)
    try:
        raw = read_regular(path, most=MAX_BYTES)
        if path.suffix.lower() != ".json":
            found = parse_mapping(raw, as_text=True, most=MAX_BYTES)
        else:
            found = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except YamlError as error:
        line = f", line {error.line}" if error.line else ""
        raise InputError(f"{label}{line}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{label} cannot be read ({one_line(error)}); give a .csv, .yaml or .json file") from None
    if not isinstance(found, Mapping):
        raise InputError(f"{label} holds a {type(found).__name__}; give a mapping from tasks to {column}s")
    if not found:
        raise InputError(f"{label} holds no {column}s; give one `task: {column}` a line, or leave it out")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from JSON without repeated keys; Python's reader would silently take the last value."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _read_table(path: Path, column: str, label: str) -> Mapping[str, Any]:
    table = read_file(path)
    for name in ("task", column):
        if name not in table.columns:
            raise InputError(f"{label} has no column {name!r}; give columns task and {column}{nearest(name, table.columns)}")
    tasks = table["task"].map(str)  # 8 and "8" are the same task
    if len(twice := tasks[tasks.duplicated()]):
        raise InputError(f"{label} has the task {shown(twice.iloc[0])} twice; give each once")
    return dict(zip(tasks, table[column], strict=True))
