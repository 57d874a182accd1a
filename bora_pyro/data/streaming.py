"""Stream corpora that are larger than memory: rows are read one by one, and their tokens go to a memory-mapped file.

Memory holds a task, a group, a digest and a few numbers for each document, and the texts and tokens of one batch. The reader of
data files also holds some rows: a part of a row group of a parquet file, or a whole .json list or spreadsheet. The file of tokens
lies in the cache folder of ``datasets`` and is deleted when the process ends.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> rows = datasets.Dataset.from_dict({"task": ["Ada", "Bo"], "text": ["A set of nodes.", "An edge."]})
>>> documents, tokens = stream_documents(rows, tokenizer, Columns(), max_tokens=16)
>>> documents.table.column_names, tokens.of(documents.table, tokenizer, {"Ada": 0, "Bo": 1}).split
(['task', 'group', 'text', 'row'], TokenSplit(2 documents, 11 predicted tokens, 2 tasks))
"""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import Columns
from bora_pyro.data.counts import Documents
from bora_pyro.data.encode import encoder
from bora_pyro.data.readers import ReadingOptions, Source, open_source
from bora_pyro.data.tables import read_rows
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, cache_folder, check_max_tokens, pad_token_id
from bora_pyro.errors import InputError

#: A batch ends after this many rows or this many characters, whichever comes first.
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**18


def stream_documents(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    *,
    hub_split: str | None = None,
    reading: ReadingOptions | None = None,
    max_tokens: int = 256,
    long_documents: str = "cut",
    chat_template: str | None = None,
) -> tuple[Documents, TokenFile]:
    """Read and tokenise documents in one pass.

    Args:
        source: as for ``read_table``.
        tokenizer: the tokenizer, as for `encoder`.
        columns: the names of the columns to read.
        hub_split: as for ``read_table``.
        reading: as for ``read_table``.
        max_tokens: longest document in tokens, as for `encoder`.
        long_documents: ``cut`` or ``split``, as for `encoder`.
        chat_template: a template for chats, as for `encoder`.

    Returns:
        The documents as from ``read_documents``, and their tokens. The table has columns ``task``, ``group``, ``split`` if there
        is a split, ``text`` (a digest of the document, equal for equal documents) and ``row`` (the number of the document in the
        file of tokens).

    Raises:
        InputError: as for ``read_table`` and ``tokenise``.
    """
    check_max_tokens(max_tokens)
    encode = encoder(tokenizer, max_tokens, long_documents=long_documents, chat_template=chat_template)
    raw = open_source(source, reading, hub_split=hub_split, whole=False)
    reader, rows = read_rows(raw, columns, ChatTemplate.find(tokenizer, chat_template))
    table: dict[str, list[str]] = {name: [] for name in reader.form if name in ("task", "group", "split")}
    content = [name for name in reader.form if name not in table]
    tasks, digests = dict[str, str](), array("q")  # one string object for each distinct name
    with TokenFile() as tokens:
        for rows_of_batch in _batches(rows, content):
            for row in rows_of_batch:
                row["task"] = tasks.setdefault(row["task"], row["task"])
                digests.append(_digest([row[name] for name in content]))
                for name, column in table.items():
                    column.append(row[name])
            numbers = range(len(digests) - len(rows_of_batch), len(digests))
            tokens.write(encode({name: [row[name] for row in rows_of_batch] for name in ("task", *content)}, numbers))
    table_of_all = datasets.Dataset.from_dict({**table, "text": np.asarray(digests), "row": np.arange(len(digests))})
    notes = raw.notes + reader.notes()
    return Documents(table_of_all, content, raw.num_rows, reader.left_out, notes, **reader.about), tokens


