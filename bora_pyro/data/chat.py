"""Tokenise chats with a chat template, and find out which tokens are the assistant's.

If the template marks the assistant's text with ``{% generation %}``, the marked tokens are the assistant's. Otherwise each turn
of the assistant is found by rendering parts of the chat:

- The turn begins after the generation prompt (``add_generation_prompt``). If the assistant speaks first, there is no generation
  prompt, and the turn begins with its text.
- The turn ends with its end mark. The last turn ends with the chat.

Some templates, for example of reasoning models, write a turn differently if other turns follow. These templates are refused.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> template = (
...     "{% for message in messages %}{{ message.role }}: {{ message.content }}\\n{% endfor %}"
...     "{% if add_generation_prompt %}assistant:{% endif %}"
... )
>>> chat = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
>>> [(ids, observed, _)] = read_chats(tokenizer, [chat], template)
>>> tokenizer.decode([token for token, own in zip(ids, observed) if own])
' Hello\\n'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from bora_pyro.data.chat_template import ASSISTANT, TEMPLATE_ERRORS, ChatTemplate, Messages
from bora_pyro.data.files import one_line
from bora_pyro.data.forms.turns import says, without_text
from bora_pyro.errors import InputError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENS = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}


@dataclass(frozen=True)
class Chat:
    """A chat, as `forms.chats` stores it.

    Attributes:
        messages: the messages.
        predicted: whether each message is predicted.
        tools: the tools that the assistant could call, or None.
    """

    messages: Messages
    predicted: list[bool]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def parse(cls, text: str) -> Chat:
        """The chat of a JSON text, which is a list of messages, or a mapping that also has the other attributes.

        >>> Chat.parse('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]').predicted
        [False, True]
        """
        found = json.loads(text)
        if isinstance(found, list):
            return cls(found, [message["role"] == ASSISTANT for message in found])
        return cls(found["messages"], found["predicted"], found.get("tools"))


def read_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[str], template: str | None = None
) -> Iterator[tuple[list[int], list[bool], list[int]]]:
    """Tokenise chats.

    Args:
        tokenizer: a fast tokenizer, which knows the position of each token in the text.
        chats: lists of messages as JSON texts.
        template: a Jinja template; default: the tokenizer's own.

    Yields:
        For each chat its token ids, whether each token is the assistant's, and the position in the chat's text at which each
        token ends, in characters.

    Raises:
        InputError: there is no template, the tokenizer is not a fast one, or the template fails on a chat.
    """
    writer = ChatTemplate(tokenizer, template)
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} does not give the positions of its tokens; use a fast one for chats"
        )
    for text in chats:
        chat = Chat.parse(text)
        read = _read_marked if _MARKED.search(writer.source(chat.tools)) else _read_unmarked
        try:
            found = read(writer, chat)
            _check_written(writer, chat)
        except InputError as error:
            raise InputError(f"chat {text[:60]!r}: {error}") from None
        except TEMPLATE_ERRORS as error:
            calls = any("tool_calls" in message for message in chat.messages) and writer.takes_arguments is None
            hint = "; it seems to know no tool calls: give one that does, with --chat_template FILE.jinja" if calls else ""
            raise InputError(f"chat {text[:60]!r}: the chat template cannot write it ({one_line(error)}){hint}") from None
        yield found


def _read_marked(writer: ChatTemplate, chat: Chat) -> tuple[list[int], list[bool], list[int]]:
    encoding = writer.tokens(chat.messages, chat.tools, tokenizer_kwargs=_TOKENS)
    ids, stops = list(encoding["input_ids"]), [stop for _, stop in encoding["offset_mapping"]]
    places = np.maximum.accumulate(np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2))
    observed = np.zeros(len(ids), dtype=bool)
    # Not transformers' own mask: it ends at the first text that begins with a character of no token, such as a dropped space.
    for first, last in _predicted_marks(writer, chat):
        observed[np.searchsorted(places[:, 1], first, "right") : np.searchsorted(places[:, 0], last, "left")] = True
    return ids, observed.tolist(), stops


def _predicted_marks(writer: ChatTemplate, chat: Chat) -> list[tuple[int, int]]:
    """(first, last) character of each marked text of the assistant's that is predicted."""
    own = [predicted for message, predicted in zip(chat.messages, chat.predicted, strict=True) if message["role"] == ASSISTANT]
    if not any(own):
        return []
    _, [marks] = render_jinja_template(
        [chat.messages],
        tools=chat.tools,
        chat_template=writer.source(chat.tools),
        return_assistant_tokens_mask=True,
        **writer.tokenizer.special_tokens_map,
    )
    if all(own):
        return list(marks)
    if len(marks) != len(own):
        raise InputError(
            f"some turns of the {ASSISTANT} are only read, and the chat template marks {len(marks)} texts for {len(own)} "
            "turns with {% generation %}; give one that marks one text for each: --chat_template FILE.jinja"
        )
    return [mark for mark, predicted in zip(marks, own, strict=True) if predicted]


