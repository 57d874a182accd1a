"""Read the rows of a table one at a time, and check every cell.

>>> columns = Columns(task=("country", "speaker"), text=("title", "body"))
>>> reader = RowReader(columns, ["country", "speaker", "title", "body"], "the table")
>>> reader.read(1, {"country": "UK", "speaker": "Ada", "title": "On engines", "body": "They compute."})
{'task': 'UK / Ada', 'text': 'On engines\\n\\nThey compute.', 'group': 'row 1'}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bora_pyro.data.chat import chat_messages
from bora_pyro.data.files import check_unicode
from bora_pyro.data.split_names import split_name
from bora_pyro.errors import InputError, nearest, shown

#: The separator between task names from several columns.
NAME_SEPARATOR = " / "
#: The separator between texts from several columns.
TEXT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read, as for ``read_table``.

    Attributes:
        task: columns with the name of the task.
        text: columns with the predicted text.
        group: column with the group of a document; None: ``doc_id`` if the table has it, else none.
        split: column with the split; None: no split is read.
        prompt: column with the prompt; None: no prompts.
        messages: column with a chat. If it is given, ``text`` is not read.
        text_option: the option that named ``text``, for errors.
    """

    task: tuple[str, ...] = ("task",)
    text: tuple[str, ...] = ("text",)
    group: str | None = None
    split: str | None = None
    prompt: str | None = None
    messages: str | None = None
    text_option: str = "text_column"

    @classmethod
    def given(
        cls,
        *,
        task_column: str | Sequence[str] = "task",
        text_column: str | Sequence[str] = "text",
        group_column: str | None = None,
        split_column: str | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
        messages_column: str | None = None,
    ) -> Columns:
        """The columns that the options of ``read_table`` name.

        Raises:
            InputError: two options cannot be combined, or the value of an option is not a column name or a list of them.
        """
        task, text = _names("task_column", task_column), _names("text_column", text_column)
        alone = {"prompt_column": prompt_column, "completion_column": completion_column, "messages_column": messages_column}
        for name, column in (alone | {"group_column": group_column, "split_column": split_column}).items():
            if column is not None and not isinstance(column, str):
                raise InputError(f"{name} is {shown(column)}; give the name of one column")
        if (prompt_column is None) != (completion_column is None):
            given, lacking = ("prompt", "completion") if completion_column is None else ("completion", "prompt")
            raise InputError(
                f"{given}_column is given without {lacking}_column; a prompt is read and its completion predicted: give both, or "
                "text_column alone to predict all"
            )
        kinds = {"text_column": text != ("text",), "prompt_column": bool(prompt_column), "messages_column": bool(messages_column)}
        if sum(kinds.values()) > 1:
            raise InputError(
                f"{' and '.join(name for name, there in kinds.items() if there)} are given; a document is a text, a prompt with "
                "its completion, or a chat: give one of them"
            )
        option = "text_column" if completion_column is None else "completion_column"
        text = text if completion_column is None else (completion_column,)
        return cls(task, text, group_column, split_column, prompt_column, messages_column, option)

    def by_option(self) -> list[tuple[str, str]]:
        """(option, column) for each column, in the order of the options."""
        texts = [(self.text_option, name) for name in self.text] if self.messages is None else []
        pairs = [("task_column", name) for name in self.task] + [("prompt_column", self.prompt), *texts]
        pairs += [("messages_column", self.messages), ("group_column", self.group), ("split_column", self.split)]
        return [(option, column) for option, column in pairs if column is not None]


