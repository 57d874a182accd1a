"""Read the rows of a table one at a time, and check every cell.

>>> columns = Columns(task=("country", "speaker"), text=("title", "body"))
>>> reader = RowReader(columns, ["country", "speaker", "title", "body"], "the table")
>>> reader.read(1, {"country": "UK", "speaker": "Ada", "title": "On engines", "body": "They compute."})
{'task': 'UK / Ada', 'text': 'On engines\\n\\nThey compute.', 'group': 'row 1'}
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import Columns
from bora_pyro.data.forms import Table, choose_form, form_hint
from bora_pyro.data.readers.names import alike_notes, name_of
from bora_pyro.data.readers.raw import listed
from bora_pyro.data.split_names import split_name
from bora_pyro.errors import InputError, nearest, shown

#: The separator between task names from several columns.
NAME_SEPARATOR = " / "


class RowReader:
    """Converts rows of any table to one form, and counts the rows that it drops.

    Args:
        columns: the names of the columns to read.
        names: the names of all columns of the table. If no group column is given and there is a column ``doc_id``, that is it.
        label: the name of the table in errors.
        first: the first rows. The form of the documents is recognised by them.
        template: the template that will write chats, if it is known.

    Attributes:
        columns: the columns to read, with the group column that was found.
        document: the form of the documents.
        form: the names of the columns of a converted row: ``task``; then ``text``, or ``prompt`` and ``text``, or ``messages``
            (a chat as JSON text); then ``options`` (a list as JSON text) if there are; then ``group``; then ``split`` if there is
            a split column.

    Raises:
        InputError: the table does not have a column, or has it twice; or the form of its documents is not clear.
    """

    def __init__(
        self,
        columns: Columns,
        names: Sequence[Any],
        label: str,
        *,
        first: Sequence[Mapping[str, Any]] = (),
        template: ChatTemplate | None = None,
    ) -> None:
        if columns.group is None and "doc_id" in names:
            columns = dataclasses.replace(columns, group="doc_id")
        self.columns, self.label = columns, label
        table = Table(names, first, label, template, columns)
        self.document, self._notes = choose_form(table)
        for option, column in self._by_option():
            if (times := list(names).count(column)) != 1:
                what = f"column {column!r} {times} times" if times else f"no column {column!r}"
                named = f" ({option})" if option else ""
                hint = nearest(column, map(str, names)) or (form_hint(table) if option == "text_column" and not times else "")
                raise InputError(f"{label} has {what}{named}; its columns are {listed(names)}{hint}")
        self.form = ("task", *self.document.content, "group", *(["split"] if columns.split is not None else []))
        self._names = tuple(map(str, names))
        self._dropped: Counter[str] = Counter()
        self._parts: dict[str, tuple[str, ...]] = {}
        self._task_groups: dict[str, str] = {}

    @property
    def needed(self) -> list[str]:
        """The columns of the table to read, each once."""
        return list(dict.fromkeys(column for _, column in self._by_option()))

    @property
    def optional(self) -> list[str]:
        """Those of the columns that a document can do without, such as the tools of a chat."""
        return [column for option, column in self._by_option() if not option]

    def read(self, number: int, cells: Mapping[str, Any], place: str | None = None) -> dict[str, str] | None:
        """Convert one row. A row without a document or without a task gives None and is counted.

        Args:
            number: the number of the row, from 1, for the default group.
            cells: the cells by column.
            place: the place of the row, for errors; default: its number.

        Raises:
            InputError: a cell has the wrong type or value, or two tasks of several columns have the same joined name.
        """
        columns, where = self.columns, f"{self.label}, {place or f'row {number}'}"
        content = self.document.read(cells, where)
        task = self._task(cells, where)
        if content is None:
            self._dropped[self.document.missing] += 1
            return None
        if not task:
            self._dropped["no task"] += 1
            return None
        self._read_task_group(task, cells, where)
        group = "" if columns.group is None else name_of(cells[columns.group], f"{where}: column {columns.group!r}")
        row = {"task": task, **content, "group": group or f"row {number}"}
        if columns.split is not None:
            row["split"] = split_name(cells[columns.split], f"{where}: column {columns.split!r}")
        return row

    def notes(self) -> list[str]:
        """How the documents were read; what was dropped or changed, and why; and tasks whose names look alike."""
        kinds = (self.document.missing, "no task")
        dropped = [_dropped_note(self._dropped[kind], kind) for kind in kinds if self._dropped[kind]]
        return [*self._notes, *dropped, *self.document.notes(), *alike_notes(self._parts, "task")]

    @property
    def about(self) -> dict[str, Any]:
        """How the documents are read: all columns of the table, those that are used, the form, and the groups of the tasks."""
        return {"columns": self._names, "used": tuple(self.needed), "form": self.document.name, "task_groups": self._task_groups}

    @property
    def left_out(self) -> dict[str, int]:
        """The number of rows that are no document, by reason."""
        return {f"with {kind}": number for kind, number in self._dropped.items()}

    def check_any(self, number: int) -> None:
        """Raise ``InputError`` if ``number``, the number of documents that are left, is 0."""
        if not number:
            raise InputError(f"{self.label} has no document with a task and a text: {'; '.join(self.notes())}")

    def _by_option(self) -> list[tuple[str, str]]:
        """(option, column) for each column to read, in the order of the options."""
        columns = self.columns
        pairs: list[tuple[str, str | None]] = [("task_column", name) for name in columns.task]
        pairs += [*self.document.columns, ("group_column", columns.group), ("split_column", columns.split)]
        pairs += [("task_group_column", columns.task_group)]
        return [(option, column) for option, column in pairs if column is not None]

    def _task(self, cells: Mapping[str, Any], where: str) -> str:
        parts = tuple(name_of(cells[column], f"{where}: column {column!r}") for column in self.columns.task)
        if not all(parts):
            return ""
        name = NAME_SEPARATOR.join(parts)
        if self._parts.setdefault(name, parts) != parts:
            raise InputError(
                f"{where}: {shown(self._parts[name])} and {shown(parts)} both give the task name {shown(name)} (task_column "
                f"{' '.join(self.columns.task)}); write these names without {NAME_SEPARATOR!r}"
            )
        return name

    def _read_task_group(self, task: str, cells: Mapping[str, Any], where: str) -> None:
        """Take the group of a row's task, and check that all rows of the task agree."""
        if (column := self.columns.task_group) is None:
            return
        group = name_of(cells[column], f"{where}: column {column!r}")
        if group and (known := self._task_groups.setdefault(task, group)) != group:
            raise InputError(
                f"{where}: task {shown(task)} is in group {shown(group)}, and in {shown(known)} in an earlier row "
                f"(task_group_column {column}); give each task one group"
            )


def _dropped_note(count: int, what: str) -> str:
    return f"{count} document{'s' if count > 1 else ''} with {what} {'were' if count > 1 else 'was'} dropped"
