"""Tables of documents: whatever the source, the columns ``task``, ``text`` and ``group``.

>>> import pandas as pd
>>> speeches = pd.DataFrame({"speaker": ["Ada", "Bo", "Bo"], "speech": ["Hello.", "Hi.", " "]})
>>> table, notes = read_table(speeches, task_column="speaker", text_column="speech")
>>> table.to_list()
[{'task': 'Ada', 'text': 'Hello.', 'group': 'row 1'}, {'task': 'Bo', 'text': 'Hi.', 'group': 'row 2'}]
>>> notes
['1 document with empty text was dropped']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pandas as pd

from bora_pyro.data.documentation import documentation_rows
from bora_pyro.data.files import SPLITS, TABLE_ENDINGS, join_splits, one_line, read_file, read_folder, table_ending
from bora_pyro.errors import InputError, nearest

Source: TypeAlias = str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict
_Table: TypeAlias = pd.DataFrame | datasets.Dataset

BUILTIN = ("builtin:documentation",)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_table(
    source: Source,
    *,
    task_column: str = "task",
    text_column: str = "text",
    group_column: str | None = None,
    split_column: str | None = None,
    hub_split: str | None = "train",
) -> tuple[datasets.Dataset, list[str]]:
    """Read documents and the task that each belongs to.

    Args:
        source: one of
            a path of a .csv, .tsv, .jsonl (each also .gz) or .parquet file;
            a folder that ``save_to_disk`` wrote (the splits of a ``DatasetDict`` are put together);
            a folder that holds data files, or a hub id (both are read by ``datasets.load_dataset``);
            ``builtin:documentation``;
            a ``pandas.DataFrame``, ``datasets.Dataset`` or ``datasets.DatasetDict`` in memory.
        task_column: column with the name of the task; numbers become text.
        text_column: column with the text of the document.
        group_column: column with what must not be separated by a split (the speech that a piece comes from). None means
            ``doc_id`` where the table has it, else that each document stands for itself.
        split_column: column with a ready split, ``train``, ``validation`` or ``test``; None reads no split.
        hub_split: the split to read of a hub id or a folder of data files; None puts all splits together. The rows then
            have a column ``split``, which ``split_column="split"`` keeps.

    Returns:
        The table, with text columns ``task``, ``text``, ``group`` (and ``split`` where `split_column` is given), in the order
        of the source, and notes: a line on each kind of document that was dropped.

    Raises:
        InputError: the source is missing, unreadable or empty; a column is missing; a cell is not text.
    """
    table, label = _load(source, hub_split)
    names = list(table.columns) if isinstance(table, pd.DataFrame) else table.column_names
    if len(table) == 0:
        raise InputError(f"{label} has no rows; give one document a row")
    if group_column is None and "doc_id" in names:
        group_column = "doc_id"
    for option, column in (("task", task_column), ("text", text_column), ("group", group_column), ("split", split_column)):
        if column is not None and column not in names:
            raise InputError(
                f"{label} has no column {column!r} ({option}_column); its columns are {', '.join(map(str, names))}"
                f"{nearest(column, map(str, names))}"
            )

    tasks = _cells(table, task_column)
    texts = _cells(table, text_column)
    groups = _cells(table, group_column) if group_column is not None else [None] * len(texts)
    splits = _cells(table, split_column) if split_column is not None else None
    columns: dict[str, list[str]] = {"task": [], "text": [], "group": []}
    if splits is not None:
        columns["split"] = []
    no_task = empty_text = 0
    for row, (task, text, group) in enumerate(zip(tasks, texts, groups, strict=True), start=1):
        where = f"{label}, row {row}"
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: column {text_column!r} is a {type(text).__name__} ({text!r:.40}), not text")
        name = _name(task, f"{where}: column {task_column!r}")
        if text is None or not text.strip():
            empty_text += 1
            continue
        if not name:
            no_task += 1
            continue
        columns["task"].append(name)
        columns["text"].append(text)
        columns["group"].append(_name(group, f"{where}: column {group_column!r}") or f"row {row}")
        if splits is not None:
            columns["split"].append(_split_name(splits[row - 1], f"{where}: column {split_column!r}"))

    notes = [_dropped(count, what) for count, what in ((empty_text, "empty text"), (no_task, "no task")) if count]
    if not columns["text"]:
        raise InputError(f"{label} has no document with a task and a text: {'; '.join(notes)}")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return datasets.Dataset.from_dict(columns, features=features), notes


def table(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """A table in memory from one mapping a document.

    >>> table([{"task": "Ada", "text": "Hello."}]).column_names
    ['task', 'text']
    """
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _load(source: Source, hub_split: str | None) -> tuple[_Table, str]:
    """The table behind `source`, and how errors call it."""
    if isinstance(source, pd.DataFrame):
        return source, "the DataFrame"
    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return join_splits(source), "the Dataset"
    if not isinstance(source, str | Path):
        raise InputError(
            f"data is a {type(source).__name__}; give a path, a hub id, {BUILTIN[0]}, a pandas.DataFrame or a datasets.Dataset "
            "(table(rows) makes one of a list of dicts)"
        )
    name = str(source)
    if name in BUILTIN:
        return datasets.Dataset.from_list(documentation_rows()), f"data {name!r}"
    if name.startswith("builtin:"):
        raise InputError(f"data {name!r} is not built in; there is {', '.join(BUILTIN)}{nearest(name, BUILTIN)}")
    path = Path(source).expanduser()
    if path.is_dir():
        return read_folder(path, split=hub_split), f"folder {name!r}"
    if path.exists():
        return read_file(path), f"file {name!r}"
    if isinstance(source, Path) or table_ending(path) or not _HUB_ID.fullmatch(name):
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"file {name!r} does not exist; check the path{nearest(path.name, siblings)}")
    return _load_hub(name, hub_split), f"hub data set {name!r}"


def _load_hub(name: str, split: str | None) -> datasets.Dataset:
    try:
        return join_splits(datasets.load_dataset(name, split=split))
    except Exception as error:  # no network, no such id, no such split, a script: all the same to the caller
        raise InputError(
            f"data {name!r} is no file or folder here, and the Hugging Face hub gave no split {split!r} of it "
            f"({one_line(error)}); "
            f"give a path ({', '.join(TABLE_ENDINGS)}, a saved folder), a hub id that this machine can reach, "
            f"or {BUILTIN[0]}{nearest(name, BUILTIN)}"
        ) from error


def _cells(table: _Table, column: str) -> list[Any]:
    """The cells of a column as Python objects, None where one is missing."""
    if isinstance(table, pd.DataFrame):
        cells = table[column].astype(object)
        return cells.where(cells.notna(), None).tolist()
    return list(table.select_columns([column]).with_format(None)[:][column])


def _name(cell: Any, where: str) -> str:
    """A cell as the name of a task or a group: a number 3 or 3.0 is '3', a missing cell is ''."""
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return ""
    if isinstance(cell, list | dict | bytes | np.ndarray):
        raise InputError(f"{where} is a {type(cell).__name__} ({cell!r:.40}), not a name; give text or a number")
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _split_name(cell: Any, where: str) -> str:
    if cell not in SPLITS:
        raise InputError(f"{where} is {cell!r:.40}; a split is {', '.join(SPLITS)}{nearest(str(cell), SPLITS)}")
    return str(cell)


def _dropped(count: int, what: str) -> str:
    return f"{count} document{'s' if count > 1 else ''} with {what} {'were' if count > 1 else 'was'} dropped"
