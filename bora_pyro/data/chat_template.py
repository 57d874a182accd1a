"""Chat templates: where they come from, and what they can write.

Templates differ in what they take: some write a content that is a list of parts, others only texts; some take the arguments of a
tool call as a mapping, others as JSON text; some leave out what they do not know. `ChatTemplate` finds out by rendering small
chats.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> template = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.role + ': ' + m.content }}. {% endfor %}")
>>> template.text([{"role": "user", "content": "Hi"}])
'user: Hi. '
>>> template.takes_texts, template.takes_parts
(True, False)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import BatchEncoding, PreTrainedTokenizerBase

from bora_pyro.data.files import one_line
from bora_pyro.errors import InputError, shown
from bora_pyro.files.regular import read_regular

Messages = list[dict[str, Any]]
#: The role whose turns are predicted, and the role of a prompt.
ASSISTANT, USER = "assistant", "user"
#: The longest template in bytes. A run stores it in its config.yaml, which has a limit of its own.
TEMPLATE_BYTES = 2**16
#: The largest template file, in bytes, that is read at all.
MAX_TEMPLATE_BYTES = 2**20
#: What a message that only calls tools may have for a content, in the order in which it is tried.
NO_CONTENT: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
#: What a template may raise for a chat that it cannot write.
TEMPLATE_ERRORS = (jinja2.TemplateError, ValueError, TypeError, LookupError)


class ChatTemplate:
    """Writes chats with a template, and finds out what the template can write.

    Args:
        tokenizer: the tokenizer, with its own template and the special tokens that a template may write.
        given: a Jinja template; None: the tokenizer's own. If the tokenizer has several, a chat with tools is written by the one
            named ``tool_use``.

    Raises:
        InputError: there is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: str | None = None) -> None:
        self.tokenizer, self.given = tokenizer, given
        self._calls: dict[tuple[type, str], int] = {}
        chat_template_of(tokenizer, given)

    @classmethod
    def find(cls, tokenizer: PreTrainedTokenizerBase, given: str | None) -> ChatTemplate | None:
        """The template that writes chats, or None if there is none."""
        return None if given is None and not tokenizer.chat_template else cls(tokenizer, given)

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The template's text."""
        return chat_template_of(self.tokenizer, self.given, tools)

    def sources(self) -> list[str]:
        """The texts of all templates that may be used."""
        return list(dict.fromkeys((self.source(), self.source([{}]))))

    def text(self, messages: Messages, tools: Sequence[Any] | None = None, *, ask: bool = False) -> str:
        """A chat as the template writes it, with the generation prompt if ``ask``. Raises one of `TEMPLATE_ERRORS`."""
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.source(tools), add_generation_prompt=ask, tokenize=False
            )
        )

    def tokens(self, messages: Messages, tools: Sequence[Any] | None = None, *, ask: bool = False, **options: Any) -> Any:
        """A chat in tokens, as a ``BatchEncoding``. Raises one of `TEMPLATE_ERRORS`."""
        encoding: BatchEncoding = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.source(tools),
            add_generation_prompt=ask,
            return_dict=True,
            **options,
        )
        return encoding

    def tries(self, messages: Messages, tools: Sequence[Any] | None = None) -> str | None:
        """As `text`, but None if the template cannot write the chat."""
        try:
            return self.text(messages, tools)
        except TEMPLATE_ERRORS:
            return None

    def writes(self, messages: Messages, tools: Sequence[Any] | None, others: Messages) -> bool:
        """Whether the text of a chat differs from that of another. It does if the template can write only the first."""
        return self.text(messages, tools) != self.tries(others, tools)

    @cached_property
    def takes_texts(self) -> bool:
        """Whether the template writes a content that is a text."""
        return self._writes_content("alpha omega", "alpha omega")

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template writes a content that is a list of parts of text."""
        return self._writes_content([{"type": "text", "text": word} for word in ("alpha", "omega")], "alpha", "omega")

    @cached_property
    def takes_one_part(self) -> bool:
        """Whether the template writes a content that is a list with one part of text."""
        return self._writes_content([{"type": "text", "text": "alpha omega"}], "alpha omega")

    @cached_property
    def takes_arguments(self) -> type | None:
        """``dict`` if the template writes the arguments of a tool call best as a mapping, ``str`` if best as JSON text.

        If both are as good it is ``dict``, as transformers recommends. None: it writes neither.
        """
        best = max(((kind, content) for content in NO_CONTENT for kind in (dict, str)), key=lambda way: self._calls_well(*way))
        return best[0] if self._calls_well(*best) else None

    def without_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message that calls tools and has no content, with what the template needs in its place: nothing, None or ""."""
        kind = self.takes_arguments
        if kind is None:
            return message
        given = {"content": message["content"]} if "content" in message else {}
        best = max((given, *NO_CONTENT), key=lambda content: self._calls_well(kind, content))  # the first of the best
        return {**{key: value for key, value in message.items() if key != "content"}, **best}

    @cached_property
    def takes_objects(self) -> bool:
        """Whether the template writes the content of a tool's message as JSON if it is a mapping."""
        if self.takes_arguments is None:
            return False
        calling = self.without_content(_calling(self.takes_arguments, {}))
        answer = {"role": "tool", "name": "gamma", "tool_call_id": "call00001", "content": {"alpha": "omega"}}
        written = self.tries([{"role": USER, "content": "beta"}, calling, answer], [_TOOL])
        asked = self.tries([{"role": USER, "content": "beta"}, calling], [_TOOL])
        return written is not None and written.count('"alpha": "omega"') > (asked or "").count('"alpha": "omega"')

    def _calls_well(self, kind: type, content: dict[str, Any]) -> int:
        """How well the template writes a tool call with arguments of a kind: 0 (not at all) to 2."""
        key = (kind, repr(content))
        if key not in self._calls:
            written = self.tries([{"role": USER, "content": "beta"}, _calling(kind, content)], [_TOOL])
            there = written is not None and "alpha" in written and "omega" in written
            # as Python text, or as JSON text within a JSON text
            odd = there and any(text in str(written) for text in ("{'alpha'", '\\"alpha', "None"))
            self._calls[key] = int(there) + int(there and not odd)
        return self._calls[key]

    def _writes_content(self, content: Any, *words: str) -> bool:
        written = self.tries([{"role": USER, "content": content}, {"role": ASSISTANT, "content": content}])
        if written is None or any(written.count(word) < 2 for word in words):
            return False
        return not isinstance(content, list) or ("'text'" not in written and '"text"' not in written)


