"""A prompt, which is read, and its completion, which is predicted. Both are texts, or both are lists of messages.

>>> form = PromptCompletion("prompt", "completion", None)
>>> form.read({"prompt": "Is it?", "completion": " Yes."}, "row 1")
{'prompt': 'Is it?', 'text': ' Yes.'}
>>> form = PromptCompletion("prompt", "completion", Chats(None))
>>> asked, answered = [{"role": "user", "content": "Is it?"}], [{"role": "assistant", "content": "Yes."}]
>>> form.read({"prompt": asked, "completion": answered}, "row 1")
{'messages': '[{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import holds_messages, messages_of, tool_column, tools_in
from bora_pyro.data.forms.values import text_of
from bora_pyro.errors import InputError

#: The column that says of a completion whether it is a good one.
LABEL = "label"


class PromptCompletion:
    """Prompts with completions in two columns.

    Args:
        prompt: the column of the prompts.
        completion: the column of the completions.
        chats: makes the stored form of chats, if the cells are lists of messages; None: they are texts.
        tools: the column of the tools of chats, or None.
    """

    name: ClassVar[str] = "prompt_completion"
    usual: ClassVar[str] = "prompt, completion"
    missing = "empty text"

    def __init__(self, prompt: str, completion: str, chats: Chats | None, *, tools: str | None = None) -> None:
        self.prompt, self.completion, self.chats, self.tools = prompt, completion, chats, tools
        self.columns = [("prompt_column", prompt), ("completion_column", completion), *([("", tools)] if tools else [])]
        self.content: tuple[str, ...] = ("prompt", "text") if chats is None else ("messages",)
        what = "prompts and completions" if chats is None else "chats in two parts"
        self.recognised = f"{what} in columns {prompt!r} and {completion!r}: the completion is predicted"

    @classmethod
    def recognise(cls, table: Table) -> PromptCompletion | None:
        """Texts or messages in the columns ``prompt`` and ``completion``, or in those that the options name."""
        given = table.columns
        prompt, completion = ("prompt", "completion") if given.prompt is None else (given.prompt, given.text[0])
        if not table.has(prompt, completion):
            return None
        if given.prompt is None and table.has(LABEL) and str(table.first(LABEL)).lower() in ("true", "false"):
            raise InputError(
                f"{table.label} has prompts and completions with a {LABEL!r} that is true or false, as for KTO: a completion "
                "with false is a bad one; keep the rows with true, or name prompt_column and completion_column to read all"
            )
        if not are_messages(table, prompt, completion):
            return cls(prompt, completion, None)
        return cls(prompt, completion, Chats(table.template), tools=tool_column(table))

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The prompt and the completion of one row, or the chat that they are."""
        prompt, completion = f"{where}: column {self.prompt!r}", f"{where}: column {self.completion!r}"
        if self.chats is None:
            text = text_of(cells[self.completion], completion)
            return {"prompt": text_of(cells[self.prompt], prompt), "text": text} if text.strip() else None
        asked = messages_of(cells[self.prompt], prompt, self.chats)
        answered = messages_of(cells[self.completion], completion, self.chats)
        tools = tools_in(cells, self.tools, where, self.chats)
        chat = self.chats.content([*asked, *answered], tools, where, context=len(asked)) if answered else None
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed in chats, or is only read."""
        return [] if self.chats is None else self.chats.notes()


def are_messages(table: Table, *columns: str) -> bool:
    """Whether the columns hold messages, and not texts, to judge by their first cells.

    Raises:
        InputError: some hold messages and others texts.
    """
    found = {
        column: holds_messages(table, column, "role", "content", "tool_calls")
        for column in columns
        if table.first(column) is not None
    }
    if len(set(found.values())) > 1:
        chats = [column for column, is_chat in found.items() if is_chat]
        texts = [column for column, is_chat in found.items() if not is_chat]
        raise InputError(
            f"{table.label} has messages in column {', '.join(map(repr, chats))} and texts in column "
            f"{', '.join(map(repr, texts))}; give both as lists of messages, or both as texts"
        )
    return any(found.values())