class RowReader:
    """Converts rows of any table to one form, and counts the rows that it drops.

    Args:
        columns: the names of the columns to read.
        names: the names of all columns of the table. If no group column is given and there is a column ``doc_id``, that is it.
        label: the name of the table in errors.

    Attributes:
        columns: the columns to read, with the group column that was found.
        form: the names of the columns of a converted row: ``task``; then ``text``, or ``prompt`` and ``text``, or ``messages``
            (a chat as JSON text); then ``group``; then ``split`` if there is a split column.

    Raises:
        InputError: the table does not have a column, or has it twice.
    """

    def __init__(self, columns: Columns, names: Sequence[Any], label: str) -> None:
        if columns.group is None and "doc_id" in names:
            columns = Columns(**{**vars(columns), "group": "doc_id"})
        for option, column in columns.by_option():
            if (times := list(names).count(column)) != 1:
                what = f"column {column!r} {times} times" if times else f"no column {column!r}"
                raise InputError(
                    f"{label} has {what} ({option}); its columns are {_listed(names)}{nearest(column, map(str, names))}"
                )
        self.columns, self.label = columns, label
        content = ["text"] if columns.prompt is None else ["prompt", "text"]
        content = content if columns.messages is None else ["messages"]
        self.form = ("task", *content, "group", *(["split"] if columns.split is not None else []))
        self._dropped: Counter[str] = Counter()
        self._parts: dict[str, tuple[str, ...]] = {}

    @property
    def needed(self) -> list[str]:
        """The columns of the table to read, each once."""
        return list(dict.fromkeys(column for _, column in self.columns.by_option()))

    def read(self, number: int, cells: Mapping[str, Any]) -> dict[str, str] | None:
        """Convert one row. A row without a document or without a task gives None and is counted.

        Args:
            number: the number of the row, from 1, for errors and for the default group.
            cells: the cells by column.

        Raises:
            InputError: a cell has the wrong type or value, or two tasks of several columns have the same joined name.
        """
        columns, where = self.columns, f"{self.label}, row {number}"
        content = self._content(cells, where)
        task = self._task(cells, where)
        if content is None:
            self._dropped["no messages" if columns.messages is not None else "empty text"] += 1
            return None
        if not task:
            self._dropped["no task"] += 1
            return None
        group = "" if columns.group is None else _name(cells[columns.group], f"{where}: column {columns.group!r}")
        row = {"task": task, **content, "group": group or f"row {number}"}
        if columns.split is not None:
            row["split"] = split_name(cells[columns.split], f"{where}: column {columns.split!r}")
        return row

    def notes(self) -> list[str]:
        """One line for each reason why documents were dropped."""
        kinds = ("empty text", "no messages", "no task")
        return [_dropped_note(self._dropped[kind], kind) for kind in kinds if self._dropped[kind]]

    def check_any(self, number: int) -> None:
        """Raise ``InputError`` if ``number``, the number of documents that are left, is 0."""
        if not number:
            raise InputError(f"{self.label} has no document with a task and a text: {'; '.join(self.notes())}")

    def _content(self, cells: Mapping[str, Any], where: str) -> dict[str, str] | None:
        columns = self.columns
        if columns.messages is not None:
            if not _is_present(cells[columns.messages]):
                return None
            messages = chat_messages(cells[columns.messages], f"{where}: column {columns.messages!r}")
            return {"messages": json.dumps(messages, ensure_ascii=False, default=str)} if messages else None
        texts = [_text(cells[column], f"{where}: column {column!r}") for column in columns.text]
        texts = [text for text in texts if text.strip()]
        if not texts:
            return None
        prompt = {} if columns.prompt is None else {"prompt": _text(cells[columns.prompt], f"{where}: column {columns.prompt!r}")}
        return {**prompt, "text": TEXT_SEPARATOR.join(texts)}

    def _task(self, cells: Mapping[str, Any], where: str) -> str:
        parts = tuple(_name(cells[column], f"{where}: column {column!r}") for column in self.columns.task)
        if not all(parts):
            return ""
        name = NAME_SEPARATOR.join(parts)
        if self._parts.setdefault(name, parts) != parts:
            raise InputError(
                f"{where}: {self._parts[name]} and {parts} both give the task name {name!r} (task_column "
                f"{' '.join(self.columns.task)}); write these names without {NAME_SEPARATOR!r}"
            )
        return name


def _names(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    if not names or len(set(names)) < len(names):
        raise InputError(f"{option} is {list(names)}; give one column or several different ones")
    return names


def _is_present(cell: Any) -> bool:
    missing = cell is None or (isinstance(cell, float) and np.isnan(cell))
    return not missing and not (isinstance(cell, str) and not cell.strip())


def _text(cell: Any, where: str) -> str:
    if cell is not None and not isinstance(cell, str):
        raise InputError(f"{where} is a {type(cell).__name__} ({cell!r:.40}), not text")
    check_unicode(cell or "", where)
    return cell or ""


def _name(cell: Any, where: str) -> str:
    """A cell as the name of a task or a group. The numbers 3 and 3.0 become '3', a missing cell becomes ''."""
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return ""
    if isinstance(cell, list | dict | bytes | np.ndarray):
        raise InputError(f"{where} is a {type(cell).__name__} ({cell!r:.40}), not a name; give text or a number")
    name = str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()
    check_unicode(name, where)
    return name


def _listed(names: Sequence[object], *, most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!s:.60}" for name in names[:most]) + more


def _dropped_note(count: int, what: str) -> str:
    return f"{count} document{'s' if count > 1 else ''} with {what} {'were' if count > 1 else 'was'} dropped"
