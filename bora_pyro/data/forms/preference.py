"""Preferences, as for reward models and DPO: the chosen answer is a document. The rejected one is another option, or is ignored.

>>> form = Preference("prompt", frozenset(), None)
>>> form.read({"prompt": "Is it?", "chosen": " Yes.", "rejected": " Perhaps."}, "row 1")
{'prompt': 'Is it?', 'text': ' Yes.'}
>>> form.with_rejected("the table").read({"prompt": "Is it?", "chosen": " Yes.", "rejected": " Perhaps."}, "row 1")
{'prompt': 'Is it?', 'text': ' Yes.', 'options': '[" Yes.", " Perhaps."]'}
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bora_pyro.data.chat_template import ASSISTANT, USER
from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import holds_messages, messages_of, tool_column, tools_in
from bora_pyro.data.forms.sharegpt import KEYS, mapped_turn
from bora_pyro.data.forms.turns import Message
from bora_pyro.data.forms.values import json_text, text_of
from bora_pyro.errors import InputError, shown

CHOSEN, REJECTED = "chosen", "rejected"
# What comes after the last white space of a text: a word that may be cut in the middle.
_LAST_WORD = re.compile(r"\S+\Z")
#: Columns with what comes before the chosen answer.
PROMPTS = ("prompt", "question", "conversations")


class Preference:
    """Chosen answers, with or without a prompt; each is a text or a list of messages.

    Args:
        prompt: the column of the prompts, or None.
        chats_in: the columns that hold messages, and not texts.
        chats: makes the stored form of chats, if a column holds messages.
        tools: the column of the tools of chats, or None.
        unread: other columns of the table, for the note.
    """

    name: ClassVar[str] = "preference"
    usual: ClassVar[str] = "chosen, rejected"
    missing = "empty text"
    #: Whether the rejected answer is read too.
    pairs = False

    def __init__(
        self,
        prompt: str | None,
        chats_in: frozenset[str],
        chats: Chats | None,
        *,
        tools: str | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        self.prompt, self.chats_in, self.chats, self.tools = prompt, chats_in, chats, tools
        self.columns = [("document_form", name) for name in (prompt, CHOSEN) if name] + [("", name) for name in (tools,) if name]
        self.content: tuple[str, ...] = ("messages",) if chats else ("text",) if prompt is None else ("prompt", "text")
        before = f" after {prompt!r}" if prompt else ""
        more = f" and {len(unread) - 10} more" if len(unread) > 10 else ""
        others = f"; not read: {', '.join(shown(name, characters=30) for name in unread[:10])}{more}" if unread else ""
        self.recognised = f"preferences: the answer in column {CHOSEN!r}{before} is predicted, {REJECTED!r} is ignored{others}"

    @classmethod
    def recognise(cls, table: Table) -> Preference | None:
        """Answers in the columns ``chosen`` and ``rejected``."""
        if not table.has(CHOSEN, REJECTED) or (table.has("instruction") and not table.has("prompt")):
            return None
        prompt = table.one_of(*PROMPTS)
        held = [name for name in (prompt, CHOSEN) if name and table.first(name) is not None]
        chats_in = frozenset(name for name in held if any(holds_messages(table, name, *keys) for keys in KEYS))
        chats = Chats(table.template) if chats_in else None
        tools = tool_column(table) if chats else None
        given = table.columns
        known = {prompt, CHOSEN, REJECTED, tools, *given.task, given.group, given.split, "doc_id"}
        return cls(prompt, chats_in, chats, tools=tools, unread=[str(name) for name in table.names if name not in known])

    def with_rejected(self, label: str) -> Preference:
        """The form that reads the rejected answer as another option. Without a column of prompts, the prompt is what both answers
        begin with, up to the last white space.

        Args:
            label: the name of the table, for an error.

        Raises:
            InputError: the answers are chats.
        """
        if self.chats is not None:
            raise InputError(
                f"{label} has chats as preferences, whose rejected answers cannot be read as options; give texts in the columns "
                f"{self.prompt or 'prompt'}, {CHOSEN} and {REJECTED}"
            )
        other = copy.copy(self)
        other.pairs = True
        other.columns = [*self.columns, ("options_column", REJECTED)]
        other.content, other.missing = ("prompt", "text", "options"), "empty or equal answers"
        before = f"after {self.prompt!r}" if self.prompt else "after their common beginning"
        other.recognised = f"preferences: the answer in column {CHOSEN!r} {before} is preferred to that in {REJECTED!r}"
        return other

    def _pair(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The prompt, the chosen answer, and both answers as JSON text; None if they do not differ."""
        chosen, rejected = (text_of(cells[name], f"{where}: column {name!r}") for name in (CHOSEN, REJECTED))
        if self.prompt is not None:
            prompt = text_of(cells[self.prompt], f"{where}: column {self.prompt!r}")
        else:
            prompt = _LAST_WORD.sub("", _common_prefix(chosen, rejected))
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if chosen == rejected or not (chosen.strip() and rejected.strip()):
            return None
        return {"prompt": prompt, "text": chosen, "options": json_text([chosen, rejected])}

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The document of one row."""
        if self.pairs:
            return self._pair(cells, where)
        if self.chats is None:
            text = text_of(cells[CHOSEN], f"{where}: column {CHOSEN!r}")
            prompt = {} if self.prompt is None else {"prompt": text_of(cells[self.prompt], f"{where}: column {self.prompt!r}")}
            return {**prompt, "text": text} if text.strip() else None
        chosen = self._messages(CHOSEN, ASSISTANT, cells, where)
        asked = [] if self.prompt is None else self._messages(self.prompt, USER, cells, where)
        if not chosen:
            return None
        messages, context = self._joined(asked, chosen, where)
        chat = self.chats.content(messages, tools_in(cells, self.tools, where, self.chats), where, context=context)
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed in chats, or is only read."""
        return [] if self.chats is None else self.chats.notes()

    def _messages(self, column: str, role: str, cells: Mapping[str, Any], where: str) -> list[Message]:
        """The messages in a column. A text is one message of ``role``."""
        place = f"{where}: column {column!r}"
        if column not in self.chats_in:
            text = text_of(cells[column], place)
            return [{"role": role, "content": text}] if text.strip() else []
        found = messages_of(cells[column], place, self.chats)
        if not any(isinstance(turn, Mapping) and "from" in turn for turn in found):
            return found
        return [mapped_turn(turn, KEYS[0], f"{place}, message {n}") for n, turn in enumerate(found, start=1)]

    def _joined(self, asked: list[Message], chosen: list[Message], where: str) -> tuple[list[Message], int]:
        """The whole chat, and the number of messages before the answer.

        The chosen messages may be the answer alone, or begin with the prompt again.
        """
        if chosen[: len(asked)] == asked and len(chosen) > len(asked) > 0:
            return chosen, len(asked)
        roles = [message.get("role") for message in chosen if isinstance(message, Mapping)]
        if USER not in roles:
            return [*asked, *chosen], len(asked)
        if asked and asked[-1].get("content") not in [message.get("content") for message in chosen]:
            raise InputError(
                f"{where}: the chat in column {CHOSEN!r} has turns of the user, but not the prompt in column {self.prompt!r}; "
                "give the answer alone, or the whole chat"
            )
        return chosen, len(roles) - roles[::-1].index(USER)


def _common_prefix(one: str, other: str) -> str:
    shared = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))
    return one[:shared]
