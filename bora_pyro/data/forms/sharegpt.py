"""Chats as ShareGPT writes them: a list of turns with ``from`` and ``value``, and other names of the roles.

>>> form = ShareGPT("conversations", ("from", "value"), [], Chats(None))
>>> form.read({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, "row 1")
{'messages': '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]'}
>>> form.recognised
"ShareGPT chats in column 'conversations' (human -> user, gpt -> assistant): the assistant's turns are predicted"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bora_pyro.data.chat_template import ASSISTANT, USER
from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import holds_messages, messages_of, tool_column, tools_in
from bora_pyro.data.forms.turns import Message
from bora_pyro.data.forms.values import json_cell, text_of
from bora_pyro.errors import InputError, nearest, shown

#: The roles of ShareGPT chats, and what templates call them. A call is a turn of the assistant whose value is JSON text.
ROLES = {
    "human": USER, "user": USER, "prompter": USER,
    "gpt": ASSISTANT, "assistant": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT,
    "bing": ASSISTANT, "ai": ASSISTANT,
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
    "ipython": "tool",
    "function_call": "function_call", "tool_call": "function_call",
}  # fmt: skip
#: Keys of the role and of the text of a turn.
KEYS = (("from", "value"), ("role", "content"), ("role", "value"), ("from", "content"))
USUAL_COLUMNS = ("conversations", "conversation")


class ShareGPT:
    """A chat with ShareGPT's names, which become those that templates know.

    Args:
        column: the column of the chats.
        keys: the keys of the role and of the text of a turn.
        roles: the roles of the first rows, for the note.
        chats: makes the stored form of chats.
        system: the column of the system prompt, or None.
        tools: the column of the tools, or None.
        option: the option that named the column.
    """

    name: ClassVar[str] = "sharegpt"
    usual: ClassVar[str] = "conversations"
    content: tuple[str, ...] = ("messages",)
    missing = "no messages"

    def __init__(
        self,
        column: str,
        keys: tuple[str, str],
        roles: Sequence[str],
        chats: Chats,
        *,
        system: str | None = None,
        tools: str | None = None,
        option: str = "messages_column",
    ) -> None:
        self.column, self.keys, self.chats, self.system, self.tools = column, keys, chats, system, tools
        self.columns = [(option, column), *(("", name) for name in (system, tools) if name)]
        others = [f"{what} in column {name!r}" for what, name in (("system prompts", system), ("tools", tools)) if name]
        known = [role for role in roles if role.strip().lower() in ROLES]
        mapped = ", ".join(f"{role.strip()} -> {_shown_role(role)}" for role in known or ("human", "gpt"))
        self.recognised = (
            f"ShareGPT chats in column {column!r}{''.join(f', {other}' for other in others)} ({mapped}): "
            "the assistant's turns are predicted"
        )

    @classmethod
    def recognise(cls, table: Table) -> ShareGPT | None:
        """Chats in the column ``conversations`` or ``conversation``, or in that of ``messages_column``."""
        column = table.columns.messages or table.one_of(*USUAL_COLUMNS)
        preference = table.has("chosen", "rejected") and table.columns.document_form != cls.name  # a prompt in this form
        if column is None or not table.has(column) or preference:
            return None
        keys = next((keys for keys in KEYS if holds_messages(table, column, *keys)), None)
        if keys is None:
            return None
        roles = list[str]()
        for row in table.rows:
            roles += _roles(row.get(column), keys[0])
        system = "system" if table.has("system") else None
        chats = Chats(table.template)
        return cls(column, keys, list(dict.fromkeys(roles)), chats, system=system, tools=tool_column(table))

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The chat of one row."""
        place = f"{where}: column {self.column!r}"
        turns = messages_of(cells[self.column], place, self.chats)
        messages = [mapped_turn(turn, self.keys, f"{place}, message {n}") for n, turn in enumerate(turns, start=1)]
        if messages and self.system is not None:
            system = text_of(cells[self.system], f"{where}: column {self.system!r}")
            messages = with_system(messages, system, where)
        chat = self.chats.content(messages, tools_in(cells, self.tools, where, self.chats), place)
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed, or is only read."""
        return self.chats.notes()


def mapped_turn(turn: Any, keys: tuple[str, str], where: str) -> Message:
    """A turn with the names that templates know.

    >>> mapped_turn({"from": "observation", "value": "7"}, ("from", "value"), "row 1, message 2")
    {'role': 'tool', 'content': '7'}

    Args:
        turn: a mapping.
        keys: its keys of the role and of the text.
        where: its place, for errors.

    Raises:
        InputError: the turn has no role, or one that is not in `ROLES`.
    """
    role_key, text_key = keys
    role = turn.get(role_key) if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise InputError(f"{where} is {shown(turn)}; give each turn {role_key!r}, a text, and {text_key!r}")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise InputError(f"{where} has the role {shown(role)}; known: {', '.join(ROLES)}{nearest(role, ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in keys}
    if known != "function_call":
        return {"role": known, **({"content": turn[text_key]} if text_key in turn else {}), **rest}
    calls = json_cell(turn.get(text_key), where, give="a call with name and arguments")
    return {"role": ASSISTANT, "tool_calls": [_call(call) for call in (calls if isinstance(calls, list) else [calls])], **rest}


def with_system(messages: list[Message], system: str, where: str) -> list[Message]:
    """A chat with a system prompt before it.

    Raises:
        InputError: the chat begins with another system prompt.
    """
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0].get("content") != system:
            raise InputError(f"{where} has a system prompt in column 'system' and another one in the chat; keep one of them")
        return messages
    return [{"role": "system", "content": system}, *messages]


def _call(call: Any) -> Any:
    return {"type": "function", "function": call} if isinstance(call, Mapping) and "function" not in call else call


def _roles(cell: Any, key: str) -> list[str]:
    try:
        return [turn[key] for turn in messages_of(cell, "") if isinstance(turn, Mapping) and isinstance(turn.get(key), str)]
    except InputError:  # the reading of the row says what is wrong
        return []


def _shown_role(role: str) -> str:
    known = ROLES[role.strip().lower()]
    return "assistant's call" if known == "function_call" else known
