"""Instructions as Alpaca writes them: ``instruction``, ``input`` and ``output``, also ``system`` and ``history``.

If there is a chat template, a row is a chat. Otherwise it is a prompt, in Alpaca's own words, and its completion.

>>> form = Alpaca("instruction", "input", "output", None)
>>> row = form.read({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "row 1")
>>> print(row["prompt"] + row["text"])
Below is an instruction that describes a task, paired with an input that provides further context. Write a response that \
appropriately completes the request.
<BLANKLINE>
### Instruction:
Add.
<BLANKLINE>
### Input:
1 + 1
<BLANKLINE>
### Response:
2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bora_pyro.data.chat_template import ASSISTANT, USER
from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.sharegpt import with_system
from bora_pyro.data.forms.values import is_present, json_cell, text_of
from bora_pyro.errors import InputError, shown

# The words of Alpaca's prompts (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca), with the line end after "Response:"
# that the column `text` of the published data set has. Models were trained with exactly these words.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n{}\n\n", "### Input:\n{}\n\n", "### Response:\n{}"


class Alpaca:
    """Instructions with an input and an output.

    Args:
        instruction: the column of the instructions.
        input: the column of what an instruction is about, or None.
        output: the column of the answers.
        chats: makes the stored form of chats; None: rows become prompts and completions.
        system: the column of the system prompts, or None.
        history: the column of earlier turns, lists of [question, answer], or None. They are only read.
    """

    name: ClassVar[str] = "alpaca"
    usual: ClassVar[str] = "instruction, output"
    missing = "empty text"

    def __init__(
        self,
        instruction: str,
        input: str | None,
        output: str,
        chats: Chats | None,
        *,
        system: str | None = None,
        history: str | None = None,
    ) -> None:
        self.instruction, self.input, self.output, self.chats = instruction, input, output, chats
        self.system, self.history = system, history
        names = [name for name in (instruction, input, system, history, output) if name]
        self.columns = [("document_form" if name in (instruction, output) else "", name) for name in names]
        self.content: tuple[str, ...] = ("prompt", "text") if chats is None else ("messages",)
        form = (
            "as chats, because there is a chat template" if chats else "with Alpaca's prompt, because there is no chat template"
        )
        self.recognised = f"Alpaca instructions in columns {', '.join(map(repr, names))} ({form}): {output!r} is predicted"

    @classmethod
    def recognise(cls, table: Table) -> Alpaca | None:
        """Instructions in the column ``instruction``, with ``output`` or ``response``."""
        output = table.one_of("output", "response")
        if not table.has("instruction") or output is None:
            return None
        system, history = (name if table.has(name) else None for name in ("system", "history"))
        chats = None if table.template is None else Chats(table.template)
        return cls("instruction", table.one_of("input", "context"), output, chats, system=system, history=history)

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The document of one row."""

        def text(column: str | None) -> str:
            return "" if column is None else text_of(cells[column], f"{where}: column {column!r}")

        instruction, context, output, system = (text(name) for name in (self.instruction, self.input, self.output, self.system))
        if not output.strip():
            return None
        earlier = self._earlier(cells, where)
        if self.chats is None:
            start = system.rstrip() + "\n\n" if system.strip() else WITH_INPUT if context.strip() else WITHOUT_INPUT
            turns = "".join(f"{INSTRUCTION.format(asked)}{RESPONSE.format(answer)}\n\n" for asked, answer in earlier)
            about = INPUT.format(context) if context.strip() else ""
            return {"prompt": f"{start}{turns}{INSTRUCTION.format(instruction)}{about}{RESPONSE.format('')}", "text": output}
        asked = f"{instruction}\n{context}" if context.strip() and instruction.strip() else context or instruction
        turns_of_chat = [(USER, asked), (ASSISTANT, output)]
        for question, answer in reversed(earlier):
            turns_of_chat = [(USER, question), (ASSISTANT, answer), *turns_of_chat]
        messages = with_system([{"role": role, "content": content} for role, content in turns_of_chat], system, where)
        chat = self.chats.content(messages, None, where, context=len(messages) - 1)
        return None if chat is None else {"messages": chat}

    def notes(self) -> list[str]:
        """What was changed in chats."""
        return [] if self.chats is None else self.chats.notes()

    def _earlier(self, cells: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
        if self.history is None or not is_present(cells[self.history]):
            return []
        place = f"{where}: column {self.history!r}"
        pairs = json_cell(cells[self.history], place, give="a list of [question, answer]")
        if not isinstance(pairs, list):
            raise InputError(f"{place} is {shown(pairs)}; give a list of [question, answer]")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise InputError(f"{place} has {shown(pair)}; give a list of [question, answer]")
        return [(question, answer) for question, answer in pairs]
