"""Turn documents into the tokens that a causal language model reads and predicts.

A text becomes ``start, text..., end``. The start is bos, or eos if the tokenizer has no bos. With it the first token of the text
can be predicted. The end is eos. With it the model learns where documents stop. A prompt comes between start and text and is not
predicted. A chat is written by the tokenizer's chat template, and only the assistant's tokens are predicted. A prompt with
options gives one such document for each option.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> columns = encoder(tokenizer, 64)({"task": ["a"], "prompt": ["A graph is"], "text": [" a set"]})
>>> list(zip(tokenizer.convert_ids_to_tokens(columns["input_ids"][0]), columns["observed"][0]))[-3:]
[('Ġa', True), ('Ġset', True), ('</s>', True)]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat import read_chats
from bora_pyro.errors import InputError, check_one_of

#: What to do with a document of more than ``max_tokens`` tokens.
LONG_DOCUMENTS = ("cut", "split")
#: Names of the columns that hold a document, in the tables of ``read_table``.
CONTENT = ("prompt", "text", "options", "messages")

Rows = Mapping[str, Sequence[Any]]
Encoded = dict[str, list[Any]]


def content_columns(names: Sequence[str]) -> list[str]:
    """The columns in ``names`` that hold a document."""
    return [name for name in CONTENT if name in names]


def encoder(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, long_documents: str = "cut", chat_template: str | None = None
) -> Callable[..., Encoded]:
    """A function that tokenises rows.

    The function takes a mapping of columns and, as an option, the numbers of the rows (default: from 0). The columns are ``task``
    and either ``text``, or ``prompt`` and ``text``, or ``messages`` (a chat as JSON text), and with prompts ``options`` if there
    are (a list as JSON text, one of which is ``text``). It returns the columns ``input_ids``,
    ``task``, ``characters`` (the number of characters of the predicted tokens), ``cut`` (whether the document was cut) and
    ``row`` (the number of the row). With prompts or chats there is also ``observed``, whether each token is predicted. A row
    without a token to predict gives no document.

    A row with options gives a document for each option, the prompt followed by it, and a column ``correct``: whether the option
    is ``text``. No option is cut: if one has no token, or is too long with its prompt, the row gives no documents at all.

    A prompt and its text are tokenised together. If the tokens of the whole do not begin with the tokens of the prompt alone, the
    two are tokenised separately, as they are when a model continues a prompt.

    Args:
        tokenizer: any tokenizer with a bos or an eos token.
        max_tokens: longest document in tokens, with start and end.
        long_documents: ``cut`` drops the tokens after the first ``max_tokens``, and so the end. ``split`` makes several pieces,
            so that every token is predicted once. Each piece begins with the start and the whole prompt, because the prompt
            gives the text its meaning. The last piece has the end. A piece of a chat begins with bos, or with the token before
            the piece if the tokenizer has no bos. If a prompt leaves no room for a token of the text, there is no document.
        chat_template: a Jinja template; default: the tokenizer's own.

    Raises:
        InputError: the tokenizer has neither bos nor eos, a chat cannot be read, or ``long_documents`` is unknown.
    """
    check_one_of("long_documents", long_documents, LONG_DOCUMENTS)
    reader = _Encoder(tokenizer, chat_template)

    def encode(rows: Rows, numbers: Sequence[int] | None = None) -> Encoded:
        if "options" in rows:
            return _questions(reader, rows, range(len(rows["task"])) if numbers is None else numbers, max_tokens)
        documents = reader.chats(rows["messages"]) if "messages" in rows else reader.texts(rows["text"], rows.get("prompt"))
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


def _questions(reader: _Encoder, rows: Rows, numbers: Sequence[int], max_tokens: int) -> Encoded:
    """The columns of rows with options: a document for each option."""
    columns: Encoded = {name: [] for name in ("input_ids", "task", "characters", "cut", "row", "observed", "correct")}
    options = [json.loads(text) for text in rows["options"]]
    prompts = [prompt for prompt, own in zip(rows["prompt"], options, strict=True) for _ in own]
    documents = reader.texts([option for own in options for option in own], prompts)
    for task, right, own, number in zip(rows["task"], rows["text"], options, numbers, strict=True):
        of_row = [next(documents) for _ in own]
        if any(not document.body or len(document.head) + len(document.body) > max_tokens for document in of_row):
            continue
        for option, document in zip(own, of_row, strict=True):
            (piece,) = document.pieces(max_tokens, split=False)
            piece |= {"task": task, "row": number, "correct": option == right}
            for name, values in columns.items():
                values.append(piece[name])
    return columns


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token at the start of a text: bos, or eos if the tokenizer has no bos.

    Raises:
        InputError: the tokenizer has neither.
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
    """The tokens of one document: a head, which every piece begins with, and a body, which may be split into pieces.

    Attributes:
        head: the start and the prompt. These tokens are never predicted.
        later_head: the head of later pieces, as long as ``head``. None: each of them begins with the token before it.
        body: all tokens after the head.
        characters: number of characters of the text of the whole body, for a body that is predicted completely.
        ends: a function that returns the position in the text, in characters, at which each token of the body ends. It takes the
            numbers of tokens after which pieces end. A slow tokenizer knows only the positions of these ends; its others are 0.
        observed: whether each token of the body is predicted; None: all are.
    """

    head: list[int]
    later_head: list[int] | None
    body: list[int]
    characters: int
    ends: Callable[[list[int]], np.ndarray]
    observed: list[bool] | None = None

    def pieces(self, max_tokens: int, *, split: bool) -> Iterator[dict[str, Any]]:
        """The rows of the token table: one for the document, one for each piece if it is split, or none."""
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
        return self.body[first - 1 : first] if self.later_head is None else self.later_head

    def _widths(self, room: int) -> np.ndarray:
        """Number of characters of each token of the body. For a slow tokenizer only the sum over each piece is right."""
        ends = np.maximum.accumulate(self.ends([*range(room, len(self.body), room)]))
        if self.observed is None:
            ends[-1] = self.characters  # with the characters after the last token; the end token has no characters
        return np.diff(ends, prepend=0)


class _Encoder:
    """Tokenises texts, prompts with texts, and chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.start, self.end = start_token(tokenizer), tokenizer.eos_token_id

    def texts(self, texts: Sequence[str], prompts: Sequence[str] | None) -> Iterator[_Document]:
        """The documents of texts, with their prompts if there are prompts."""
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

        def ends(piece_ends: list[int]) -> np.ndarray:
            found = np.zeros(len(body), dtype=np.int64)
            if stops is not None:
                found[: len(ids)] = stops
            else:  # a slow tokenizer: decode up to the end of each piece
                for end in piece_ends:
                    found[end - 1] = len(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            return found

        head = [self.start, *prompt]
        return _Document(head, head, body, len(text), ends)

    def _tokens(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[int] | None]]:
        """Token ids of each text, and the position in the text, in characters, at which each token ends (None if unknown).

        The start and the end that a tokenizer may add are removed.
        """
        # verbose=False: no warning about long texts, because they are cut or split here
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
            # if the chat begins with the assistant's text, its first token is predicted, and a start goes before it
            first = 0 if observed[:1] == [True] else 1
            head = ids[:1] if first else [self.start]
            bos = self.tokenizer.bos_token_id  # the head of later pieces: the first token of a chat may be anything
            body_stops = np.array(stops[first:], dtype=np.int64) - (stops[0] if first and stops else 0)

            def ends(_: list[int], stops: np.ndarray = body_stops) -> np.ndarray:
                return stops

            yield _Document(head, None if bos is None else [bos], ids[first:], 0, ends, observed[first:])