def _batches(rows: Iterable[dict[str, str]], content: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """The documents in batches."""
    batch, characters = list[dict[str, str]](), 0
    for row in rows:
        batch.append(row)
        characters += sum(len(row[name]) for name in content)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TokenFile:
    """A file of the tokens of documents. It is written within a ``with`` block, and then mapped into memory.

    Attributes:
        tokens: (all tokens,) int32, mapped; it exists after the ``with`` block.
        observed: (all tokens,) bool, mapped: whether a token is predicted. None: all are, except the first of each document.
    """

    def __init__(self) -> None:
        self._folder = cache_folder() or Path(tempfile.gettempdir())
        self._masked = self._questions = False
        self._lengths, self._characters, self._row = array("q"), array("q"), array("q")
        self._cut, self._correct = array("b"), array("b")

    def write(self, columns: Mapping[str, list[Any]]) -> None:
        """Append documents from an `encoder`. Their row numbers must increase from call to call."""
        try:
            self._ids.write(np.fromiter(chain.from_iterable(columns["input_ids"]), dtype=np.int32).tobytes())
            if "observed" in columns:
                self._masked = True
                self._mask.write(np.fromiter(chain.from_iterable(columns["observed"]), dtype=np.bool_).tobytes())
        except OSError as error:
            raise InputError(
                f"tokens cannot be written to {self._folder} ({error.strerror or error}); set HF_DATASETS_CACHE to a disk with "
                "room for them"
            ) from None
        self._lengths.extend(map(len, columns["input_ids"]))
        for name, values in (("characters", self._characters), ("row", self._row), ("cut", self._cut)):
            values.extend(columns[name])
        if "correct" in columns:
            self._questions = True
            self._correct.extend(columns["correct"])

    def __enter__(self) -> TokenFile:
        with ExitStack() as stack:
            # temporary files without a name are deleted with the mapping, even if the process is killed
            self._ids, self._mask = (stack.enter_context(tempfile.TemporaryFile(dir=self._folder)) for _ in range(2))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop writing and map the file into memory."""
        with self._files:
            self.tokens = _mapped(self._ids, np.int32)
            self.observed = _mapped(self._mask, np.bool_) if self._masked else None
        self._offsets = np.cumsum(self._lengths, dtype=np.int64) - np.asarray(self._lengths)

    def of(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task_index: Mapping[str, int]) -> Tokenised:
        """The tokens of the documents in ``table``, in its order.

        Args:
            table: some rows of the table of `stream_documents`.
            tokenizer: the tokenizer, for the padding token.
            task_index: index of each task, by name.
        """
        rows, known = np.asarray(table["row"][:], dtype=np.int64), np.asarray(self._row)
        first, last = np.searchsorted(known, rows, "left"), np.searchsorted(known, rows, "right")
        pieces = last - first
        # positions in the file of all pieces of each row
        places = np.repeat(first - np.cumsum(pieces) + pieces, pieces) + np.arange(pieces.sum())
        task = np.array([task_index[name] for name in table["task"][:]], dtype=np.int64)
        split = TokenSplit(
            self.tokens,
            torch.from_numpy(np.asarray(self._lengths)[places]),
            task=torch.from_numpy(np.repeat(task, pieces)),
            characters=torch.from_numpy(np.asarray(self._characters)[places]),
            num_tasks=len(task_index),
            pad_token_id=pad_token_id(tokenizer),
            observed=self.observed,
            offsets=torch.from_numpy(self._offsets[places]),
            document_index=torch.from_numpy(np.repeat(np.arange(len(pieces)), pieces)) if pieces.max(initial=0) > 1 else None,
            correct=torch.from_numpy(np.asarray(self._correct, dtype=bool)[places]) if self._questions and len(places) else None,
        )
        return Tokenised(
            split,
            num_documents=int((pieces > 0).sum()),
            num_cut=int(np.asarray(self._cut)[places].sum()),
            num_split=0 if self._questions else int((pieces > 1).sum()),
            num_dropped=int((pieces == 0).sum()),
        )


def _mapped(file: Any, kind: type) -> Tensor:
    file.flush()
    # copy on write ("c"), though nothing is written: torch warns about read-only memory
    values = np.memmap(file, dtype=kind, mode="c") if file.tell() else np.zeros(0, dtype=kind)
    return torch.from_numpy(np.asarray(values))


def _digest(content: list[str]) -> int:
    lengths = " ".join(str(len(text)) for text in content)
    digest = hashlib.blake2b(f"{lengths} {''.join(content)}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
