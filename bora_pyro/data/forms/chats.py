"""Write chats of any form as one JSON text each, and count what is worth a note.

The JSON text is a list of messages if all turns of the assistant are predicted and there are no tools. Otherwise it is a mapping
with ``messages``; ``predicted``, a bool for each message; and ``tools``.

>>> chats = Chats(None)
>>> chats.content([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], None, "row 1")
'[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]'
>>> chats.content([{"role": "assistant", "content": "Yes?", "weight": 0}], None, "row 2")
'{"messages": [{"role": "assistant", "content": "Yes?"}], "predicted": [false]}'
>>> chats.notes()
['1 turn of the assistant is marked with weight, loss_weight, train or loss as not to be predicted: it is only read']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bora_pyro.data.chat_template import ASSISTANT, TEMPLATE_ERRORS, USER, ChatTemplate, Messages
from bora_pyro.data.forms.turns import (
    MARKS,
    Message,
    as_text_parts,
    check_content,
    is_empty,
    is_parts,
    is_value,
    joined_parts,
    says,
    take_mark,
    with_arguments,
    with_calls,
)
from bora_pyro.data.forms.values import holds_null, json_text
from bora_pyro.errors import InputError, shown

#: After so many chats in which a template does not write a kind of thing, it is taken not to write it at all.
TRIES = 20
#: So many kinds of things that a template does not write are named in a note.
MOST_KINDS = 10
#: Roles of chats whose turns are only read. Another role may be another name of the assistant.
READ_ROLES = ("system", "developer", USER, "tool", "function", "ipython")


class Chats:
    """Makes the stored form of chats.

    Args:
        template: the template that will write them. What it cannot take is changed, with a note. None: nothing is changed.
    """

    def __init__(self, template: ChatTemplate | None) -> None:
        self.template = template
        self._counts: Counter[str] = Counter()
        self._written: set[tuple[str, str]] = set()
        self._unwritten: Counter[tuple[str, str]] = Counter()
        self._other_roles: Counter[str] = Counter()

    def content(self, messages: Sequence[Any], tools: list[dict[str, Any]] | None, where: str, *, context: int = 0) -> str | None:
        """The JSON text of a chat; None for a chat without messages.

        Args:
            messages: mappings with ``role`` and ``content``, as from `structure`.
            tools: the tools that the assistant could call.
            where: the place of the chat, for errors.
            context: so many messages at the beginning are only read.

        Raises:
            InputError: a message cannot be used.
        """
        if not messages:
            return None
        older = any(isinstance(message, Mapping) and "function_call" in message for message in messages)
        read = [self._message(message, f"{where}, message {n}", older) for n, message in enumerate(messages, start=1)]
        chat = [message for message, _ in read]
        predicted = [n >= context and self._predicted(message, mark) for n, (message, mark) in enumerate(read)]
        if ASSISTANT not in (message["role"] for message in chat):
            self._counts["without"] += 1
        self._check_template(chat, tools)
        if not tools and all(own for message, own in zip(chat, predicted, strict=True) if message["role"] == ASSISTANT):
            return json_text(chat)
        return json_text({"messages": chat, "predicted": predicted, **({"tools": tools} if tools else {})})

    def notes(self) -> list[str]:
        """One line for each kind of thing that was changed, left out or is not predicted."""
        lines = [line for key, line in _LINES.items() if self._counts[key] for line in [_counted(self._counts[key], line)]]
        if others := [(role, number) for role, number in self._other_roles.items() if number]:
            named = [f"{shown(role, characters=30)} ({number})" for role, number in others[:MOST_KINDS]]
            more = f" and {len(others) - MOST_KINDS} more" if len(others) > MOST_KINDS else ""
            lines.append(
                f"turns of other roles than {ASSISTANT!r} are only read, also those of {', '.join(named)}{more}; "
                "--document_form sharegpt knows other names of the assistant"
            )
        kinds = [kind for kind in self._unwritten if kind not in self._written]
        if kinds:
            named = [_UNWRITTEN[kind].format(shown(name, characters=30)) for kind, name in kinds[:MOST_KINDS]]
            more = f" and {len(kinds) - MOST_KINDS} more" if len(kinds) > MOST_KINDS else ""
            lines.append(f"the chat template does not write {', '.join(named)}{more}")
        return lines

    def count_nulls(self, value: Any) -> None:
        """Count a cell in which a key of a tool or of a tool call is null."""
        self._counts["nulls"] += holds_null(value)

    def _message(self, message: Any, where: str, older: bool) -> tuple[Message, bool | None]:
        """A message as the template takes it, and the mark that says whether it is predicted.

        In OpenAI's older chats with ``function_call``, the role ``function`` is today's ``tool``.
        """
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or ("content" not in message and role not in (ASSISTANT, "tool", "function")):
            raise InputError(f"{where} is {shown(message)}; give each message a role, a text, and a content")
        message, mark = take_mark(with_calls(dict(message), where), where)
        if message.get("content") == []:
            message["content"] = ""
        if older and message["role"] == "function":
            message["role"] = "tool"
        if message["role"] in ("tool", "function") and is_value(message.get("content")):
            message = self._tool_content(message)
        else:
            check_content(message, where)
        if self.template is not None and "tool_calls" in message:
            message = with_arguments(message, self.template.takes_arguments, where)
            if not says(message.get("content")):
                return self.template.without_content(message), mark
        return self._with_content(message), mark

    def _predicted(self, message: Message, mark: bool | None) -> bool:
        if message["role"] != ASSISTANT:
            self._counts["others"] += bool(mark)
            self._other_roles[message["role"]] += message["role"] not in READ_ROLES
            return False
        if is_empty(message):
            self._counts["empty"] += mark is not False
            return False
        self._counts["marked"] += mark is False
        return mark is not False

    def _tool_content(self, message: Message) -> Message:
        """A tool's message. What the tool gives may be any value; it becomes JSON text if the template would not write JSON."""
        content, template = message["content"], self.template
        if template is None or (isinstance(content, Mapping) and template.takes_objects):
            return message
        self._counts["objects"] += 1
        return {**message, "content": json_text(content)}

    def _with_content(self, message: Message) -> Message:
        """A message with its content as the template takes it: a text, a list of parts, or a list with one part."""
        content: Any = message.get("content")
        template, parts = self.template, is_parts(content) and not is_value(content)
        if not parts and not isinstance(content, str):
            return message
        if template is None or (template.takes_parts if parts else template.takes_texts):
            return {**message, "content": as_text_parts(content)} if parts else message
        text = joined_parts(content) if parts else content
        if parts and template.takes_texts:
            self._counts["joined"] += 1
            return {**message, "content": text}
        if template.takes_one_part:
            self._counts["one" if parts else "wrapped"] += len(content) > 1 if parts else 1
            return {**message, "content": [{"type": "text", "text": text}]}
        return message

    def _check_template(self, chat: Messages, tools: list[dict[str, Any]] | None) -> None:
        """Find out, for each kind of thing in a chat, whether the template writes it. Each kind is tried until it is written."""
        template = self.template
        if template is None:
            return
        for kind, others, other_tools in _variants(chat, tools):
            if kind in self._written or self._unwritten[kind] >= TRIES:
                continue
            try:
                same = template.text(chat, tools) == template.text(others, other_tools)
            except TEMPLATE_ERRORS:  # the reader of the chats says what is wrong with a chat that cannot be written
                same = False
            if same:
                self._unwritten[kind] += 1
            else:
                self._written.add(kind)


