"""Chats as OpenAI and transformers write them: a list of messages with ``role`` and ``content``, and tools.

>>> form = Messages("messages", None, Chats(None))
>>> form.read({"messages": '[{"role": "user", "content": "Hi", "name": null}]'}, "row 1")
{'messages': '[{"role": "user", "content": "Hi"}]'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.turns import tools_of
from bora_pyro.data.forms.values import is_present, parse_json, structure
from bora_pyro.errors import InputError

#: Columns with tools: today's name and OpenAI's older one.
TOOL_COLUMNS = ("tools", "functions")
LIST = "a list of {role, content}"
#: Keys in which a message says or calls something.
SAYS = ("content", "tool_calls", "function_call")


class Messages:
    """A chat with the roles and contents as they are written.

    Args:
        column: the column of the chats.
        tools: the column of their tools, or None.
        chats: makes the stored form of chats.
        option: the option that named the column.
    """

    name: ClassVar[str] = "messages"
    usual: ClassVar[str] = "messages"
    content: tuple[str, ...] = ("messages",)
    missing = "no messages"

    def __init__(self, column: str, tools: str | None, chats: Chats, *, option: str = "messages_column") -> None:
        self.column, self.tools, self.chats = column, tools, chats
        self.columns = [(option, column), *([("", tools)] if tools else [])]
        self.recognised = f"chats in column {column!r}{_with(tools)}: the assistant's turns are predicted"

    @classmethod
    def recognise(cls, table: Table) -> Messages | None:
        """Chats in the column ``messages``, or in that of ``messages_column``."""
        column = table.columns.messages or "messages"
        if not table.has(column) or not holds_messages(table, column, "role", *SAYS):
            return None
        found = cls(column, tool_column(table), Chats(table.template))
        if table.has("system"):
            found.recognised += "; column 'system' is not read (--document_form sharegpt reads it)"
        return found

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The chat of one row."""
        messages = messages_of(cells[self.column], f"{where}: column {self.column!r}", self.chats)
        tools = tools_in(cells, self.tools, where, self.chats)
        chat = self.chats.content(messages, tools, f"{where}: column {self.column!r}")
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed, or is only read."""
        return self.chats.notes()


def messages_of(cell: Any, where: str, chats: Chats | None = None) -> list[Any]:
    """The messages in a cell: a list of mappings, one mapping, or the JSON text of these. A missing cell has none.

    Args:
        cell: the cell.
        where: its place, for errors.
        chats: counts the cells in which something of a tool call is null.

    Raises:
        InputError: the cell is something else.
    """
    if not is_present(cell):
        return []
    raw = parse_json(cell, where, give=f"{LIST} as JSON text") if isinstance(cell, str) else cell
    if chats is not None and isinstance(raw, list | np.ndarray):
        chats.count_nulls([message.get("tool_calls") for message in raw if isinstance(message, Mapping)])
    found = structure(raw, where)
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list):
        raise InputError(f"{where} is a {type(found).__name__} ({found!r:.40}), not {LIST}")
    return found


def holds_messages(table: Table, column: str, role: str, *others: str) -> bool:
    """Whether a column holds lists of mappings, to judge by the first; a column without cells does.

    Args:
        table: the table.
        column: the column.
        role: a key that the first mapping must have.
        others: keys of which it must have at least one.
    """
    cell = table.first(column)
    if cell is None:
        return True
    if isinstance(cell, str):
        try:
            cell = parse_json(cell, column)
        except InputError:
            return False
    first = cell if isinstance(cell, Mapping) else cell[0] if isinstance(cell, list | tuple | np.ndarray) and len(cell) else None
    if not isinstance(first, Mapping):
        return False
    return first.get(role) is not None and any(first.get(key) is not None for key in others)


def tool_column(table: Table) -> str | None:
    """The column of a table with tools, if it has one. A column of this name with something else is not one."""
    for column in TOOL_COLUMNS:
        cell = table.first(column) if table.has(column) else None
        try:
            if cell is not None and tools_of(cell, ""):
                return column
        except InputError:
            continue
    return None


def tools_in(cells: Mapping[str, Any], column: str | None, where: str, chats: Chats) -> list[dict[str, Any]] | None:
    """The tools of one row; None if it has none."""
    if column is None or not is_present(cells[column]):
        return None
    place, cell = f"{where}: column {column!r}", cells[column]
    raw = parse_json(cell, place, give="a list of tools as JSON text") if isinstance(cell, str) else cell
    chats.count_nulls(raw)
    return tools_of(raw, place) or None


def _with(tools: str | None) -> str:
    return f" with tools in column {tools!r}" if tools else ""
