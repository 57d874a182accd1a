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
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

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

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENS = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}


def chat_messages(cell: Any, where: str) -> Messages:
    """The messages in a cell of a table, a list of mappings with ``role`` and ``content``. The cell may also be JSON text.

    >>> chat_messages('[{"role": "user", "content": "Hi", "name": null}]', "row 1")
    [{'role': 'user', 'content': 'Hi'}]

    Args:
        cell: the cell.
        where: the place of the cell, for errors.

    Raises:
        InputError: the cell is something else.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON ({error.msg}); give a list of {{role, content}} as JSON text") from None
    messages = cell.tolist() if isinstance(cell, np.ndarray) else cell  # parquet's lists, as pandas reads them
    if not isinstance(messages, list):
        raise InputError(f"{where} is a {type(messages).__name__} ({messages!r:.40}), not a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f"{where} has the message {message!r:.60}; give each a role, a text, and a content")
    # A table stores None for a key that a message does not have. transformers also drops keys with None.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


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


def chat_template_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The given template, or the tokenizer's own if ``template`` is None.

    Raises:
        InputError: the tokenizer has no template.
    """
    try:
        return str(tokenizer.get_chat_template(template))
    except ValueError:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template to write chats with; give one with "
            "--chat_template FILE.jinja, or use the tokenizer of a chat model"
        ) from None


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
    template = chat_template_of(tokenizer, template)
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} does not give the positions of its tokens; use a fast one for chats"
        )
    read = _read_marked if _MARKED.search(template) else _read_unmarked
    for chat in chats:
        try:
            yield read(tokenizer, json.loads(chat), template)
        except InputError as error:
            raise InputError(f"chat {chat[:60]!r}: {error}") from None
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"chat {chat[:60]!r}: the chat template cannot write it ({one_line(error)})") from None


def _read_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str
) -> tuple[list[int], list[bool], list[int]]:
    encoding = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_TOKENS
    )
    observed = [bool(own) for own in encoding["assistant_masks"]]
    return list(encoding["input_ids"]), observed, [stop for _, stop in encoding["offset_mapping"]]


def _read_unmarked(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str
) -> tuple[list[int], list[bool], list[int]]:
    def written(part: Messages, *, ask: bool = False) -> Any:
        return tokenizer.apply_chat_template(
            part, chat_template=template, add_generation_prompt=ask, return_dict=True, tokenizer_kwargs=_TOKENS
        )

    whole = written(messages)
    ids, stops = list(whole["input_ids"]), [stop for _, stop in whole["offset_mapping"]]
    observed = [False] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if n:
            asked = written(messages[:n], ask=True)["input_ids"]
            first = _common_prefix(ids, asked)
            # The generation prompt may hold more than the turn, such as the beginning of a thought. But it must begin where
            # the messages before it end.
            differs = first < len(asked) and first < _common_prefix(written(messages[:n])["input_ids"], asked)
        else:  # there is no generation prompt before the first message: the turn begins with its text
            begin = _text_start(tokenizer, messages, template)
            first, differs = sum(stop <= begin for stop in stops), False
        until = written(messages[: n + 1])["input_ids"]
        last = _common_prefix(ids, until)
        if last < len(until):  # the template adds an end of chat, or it writes the turn differently if others follow
            ended = _common_prefix(until, written(messages[: n + 1], ask=True)["input_ids"])
            differs, last = differs or last < ended, ended
        if differs:
            raise InputError(
                f"the chat template writes message {n + 1} differently when others follow and does not mark what the assistant "
                "says; give one that marks it with {% generation %} ... {% endgeneration %}: --chat_template FILE.jinja"
            )
        observed[first:last] = [True] * (last - first)
    return ids, observed, stops


def _text_start(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str) -> int:
    """Position in the chat at which the text of the first message begins, in characters.

    It is the first position at which two chats differ that differ in this text only. Searching for the text itself would not do,
    because it may also occur in the header of the turn, or in a system prompt that the template adds.
    """

    def written(content: Any) -> str:
        chat = [{**messages[0], "content": content}, *messages[1:]]
        return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))

    content = messages[0].get("content")
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
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"the chat template cannot write the prompt {shown(prompt)} ({one_line(error)})") from None
    return list(encoding["input_ids"])


def _common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two sequences of tokens or characters."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
