"""From documents to the tokens that a causal language model reads and predicts.

A text becomes ``start, text..., end``: the start (bos, or eos where the tokenizer has no bos) makes the first token of the text a
predicted one, the end (eos) makes the model say where a document stops. A prompt stands between start and text and is only
read. A chat is what the tokenizer's chat template makes of it, and of its tokens the assistant's are predicted.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> columns = encoder(tokenizer, 64)({"task": ["a"], "prompt": ["A graph is"], "text": [" a set"]})
>>> list(zip(tokenizer.convert_ids_to_tokens(columns["input_ids"][0]), columns["observed"][0]))[-3:]
[('Ġa', True), ('Ġset', True), ('</s>', True)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat import read_chats
from bora_pyro.errors import InputError, nearest

#: What becomes of a document that is longer than the longest that is read.
LONG_DOCUMENTS = ("cut", "split")
#: The columns of a table that hold a document, by their names there.
CONTENT = ("prompt", "text", "messages")

Rows = Mapping[str, Sequence[Any]]
Encoded = dict[str, list[Any]]


def content_columns(names: Sequence[str]) -> list[str]:
    """Those of the columns that hold a document."""
    return [name for name in CONTENT if name in names]


def encoder(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, long_documents: str = "cut", chat_template: str | None = None
) -> Callable[..., Encoded]:
    """The function that makes tokens of rows.

    It takes rows with the columns ``task`` and ``text``, ``prompt`` and ``text``, or ``messages`` (a chat as JSON text), and
    numbers of the rows (default: from 0). Its columns are ``input_ids``, ``task``, ``characters`` (of the predicted tokens),
    ``cut`` and ``row`` (the row's number), and where there are prompts or chats ``observed``, whether a token is predicted. Rows
    without a token to predict are left out.

    A prompt is followed by its text as the tokenizer reads both together; where the prompt's own tokens do not begin those, the
    two are tokenised apart, as they are when a model goes on from a prompt.

    Args:
        tokenizer: any tokenizer with a bos or an eos token.
        max_tokens: longest document in tokens, with start and end.
        long_documents: ``cut`` leaves out what is beyond, the end included; ``split`` makes pieces, so that every token is
            predicted once: each begins with the start and the whole prompt, without which its text would mean something else,
            and the last one has the end. A piece of a chat begins with bos, or where the tokenizer has none with the token before
            it. A prompt that leaves no room for a token of the text makes no document.
        chat_template: a template in Jinja; default: the tokenizer's own.

    Raises:
        InputError: the tokenizer has neither bos nor eos, a chat cannot be read, or `long_documents` is unknown.
    """
    if long_documents not in LONG_DOCUMENTS:
        hint = nearest(str(long_documents), LONG_DOCUMENTS)
        raise InputError(f"long_documents is {long_documents!r}; allowed: {', '.join(LONG_DOCUMENTS)}{hint}")
    forms = _Forms(tokenizer, chat_template)

    def encode(rows: Rows, numbers: Sequence[int] | None = None) -> Encoded:
        documents = forms.chats(rows["messages"]) if "messages" in rows else forms.texts(rows["text"], rows.get("prompt"))
        masked = "messages" in rows or "prompt" in rows
        names = ("input_ids", "task", "characters", "cut", "row", *(("observed",) if masked else ()))
        columns: Encoded = {name: [] for name in names}
        for row, document in enumerate(documents):
            for piece in document.pieces(max_tokens, split=long_documents == "split"):
                of_row = {"task": rows["task"][row], "row": row if numbers is None else numbers[row]}
                for name, values in columns.items():
                    values.append(of_row[name] if name in of_row else piece[name])
        return columns

    return encode


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with: bos, or eos where there is no bos.

    Raises:
        InputError: there is neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token, so the first token of a text cannot "
            "be predicted; set tokenizer.bos_token, or use the tokenizer of a causal language model"
        )
    return int(start)


@dataclass
class _Document:
    """A document's tokens: a head stands in front of every piece of the body.

    Attributes:
        head: only read: the start, and the prompt.
        later: the head of the pieces behind the first, as long as the other; of a text that has none they begin with the token
            before them.
        body: the tokens behind it.
        characters: of the text of the whole body, where all of it is predicted.
        stops: up to which character of it each token of the body goes; 0 where it is not known, but for the ends that are asked.
        observed: which tokens of the body are predicted; None: all.
    """

    head: list[int]
    later: list[int] | None
    body: list[int]
    characters: int
    stops: Callable[[list[int]], np.ndarray]
    observed: list[bool] | None = None

    def pieces(self, max_tokens: int, *, split: bool) -> Iterator[dict[str, Any]]:
        """The rows of the table of tokens that the document makes: one, several where it is split, or none."""
        room = max_tokens - len(self.head)
        if room < 1 or not self.body:
            return
        cut, plain = len(self.body) > room and not split, len(self.body) <= room and self.observed is None
        widths = None if plain else self._widths(room)
        for first in range(0, len(self.body), room) if split else (0,):
            head, body = self._head(first), self.body[first : first + room]
            observed = [True] * len(body) if self.observed is None else self.observed[first : first + room]
            if any(observed):
                yield {
                    "input_ids": head + body,
                    "observed": [False] * len(self.head) + observed,
                    "characters": self.characters if widths is None else int(widths[first : first + room][observed].sum()),
                    "cut": cut,
                }

    def _head(self, first: int) -> list[int]:
        if not first:
            return self.head
        return self.body[first - 1 : first] if self.later is None else self.later

    def _widths(self, room: int) -> np.ndarray:
        """How many characters each token of the body stands for, or those of a piece of `room` tokens together."""
        stops = np.maximum.accumulate(self.stops([*range(room, len(self.body), room)]))
        if self.observed is None:
            stops[-1] = self.characters  # what follows the last token, and an end that stands for no character
        return np.diff(stops, prepend=0)


class _Forms:
    """What a tokenizer makes of texts, of prompts with texts, and of chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.start, self.end = start_token(tokenizer), tokenizer.eos_token_id

    def texts(self, texts: Sequence[str], prompts: Sequence[str] | None) -> Iterator[_Document]:
        """The documents of texts, behind their prompts where there are some."""
        if prompts is None:
            for text, (ids, stops) in zip(texts, self._tokens(texts), strict=True):
                yield self._document([], ids, stops, text)
            return
        wholes = self._tokens([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        for prompt, text, (head, _), (ids, stops) in zip(prompts, texts, self._tokens(prompts), wholes, strict=True):
            if ids[: len(head)] == head and len(ids) > len(head):
                ids = ids[len(head) :]
                stops = None if stops is None else [max(stop - len(prompt), 0) for stop in stops[len(head) :]]
            else:
                ((ids, stops),) = self._tokens([text])
            yield self._document(head, ids, stops, text)

    def _document(self, prompt: list[int], ids: list[int], stops: list[int] | None, text: str) -> _Document:
        body = [*ids, self.end] if ids and self.end is not None else ids

        def known(ends: list[int]) -> np.ndarray:
            found = np.zeros(len(body), dtype=np.int64)
            if stops is not None:
                found[: len(ids)] = stops
            else:  # a tokenizer without offsets: only where a piece ends
                for end in ends:
                    found[end - 1] = len(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            return found

        head = [self.start, *prompt]
        return _Document(head, head, body, len(text), known)

    def _tokens(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[int] | None]]:
        """Ids of each text without a start and an end that the tokenizer adds, and where each one's characters stop."""
        # verbose=False: lengths over the model's limit are cut or split, there is nothing to warn of.
        encoding = self.tokenizer(
            list(texts),
            add_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        for row, ids in enumerate(encoding["input_ids"]):
            first = int(list(ids[:1]) == [self.start])
            last = len(ids) - (len(ids) > first and ids[-1] == self.end)
            stops = [stop for _, stop in encoding["offset_mapping"][row]] if self.tokenizer.is_fast else None
            yield list(ids[first:last]), None if stops is None else stops[first:last]

    def chats(self, chats: Sequence[str]) -> Iterator[_Document]:
        """The documents of chats, each a JSON text."""
        for ids, observed, stops in read_chats(self.tokenizer, chats, self.chat_template):
            # the first token is predicted where the assistant has the first word, and then there is a start before it
            first = 0 if observed[:1] == [True] else 1
            head = ids[:1] if first else [self.start]
            bos = self.tokenizer.bos_token_id  # what a chat begins with is no beginning of a piece
            behind = np.array(stops[first:], dtype=np.int64) - (stops[0] if first and stops else 0)

            def known(_: list[int], stops: np.ndarray = behind) -> np.ndarray:
                return stops

            yield _Document(head, None if bos is None else [bos], ids[first:], 0, known, observed[first:])
