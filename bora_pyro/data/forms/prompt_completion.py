"""A prompt, which is read, and its completion, which is predicted. Both are texts, or both are lists of messages.

>>> form = PromptCompletion("prompt", "completion", None)
>>> form.read({"prompt": "Is it?", "completion": " Yes."}, "row 1")
{'prompt': 'Is it?', 'text': ' Yes.'}
>>> form = PromptCompletion("prompt", "completion", Chats(None))
>>> asked, answered = [{"role": "user", "content": "Is it?"}], [{"role": "assistant", "content": "Yes."}]
>>> form.read({"prompt": asked, "completion": answered}, "row 1")
{'messages': '[{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]'}
>>> form = PromptCompletion("prompt", "completion", None, options="options")
>>> form.read({"prompt": "Is it?", "completion": " Yes.", "options": [" No.", " Yes."]}, "row 1")
{'prompt': 'Is it?', 'text': ' Yes.', 'options': '[" No.", " Yes."]'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bora_pyro.data.counts import counted
from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import holds_messages, messages_of, tool_column, tools_in
from bora_pyro.data.forms.values import json_cell, json_text, text_of
from bora_pyro.errors import InputError, nearest, shown

#: The column that says of a completion whether it is a good one.
LABEL = "label"


class PromptCompletion:
    """Prompts with completions in two columns.

    Args:
        prompt: the column of the prompts.
        completion: the column of the completions.
        chats: makes the stored form of chats, if the cells are lists of messages; None: they are texts.
        tools: the column of the tools of chats, or None.
        options: the column of the options of each prompt, or None. The completion is one of them.
    """

    name: ClassVar[str] = "prompt_completion"
    usual: ClassVar[str] = "prompt, completion"
    missing = "empty text"

    def __init__(
        self, prompt: str, completion: str, chats: Chats | None, *, tools: str | None = None, options: str | None = None
    ) -> None:
        self.prompt, self.completion, self.chats, self.tools, self.options = prompt, completion, chats, tools, options
        self.columns = [("prompt_column", prompt), ("completion_column", completion), *([("", tools)] if tools else [])]
        self.columns += [("options_column", options)] if options else []
        of_texts = ("prompt", "text", *(["options"] if options else []))
        self.content: tuple[str, ...] = of_texts if chats is None else ("messages",)
        self._repeated = 0
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
            if not text.strip():
                return None
            return {"prompt": text_of(cells[self.prompt], prompt), "text": text, **self._options(cells, text, where)}
        asked = messages_of(cells[self.prompt], prompt, self.chats)
        answered = messages_of(cells[self.completion], completion, self.chats)
        tools = tools_in(cells, self.tools, where, self.chats)
        chat = self.chats.content([*asked, *answered], tools, where, context=len(asked)) if answered else None
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed in chats, or is only read; and how many prompts have an option twice."""
        repeated = [f"{counted(self._repeated, 'prompt')} with an option twice; it counts once"] if self._repeated else []
        return repeated if self.chats is None else self.chats.notes()

    def _options(self, cells: Mapping[str, Any], right: str, where: str) -> Content:
        """The options of one row as JSON text, each once; empty if the documents have none."""
        if self.options is None:
            return {}
        where = f"{where}: column {self.options!r}"
        found = json_cell(cells[self.options], where, give="a list of texts")
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) and text.strip() for text in found):
            raise InputError(f"{where} is {shown(cells[self.options])}; give a list of two or more texts")
        if right not in found:
            raise InputError(
                f"{where} lacks the completion {shown(right)}; the right option must be one of them, letter by letter"
                f"{nearest(right, found)}"
            )
        options = list(dict.fromkeys(found))
        if len(options) < 2:
            raise InputError(f"{where} has the option {shown(right)} alone; give two different ones or more")
        self._repeated += len(options) < len(found)
        return {"options": json_text(options)}


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