def _variants(
    chat: Messages, tools: list[dict[str, Any]] | None
) -> Iterator[tuple[tuple[str, str], Messages, list[dict[str, Any]] | None]]:
    """Each kind of thing in a chat, and the chat without it."""
    if tools:
        yield ("tools", ""), chat, None
    for n, message in enumerate(chat):
        before, after, role = chat[:n], chat[n + 1 :], message["role"]
        content = message.get("content")
        if role != ASSISTANT and says(content):
            other = "~" if isinstance(content, str) else [{**part, "text": "~"} for part in content or ()]
            if other != content:
                yield ("role", role), [*before, {**message, "content": other}, *after], tools
        if "tool_calls" in message:
            yield ("calls", ""), [*before, {key: message[key] for key in message if key != "tool_calls"}, *after], tools
        if role == ASSISTANT and says(content) and "tool_calls" in message:
            yield ("beside calls", ""), [*before, {**message, "content": ""}, *after], tools
        # ids, and the name of the tool beside them, are for programs: templates seldom write them
        for key in () if role == "tool" else message:
            if key not in ("role", "content", "tool_calls", "id"):
                rest = {name: value for name, value in message.items() if name != key}
                yield ("key", key), [*before, rest, *after], tools


_UNWRITTEN = {
    "tools": "the tools",
    "role": "messages of the role {}",
    "calls": "tool calls",
    "beside calls": "the text of a turn that calls tools",
    "key": "the key {} of messages",
}
_LINES = {
    "marked": f"turn{{s}} of the assistant {{are}} marked with {', '.join(MARKS[:-1])} or {MARKS[-1]} as not to be predicted: "
    "{they} {are} only read",
    "others": "turn{s} of other roles {are} marked to be predicted: {they} {are} only read, only the assistant's are predicted",
    "empty": "turn{s} of the assistant {have} no text and no tool call: {they} {are} only read",
    "without": f"chat{{s}} {{have}} no turn of the role {ASSISTANT!r}",
    "joined": "message{s} {have} a list of texts where the chat template takes one text: joined by line ends",
    "wrapped": "message{s} {have} a text where the chat template takes a list of parts: given as a list with one part",
    "one": "message{s} {have} several texts where the chat template takes a list with one part: joined by line ends",
    "objects": "message{s} of tools {hold} a value that is not a text: given to the chat template as JSON text",
    "nulls": "cell{s} {have} null in tools or tool calls: read as missing (to keep it, give arguments as JSON text)",
}


def _counted(number: int, line: str) -> str:
    one = {"s": "", "are": "is", "they": "it", "have": "has", "hold": "holds"}
    many = {"s": "s", "are": "are", "they": "they", "have": "have", "hold": "hold"}
    return f"{number} {line.format(**(one if number == 1 else many))}"
