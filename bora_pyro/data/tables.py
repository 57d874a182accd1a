"""Read documents from any source into one table with the columns ``task``, ``text`` (or a prompt too, or a chat) and ``group``.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd

from bora_pyro.data.builtin import BUILTIN
from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import AUTO, Columns
from bora_pyro.data.counts import Documents
from bora_pyro.data.encode import content_columns
from bora_pyro.data.files import TABLE_ENDINGS, join_splits, one_line, read_file, read_folder, table_ending
from bora_pyro.data.forms import SAMPLE
from bora_pyro.data.rows import RowReader
from bora_pyro.errors import InputError, nearest, shown

Source: TypeAlias = str | Path | pd.DataFrame | datasets.Dataset | datasets.DatasetDict
_Table: TypeAlias = pd.DataFrame | datasets.Dataset

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_table(
    source: Source,
    *,
    task_column: str | Sequence[str] = "task",
    text_column: str | Sequence[str] = "text",
    group_column: str | None = None,
    split_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    document_form: str = AUTO,
    template: ChatTemplate | None = None,
    hub_split: str | None = None,
) -> tuple[datasets.Dataset, list[str]]:
    """Read documents and their tasks.

    Args:
        source: one of
            a path of a .csv, .tsv, .jsonl (each also .gz) or .parquet file;
            a folder that ``save_to_disk`` wrote (the splits of a ``DatasetDict`` are joined);
            a folder of data files, or a hub id (both are read by ``datasets.load_dataset``);
            the name of a built-in source (``data/builtin.py``), such as ``builtin:documentation``;
            a ``pandas.DataFrame``, ``datasets.Dataset`` or ``datasets.DatasetDict`` in memory.
        task_column: column with the name of the task; numbers become texts. The names of several columns are joined by `` / ``,
            as in ``Norway / Ada``.
        text_column: column with the text of the document. The texts of several columns are joined by a blank line; empty texts
            are left out.
        group_column: column with a group. Documents of one group (such as the pieces of one speech) stay in one split. None
            means ``doc_id`` if the table has it, else that each document is a group of its own.
        split_column: column with a given split: ``train``, ``validation`` or ``test``. None reads no split.
        prompt_column: column with a prompt, which the model reads before the completion and does not predict.
        completion_column: column with the text that directly follows the prompt.
        messages_column: column with a chat, a list of messages with ``role`` and ``content``, which may be JSON text. Only the
            assistant's messages are predicted.
        document_form: the form of the documents (`bora_pyro.data.forms`). ``auto`` means: that of the columns that are named;
            else texts, if there is a column ``text``; else the form that is recognised by the columns and the first rows.
        template: the template that will write chats. What it cannot take is changed, with a note. None: nothing is changed.
        hub_split: the one split to read from a source of several. None reads all.

    Returns:
        The table and notes. The table has the text columns ``task``, ``text`` and ``group``, in the order of the source, and
        ``split`` if ``split_column`` is given or the source has several splits. With prompts there is a column ``prompt``, and
        ``text`` is the completion. With chats a column ``messages`` with JSON texts replaces ``text``. The notes say which form
        was recognised, and have one line for each reason why documents were dropped or changed.

    Raises:
        InputError: the source is missing, unreadable or empty; a column is missing; a cell is not a text; two tasks of several
            columns have the same joined name.
    """
    columns = Columns.given(
        task_column=task_column,
        text_column=text_column,
        group_column=group_column,
        split_column=split_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
        messages_column=messages_column,
        document_form=document_form,
    )
    read = read_documents(source, columns, template=template, hub_split=hub_split)
    return read.table, read.notes


def read_documents(
    source: Source, columns: Columns, *, template: ChatTemplate | None = None, hub_split: str | None = None
) -> Documents:
    """Read documents as `read_table` does, and count the rows."""
    table, label, has_splits = _load(source, hub_split)
    names = list(table.columns) if isinstance(table, pd.DataFrame) else table.column_names
    if len(table) == 0:
        raise InputError(f"{label} has no rows; give one document a row")
    if has_splits and columns.split is None:
        columns = replace(columns, split="split")
    reader = RowReader(columns, names, label, first=_first_rows(table, names), template=template)
    cells = {column: _cells(table, column) for column in reader.needed}
    kept: dict[str, list[str]] = {name: [] for name in reader.form}
    for number, values in enumerate(zip(*cells.values(), strict=True), start=1):
        row = reader.read(number, dict(zip(cells, values, strict=True)))
        if row is not None:
            for name, column in kept.items():
                column.append(row[name])
    reader.check_any(len(kept["task"]))
    features = datasets.Features({name: datasets.Value("string") for name in kept})
    documents = datasets.Dataset.from_dict(kept, features=features)
    return Documents(documents, content_columns(documents.column_names), len(table), reader.left_out, reader.notes())


def table(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Make a table in memory from mappings, one for each document.

    >>> table([{"task": "Ada", "text": "Hello."}]).column_names
    ['task', 'text']
    """
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _load(source: Source, hub_split: str | None) -> tuple[_Table, str, bool]:
    """The table of ``source``, its name for errors, and whether it has splits of its own."""
    if isinstance(source, datasets.DatasetDict):
        joined, has_splits = join_splits(source, hub_split)
        return joined, "the Dataset", has_splits
    if isinstance(source, str | Path) and str(source) not in BUILTIN:
        check_source(source)
        path = Path(source).expanduser()
        if path.is_dir():
            joined, has_splits = read_folder(path, split=hub_split)
            return joined, f"folder {str(source)!r}", has_splits
        if not path.exists():
            joined, has_splits = _load_hub(str(source), hub_split)
            return joined, f"hub data set {str(source)!r}", has_splits
    if hub_split is not None:
        raise InputError(f"hub_split is {shown(hub_split)}, but {_label(source)} has no splits; leave it out")
    return _load_one(source), _label(source), False


