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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import AUTO, Columns
from bora_pyro.data.counts import Documents
from bora_pyro.data.encode import content_columns
from bora_pyro.data.forms import SAMPLE
from bora_pyro.data.readers import RawTable, ReadingOptions, Source, check_source, is_hub_id, open_source
from bora_pyro.data.rows import RowReader
from bora_pyro.errors import InputError

__all__ = ["Source", "check_source", "is_hub_id", "read_documents", "read_rows", "read_table", "table"]


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
    options_column: str | None = None,
    task_group_column: str | None = None,
    document_form: str = AUTO,
    template: ChatTemplate | None = None,
    hub_split: str | None = None,
    reading: ReadingOptions | None = None,
) -> tuple[datasets.Dataset, list[str]]:
    """Read documents and their tasks.

    Args:
        source: one of
            a path of a table: .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .xlsx, or one of them compressed (.gz, .bz2,
            .xz, .zst, .zip of one file);
            several paths, or a pattern such as ``logs/*.jsonl``;
            a folder that ``save_to_disk`` wrote, a folder of files, or a hub id (their splits are joined);
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
        options_column: column with the options of each prompt, a list of texts or its JSON text, one of which is the completion.
        task_group_column: column with the group of a row's task, such as a speaker's party. All rows of a task agree; an empty
            cell says nothing. ``read_documents`` returns the groups; the table does not have them.
        document_form: the form of the documents (`bora_pyro.data.forms`). ``auto`` means: that of the columns that are named;
            else texts, if there is a column ``text``; else the form that is recognised by the columns and the first rows.
        template: the template that will write chats. What it cannot take is changed, with a note. None: nothing is changed.
        hub_split: the one split to read from a source of several. None reads all.
        reading: how files are read: separator, encoding, and the like; default: ``ReadingOptions()``.

    Returns:
        The table and notes. The table has the text columns ``task``, ``text`` and ``group``, in the order of the source, and
        ``split`` if ``split_column`` is given or the source has several splits. With prompts there is a column ``prompt``, and
        ``text`` is the completion; with options there is a column ``options``, the JSON text of a list. With chats a column
        ``messages`` with JSON texts replaces ``text``. The notes say which form was recognised, and have one line for each reason
        why documents were dropped or changed.

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
        options_column=options_column,
        task_group_column=task_group_column,
        document_form=document_form,
    )
    read = read_documents(source, columns, template=template, hub_split=hub_split, reading=reading)
    return read.table, read.notes


def read_documents(
    source: Source,
    columns: Columns,
    *,
    template: ChatTemplate | None = None,
    hub_split: str | None = None,
    reading: ReadingOptions | None = None,
) -> Documents:
    """Read documents as `read_table` does, and count the rows."""
    raw = open_source(source, reading, hub_split=hub_split)
    reader, rows = read_rows(raw, columns, template)
    kept: dict[str, list[str]] = {name: [] for name in reader.form}
    for row in rows:
        for name, column in kept.items():
            column.append(row[name])
    features = datasets.Features({name: datasets.Value("string") for name in kept})
    documents = datasets.Dataset.from_dict(kept, features=features)
    content = content_columns(documents.column_names)
    return Documents(documents, content, raw.num_rows, reader.left_out, raw.notes + reader.notes(), **reader.about)


def read_rows(
    raw: RawTable, columns: Columns, template: ChatTemplate | None = None
) -> tuple[RowReader, Iterator[dict[str, str]]]:
    """The documents of a source, one at a time.

    Args:
        raw: the source.
        columns: the names of the columns to read. If the source is split by itself, its own splits are read.
        template: as for `read_table`.

    Returns:
        The reader, which counts the rows that it drops, and its documents.

    Raises:
        InputError: a column is missing. While the documents are read: a cell cannot be used, or there is no document.
    """
    if raw.has_splits and columns.split is None:
        columns = replace(columns, split="split")
    given = [
        *columns.task,
        *columns.text,
        columns.prompt,
        columns.messages,
        columns.options,
        columns.group,
        columns.split,
        columns.task_group,
    ]
    names = raw.with_nested([name for name in given if name is not None])
    first = [cells for _, cells in raw.head(SAMPLE, names)]
    if not first:
        raise InputError(f"{raw.label} has no rows; give one document a row")
    reader = RowReader(columns, names, raw.label, first=first, template=template)
    wanted = raw.only(reader.needed, optional=reader.optional)

    def documents() -> Iterator[dict[str, str]]:
        kept = 0
        for number, (place, cells) in enumerate(wanted, start=1):
            row = reader.read(number, cells, place)
            if row is not None:
                kept += 1
                yield row
        raw.take_counts(wanted)
        reader.check_any(kept)

    return reader, documents()


def table(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Make a table in memory from mappings, one for each document.

    >>> table([{"task": "Ada", "text": "Hello."}]).column_names
    ['task', 'text']
    """
    return datasets.Dataset.from_list([dict(row) for row in rows])
