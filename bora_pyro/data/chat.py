"""Chats as the tokenizer's chat template writes them, and which of their tokens are the assistant's.

A template that marks what the assistant says with ``{% generation %}`` is taken at its word. Of one that does not, a turn of the
assistant is all that the template writes behind the request for one (``add_generation_prompt``), with the end of the turn, and of
the chat where it is the last; of a first turn, which nobody has requested, all from its words on. A template that writes a turn
differently when others follow, as some do that think, is refused.

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
#: The role whose turns are predicted, and the one that a prompt has.
ASSISTANT, USER = "assistant", "user"
#: The longest template in bytes: a run keeps it in its config.yaml.
TEMPLATE_BYTES = 2**16
#: The largest file that is read at all.
MAX_TEMPLATE_BYTES = 2**20

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENS = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}


def chat_messages(cell: Any, where: str) -> Messages:
    """The messages in a cell of a table: a list of mappings with ``role`` and ``content``, or that as JSON text.

    >>> chat_messages('[{"role": "user", "content": "Hi", "name": null}]', "row 1")
    [{'role': 'user', 'content': 'Hi'}]

    Raises:
        InputError: it is something else.
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
    # tables fill the keys that a message lacks with None, and transformers, too, gives templates no key that is None
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def load_chat_template(given: str | Path | None) -> str | None:
    """A template in Jinja, from its file or as it is.

    Raises:
        InputError: the file cannot be read, is no regular one or has more than ``MAX_TEMPLATE_BYTES``, or there is no template
            in it.
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
        raise InputError(f"chat_template {str(given)!r} is no template in Jinja: it has neither '{{{{' nor '{{%'")
    return template


def same_chat_template(one: Any, other: Any) -> bool:
    """Whether two options are the same template, be it by its text or by its file.

    >>> same_chat_template("{{ messages }}", "{{ messages }}"), same_chat_template("{{ messages }}", "no.jinja")
    (True, False)
    """
    try:
        return one == other or (
            isinstance(one, str) and isinstance(other, str) and load_chat_template(one) == load_chat_template(other)
        )
    except InputError:  # a file that is gone
        return False


def chat_template_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The template that writes the chats: the one that is given, or the tokenizer's own.

    Raises:
        InputError: there is none.
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
    """Tokens of each chat, whether each is the assistant's, and up to which character of the chat's text it goes.

    Args:
        tokenizer: a fast one, which knows where in the text a token stands.
        chats: JSON texts, lists of messages.
        template: in Jinja; default: the tokenizer's own.

    Raises:
        InputError: no template, a tokenizer without offsets, or a chat that the template cannot write.
    """
    template = chat_template_of(tokenizer, template)
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} does not know where its tokens stand; use a fast one for chats")
    read = _by_marks if _MARKED.search(template) else _by_turns
    for chat in chats:
        try:
            yield read(tokenizer, json.loads(chat), template)
        except InputError as error:
            raise InputError(f"chat {chat[:60]!r}: {error}") from None
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"chat {chat[:60]!r}: the chat template cannot write it ({one_line(error)})") from None


def _by_marks(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str) -> tuple[list[int], list[bool], list[int]]:
    encoding = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=_TOKENS
    )
    observed = [bool(own) for own in encoding["assistant_masks"]]
    return list(encoding["input_ids"]), observed, [stop for _, stop in encoding["offset_mapping"]]


def _by_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str) -> tuple[list[int], list[bool], list[int]]:
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
            first = _common(ids, asked)
            # a request may hold more than the turn will, the beginning of a thought, but begins where the others end
            differs = first < len(asked) and first < _common(written(messages[:n])["input_ids"], asked)
        else:  # no request can be written: the turn begins where its words do
            begin = _first_words(tokenizer, messages, template)
            first, differs = sum(stop <= begin for stop in stops), False
        until = written(messages[: n + 1])["input_ids"]
        last = _common(ids, until)
        if last < len(until):  # the template may close a chat, or write a turn that others follow in another way
            ended = _common(until, written(messages[: n + 1], ask=True)["input_ids"])
            differs, last = differs or last < ended, ended
        if differs:
            raise InputError(
                f"the chat template writes message {n + 1} differently when others follow and does not mark what the assistant "
                "says; give one that marks it with {% generation %} ... {% endgeneration %}: --chat_template FILE.jinja"
            )
        observed[first:last] = [True] * (last - first)
    return ids, observed, stops


def _first_words(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str) -> int:
    """The character at which the words of the first message begin: where chats that differ in these words alone differ.

    Its words may stand elsewhere too, as in the header of the turn or in a system prompt that the template adds.
    """

    def written(content: Any) -> str:
        chat = [{**messages[0], "content": content}, *messages[1:]]
        return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))

    content = messages[0].get("content")
    others = [_instead(content, words) for words in ("A", "B")]
    texts = [written(other) for other in others] if None not in others else ["", ""]
    begin = _common(*texts)
    if begin == len(texts[0]) or not written(content).startswith(texts[0][:begin]):
        raise InputError(
            f"the chat begins with the {ASSISTANT}'s turn, and the chat template does not show where that begins; give one that "
            "marks it with {% generation %} ... {% endgeneration %}: --chat_template FILE.jinja"
        )
    return begin


def _instead(content: Any, words: str) -> Any:
    """A content of the same form with other words; None where it has none."""
    if isinstance(content, str):
        return words
    if not isinstance(content, list) or not content:
        return None
    first, *others = content
    if isinstance(first, Mapping) and isinstance(first.get("text"), str):
        return [{**first, "text": words}, *others]
    return None


def request(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str) -> list[int]:
    """Tokens of a chat in which a user says the prompt, up to where the assistant answers.

        >>> from transformers import AutoTokenizer
        >>> from bora_pyro.backbone.backbone import BUILTIN_BASES
        >>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
        >>> template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}I say:{% endif %}"
        >>> tokenizer.decode(request(tokenizer, "Hi", template))
        'Hi I say:'

    Raises:
        InputError: the template cannot write it.
    """
    try:
        encoding = tokenizer.apply_chat_template(
            [{"role": USER, "content": prompt}], chat_template=template, add_generation_prompt=True, return_dict=True
        )
    except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"the chat template cannot write the prompt {shown(prompt)} ({one_line(error)})") from None
    return list(encoding["input_ids"])


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many tokens, or characters, two texts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