def _calling(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    arguments: Any = {"alpha": "omega"} if kind is dict else '{"alpha": "omega"}'
    call = {"id": "call00001", "type": "function", "function": {"name": "gamma", "arguments": arguments}}
    return {"role": ASSISTANT, **content, "tool_calls": [call]}


_TOOL = {
    "type": "function",
    "function": {
        "name": "gamma",
        "description": "delta",
        "parameters": {"type": "object", "properties": {"zeta": {"type": "string", "description": "epsilon"}}, "required": []},
    },
}


def load_chat_template(given: str | Path | None) -> str | None:
    """Load a Jinja chat template.

    Args:
        given: the template as text, the path of its file, or None, which is returned as it is.

    Raises:
        InputError: the file cannot be read, is not a regular file, is too large, or does not hold a template.
    """
    if given is None or (isinstance(given, str) and ("{%" in given or "{{" in given)):
        return given
    try:
        template = read_regular(Path(given).expanduser(), most=MAX_TEMPLATE_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"chat_template {str(given)!r} cannot be read ({one_line(error)}); give a .jinja file") from None
    if len(template.encode()) > TEMPLATE_BYTES:
        raise InputError(
            f"chat_template {str(given)!r} has {len(template.encode())} bytes; a template has {TEMPLATE_BYTES} at most"
        )
    if "{%" not in template and "{{" not in template:
        raise InputError(f"chat_template {str(given)!r} is not a Jinja template: it has neither '{{{{' nor '{{%'")
    return template


def same_chat_template(one: Any, other: Any) -> bool:
    """Whether two options mean the same template. Each may be the template's text or the path of its file.

    >>> same_chat_template("{{ messages }}", "{{ messages }}"), same_chat_template("{{ messages }}", "no.jinja")
    (True, False)
    """
    try:
        return one == other or (
            isinstance(one, str) and isinstance(other, str) and load_chat_template(one) == load_chat_template(other)
        )
    except InputError:  # the file does not exist any more
        return False


def chat_template_of(tokenizer: PreTrainedTokenizerBase, template: str | None, tools: Sequence[Any] | None = None) -> str:
    """The given template, or the tokenizer's own if ``template`` is None.

    A tokenizer may have a template for chats with tools besides that for other chats.

    Raises:
        InputError: the tokenizer has no template.
    """
    try:
        return str(tokenizer.get_chat_template(template, tools))
    except ValueError:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template to write chats with; give one with "
            "--chat_template FILE.jinja, or use the tokenizer of a chat model"
        ) from None


def chat_prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str) -> list[int]:
    """Token ids of a chat in which the user says the prompt, up to the place where the assistant's answer begins.

        >>> from transformers import AutoTokenizer
        >>> from bora_pyro.backbone.backbone import BUILTIN_BASES
        >>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
        >>> template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}I say:{% endif %}"
        >>> tokenizer.decode(chat_prompt_tokens(tokenizer, "Hi", template))
        'Hi I say:'

    Raises:
        InputError: the template fails on this chat.
    """
    try:
        encoding = tokenizer.apply_chat_template(
            [{"role": USER, "content": prompt}], chat_template=template, add_generation_prompt=True, return_dict=True
        )
    except TEMPLATE_ERRORS as error:
        raise InputError(f"the chat template cannot write the prompt {shown(prompt)} ({one_line(error)})") from None
    return list(encoding["input_ids"])