def _label(source: Source) -> str:
    """The name of a source of one table, for errors."""
    if isinstance(source, pd.DataFrame | datasets.Dataset):
        return f"the {type(source).__name__}"
    return f"{'data' if str(source) in BUILTIN else 'file'} {str(source)!r}"


def _load_one(source: Source) -> _Table:
    """The table of a source that has no splits."""
    if isinstance(source, pd.DataFrame | datasets.Dataset):
        return source
    if not isinstance(source, str | Path):
        raise InputError(
            f"data is a {type(source).__name__}; give a path, a hub id, {', '.join(BUILTIN)}, a pandas.DataFrame or a "
            "datasets.Dataset (table(rows) makes one of a list of dicts)"
        )
    return table(BUILTIN[str(source)]()) if str(source) in BUILTIN else read_file(Path(source).expanduser())


def check_source(source: str | Path) -> None:
    """Check early, before anything is read, that a source can exist.

        >>> check_source("builtin:documentation")
        >>> check_source("speeches.csv")
        Traceback (most recent call last):
        bora_pyro.errors.InputError: file 'speeches.csv' does not exist; check the path

    Raises:
        InputError: the source is a file that does not exist, or an unknown ``builtin:`` name.
    """
    name, path = str(source), Path(source).expanduser()
    if name in BUILTIN:
        return
    if name.startswith("builtin:"):
        raise InputError(f"data {name!r} is not built in; there is {', '.join(BUILTIN)}{nearest(name, BUILTIN)}")
    if not path.exists() and (isinstance(source, Path) or not is_hub_id(name)):
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"file {name!r} does not exist; check the path{nearest(path.name, siblings)}")


def is_hub_id(name: str) -> bool:
    """Whether a text looks like a hub id and not like a file name."""
    return not table_ending(name) and _HUB_ID.fullmatch(name) is not None


def _load_hub(name: str, split: str | None) -> tuple[datasets.Dataset, bool]:
    try:
        data = datasets.load_dataset(name)
    except Exception as error:  # no network, no such id, or a script: one message for all
        raise InputError(
            f"data {name!r} is not a file or folder here, and the Hugging Face hub gave no data set of that name "
            f"({one_line(error)}); "
            f"give a path ({', '.join(TABLE_ENDINGS)}, a saved folder), a hub id that this machine can reach, "
            f"or {', '.join(BUILTIN)}{nearest(name, BUILTIN)}"
        ) from error
    return join_splits(data, split)


def _first_rows(table: _Table, names: Sequence[Any]) -> list[dict[str, Any]]:
    """The first rows, with the columns that the table has once."""
    part = table.head(SAMPLE) if isinstance(table, pd.DataFrame) else table.select(range(min(SAMPLE, len(table))))
    cells = {name: _cells(part, name) for name in names if list(names).count(name) == 1}
    return [dict(zip(cells, values, strict=True)) for values in zip(*cells.values(), strict=True)]


def _cells(table: _Table, column: str) -> list[Any]:
    """The cells of a column as Python objects; None for a missing cell."""
    if isinstance(table, pd.DataFrame):
        cells = table[column].astype(object)
        return cells.where(cells.notna(), None).tolist()
    return list(table.select_columns([column]).with_format(None)[:][column])