def _read_unmarked(writer: ChatTemplate, chat: Chat) -> tuple[list[int], list[bool], list[int]]:
    messages = chat.messages

    def written(part: Messages, *, ask: bool = False) -> Any:
        return writer.tokens(part, chat.tools, ask=ask, tokenizer_kwargs=_TOKENS)

    whole = written(messages)
    ids, stops = list(whole["input_ids"]), [stop for _, stop in whole["offset_mapping"]]
    observed = [False] * len(ids)
    for n, predicted in enumerate(chat.predicted):
        if not predicted:
            continue
        request: list[int] = []
        if n:
            asked, before = written(messages[:n], ask=True)["input_ids"], written(messages[:n])["input_ids"]
            first, request = _common_prefix(ids, asked), asked[_common_prefix(before, asked) :]
            # The generation prompt may hold more than the turn, such as the beginning of a thought. But it must begin where
            # the messages before it end.
            differs = first < len(asked) and first < len(asked) - len(request)
        else:  # there is no generation prompt before the first message: the turn begins with its text
            begin = _text_start(writer, chat)
            first, differs = sum(stop <= begin for stop in stops), False
        until = written(messages[: n + 1])["input_ids"]
        last = _common_prefix(ids, until)
        if last < len(until):  # the template adds an end of chat, or it writes the turn differently if others follow
            goes_on = written(messages[: n + 1], ask=True)["input_ids"]
            ended = _common_prefix(until, goes_on)
            differs, last = differs or last < ended, ended
            # The last turn may end with another mark than the turns before it. Those end where the next generation prompt begins.
            end = len(goes_on) - len(request)
            if request and end > ended and goes_on[end:] == request and ids[:end] == goes_on[:end]:
                last = end
        if differs:
            raise InputError(
                f"the chat template writes message {n + 1} differently when others follow and does not mark what the assistant "
                "says; give one that marks it with {% generation %} ... {% endgeneration %}: --chat_template FILE.jinja"
            )
        observed[first:last] = [True] * (last - first)
    return ids, observed, stops


def _check_written(writer: ChatTemplate, chat: Chat) -> None:
    """Check that the template writes what each predicted turn says and calls; otherwise an empty turn would be predicted."""
    for n, message in enumerate(chat.messages):
        if not chat.predicted[n]:
            continue
        calls = message.get("tool_calls") or []
        for call in range(len(calls)):
            rest = {**message, "tool_calls": [*calls[:call], *calls[call + 1 :]]}
            if len(calls) == 1:
                del rest["tool_calls"]
            if not _differs(writer, chat, n, rest):
                which = "the tool call" if len(calls) == 1 else f"tool call {call + 1}"
                raise InputError(
                    f"the chat template does not write {which} of message {n + 1}, which would be predicted without it; give a "
                    "template that does: --chat_template FILE.jinja"
                )
        content = message.get("content")
        if says(content) and not calls and not _differs(writer, chat, n, {**message, "content": without_text(content)}):
            raise InputError(
                f"the chat template does not write the content of message {n + 1}, which would be predicted without it; give a "
                "template that does: --chat_template FILE.jinja"
            )


def _differs(writer: ChatTemplate, chat: Chat, n: int, other: dict[str, Any]) -> bool:
    return writer.writes(chat.messages, chat.tools, [*chat.messages[:n], other, *chat.messages[n + 1 :]])


def _text_start(writer: ChatTemplate, chat: Chat) -> int:
    """Position in the chat at which the text of the first message begins, in characters.

    It is the first position at which two chats differ that differ in this text only. Searching for the text itself would not do,
    because it may also occur in the header of the turn, or in a system prompt that the template adds.
    """
    first, *rest = chat.messages

    def written(content: Any) -> str:
        return writer.text([{**first, "content": content}, *rest], chat.tools)

    content = first.get("content")
    others = [_with_text(content, text) for text in ("A", "B")]
    texts = [written(other) for other in others] if None not in others else ["", ""]
    begin = _common_prefix(*texts)
    if begin == len(texts[0]) or not written(content).startswith(texts[0][:begin]):
        raise InputError(
            f"the chat begins with the {ASSISTANT}'s turn, and the chat template does not show where that begins; give one that "
            "marks it with {% generation %} ... {% endgeneration %}: --chat_template FILE.jinja"
        )
    return begin


def _with_text(content: Any, text: str) -> Any:
    """The content of a message with ``text`` in place of its own text; None if it has no text."""
    if isinstance(content, str):
        return text
    if not isinstance(content, list) or not content:
        return None
    first, *others = content
    if isinstance(first, Mapping) and isinstance(first.get("text"), str):
        return [{**first, "text": text}, *others]
    return None


def _common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two sequences of tokens or characters."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
