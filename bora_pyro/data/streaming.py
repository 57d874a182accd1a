"""Corpora larger than memory: rows are read one after another, and their tokens go to a file that is mapped into memory.

What is held of a document is its task, its group, a digest of it and a few numbers; of its text and its tokens no more than a
batch at a time, and of a data file what its reader takes at once: a row group of a parquet file here, and what Arrow reads ahead
of one on a hub. The file of tokens lies beside the others in the cache of ``datasets`` and is gone with the process.

>>> from transformers import AutoTokenizer
>>> from bora_pyro.backbone.backbone import BUILTIN_BASES
>>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
>>> rows = datasets.Dataset.from_dict({"task": ["Ada", "Bo"], "text": ["A set of nodes.", "An edge."]})
>>> table, tokens, notes = stream_documents(rows, tokenizer, Columns(), max_tokens=16)
>>> table.column_names, tokens.of(table, tokenizer, {"Ada": 0, "Bo": 1}).split
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
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.encode import encoder
from bora_pyro.data.files import one_line
from bora_pyro.data.rows import Columns, RowReader
from bora_pyro.data.tables import Source, check_source, is_hub_id
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, cache_folder, check_max_tokens, pad_token_id
from bora_pyro.errors import InputError

#: What is tokenised at one time: rows, or characters where the rows are long.
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**18


def stream_documents(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    *,
    hub_split: str | None = "train",
    max_tokens: int = 256,
    long_documents: str = "cut",
    chat_template: str | None = None,
) -> tuple[datasets.Dataset, TokenFile, list[str]]:
    """Read and tokenise documents in one pass.

    Args:
        source: a hub id, a folder of data files in the hub's form, a folder that ``save_to_disk`` wrote, or a
            ``datasets.Dataset`` or ``DatasetDict``.
        tokenizer: see `encoder`, as for the last three options.
        columns: which column says what.
        hub_split: as for ``read_table``.
        max_tokens: longest document in tokens.
        long_documents: ``cut`` or ``split``.
        chat_template: a template for chats.

    Returns:
        The table without the documents: ``task``, ``group``, ``split`` where there is one, ``text`` (a digest, by which equal
        documents are known) and ``row`` (the number under which the tokens are found); the tokens; notes as of ``read_table``.

    Raises:
        InputError: the source cannot be streamed, or as for ``read_table`` and ``tokenise``.
    """
    check_max_tokens(max_tokens)
    encode = encoder(tokenizer, max_tokens, long_documents=long_documents, chat_template=chat_template)
    rows, label = _rows(source, hub_split)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{label} has no rows; give one document a row")
    reader = RowReader(columns, list(first), label)
    table: dict[str, list[str]] = {name: [] for name in reader.form if name in ("task", "group", "split")}
    content = [name for name in reader.form if name not in table]
    tasks, digests = dict[str, str](), array("q")  # of equal names one is held
    with TokenFile() as tokens:
        for rows_of_batch in _batches(reader, chain([first], rows), content):
            for row in rows_of_batch:
                row["task"] = tasks.setdefault(row["task"], row["task"])
                digests.append(_digest([row[name] for name in content]))
                for name, column in table.items():
                    column.append(row[name])
            numbers = range(len(digests) - len(rows_of_batch), len(digests))
            tokens.write(encode({name: [row[name] for row in rows_of_batch] for name in ("task", *content)}, numbers))
    reader.check_any(len(digests))
    columns_of_table = {**table, "text": np.asarray(digests), "row": np.arange(len(digests))}
    return datasets.Dataset.from_dict(columns_of_table), tokens, reader.notes()


def _batches(reader: RowReader, rows: Iterable[Mapping[str, Any]], content: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """The rows that hold a document, some at a time."""
    batch, characters = list[dict[str, str]](), 0
    for number, cells in enumerate(rows, start=1):
        row = reader.read(number, cells)
        if row is None:
            continue
        batch.append(row)
        characters += sum(len(row[name]) for name in content)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class TokenFile:
    """Tokens of documents in a file, in the order in which they came: written first, then mapped into memory.

    Attributes:
        tokens: (all tokens,) int32, mapped, once ``with`` is left.
        observed: (all tokens,) bool, mapped; None where all but the first of a document are predicted.
    """

    def __init__(self) -> None:
        self._folder = cache_folder() or Path(tempfile.gettempdir())
        self._masked = False
        self._lengths, self._characters, self._row, self._cut = array("q"), array("q"), array("q"), array("b")

    def write(self, columns: Mapping[str, list[Any]]) -> None:
        """Add the documents that an encoder gave, with rising numbers of rows."""
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

    def __enter__(self) -> TokenFile:
        with ExitStack() as stack:
            # gone from the folder with the mapping, whatever ends the process
            self._ids, self._mask = (stack.enter_context(tempfile.TemporaryFile(dir=self._folder)) for _ in range(2))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the writing and map what was written."""
        with self._files:
            self.tokens = _mapped(self._ids, np.int32)
            self.observed = _mapped(self._mask, np.bool_) if self._masked else None
        self._offsets = np.cumsum(self._lengths, dtype=np.int64) - np.asarray(self._lengths)

    def of(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task_index: Mapping[str, int]) -> Tokenised:
        """The tokens of some rows of the table, in its order."""
        rows, known = np.asarray(table["row"][:], dtype=np.int64), np.asarray(self._row)
        first, last = np.searchsorted(known, rows, "left"), np.searchsorted(known, rows, "right")
        pieces = last - first
        # positions of the pieces of each row, one row after another
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
        )
        return Tokenised(
            split,
            num_documents=int((pieces > 0).sum()),
            num_cut=int(np.asarray(self._cut)[places].sum()),
            num_split=int((pieces > 1).sum()),
            num_dropped=int((pieces == 0).sum()),
        )


def _mapped(file: Any, kind: type) -> Tensor:
    file.flush()
    # copy on write, though nothing is written: torch warns of memory that cannot be
    values = np.memmap(file, dtype=kind, mode="c") if file.tell() else np.zeros(0, dtype=kind)
    return torch.from_numpy(np.asarray(values))


def _rows(source: Source, hub_split: str | None) -> tuple[Iterator[Mapping[str, Any]], str]:
    """The rows of a source, read as they are asked for, and how errors call it."""
    if not isinstance(source, str | Path):
        label = "the DataFrame" if isinstance(source, pd.DataFrame) else "the Dataset"
    else:
        label = f"data {str(source)!r}"
    return _reading(_open(source, hub_split, label), label), label


def _open(source: Source, hub_split: str | None, label: str) -> Any:
    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return source
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    if isinstance(source, str | Path):
        check_source(source)
    if path is None or not (path.is_dir() or (is_hub_id(str(source)) and not path.exists())):
        raise InputError(
            f"{label} cannot be streamed; give a hub id or a folder of data files, or leave streaming out to read other tables"
        )
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(path)
        data = datasets.load_dataset(str(path if path.is_dir() else source), split=hub_split, streaming=True)
        # a row group at a time: Arrow would read a parquet file as far ahead as it can. Not from a hub, for each is a request.
        return _resharded(data) if path.is_dir() else data
    except Exception as error:  # no network, no such id, no such split: all the same to the caller
        raise InputError(
            f"{label} could not be opened as a folder of data files or a hub data set ({one_line(error)}); check the path or the "
            f"id, and that it has a split {hub_split!r}"
        ) from error


def _resharded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _resharded(part) for name, part in data.items()}
    return data.reshard() if hasattr(data, "reshard") else data  # datasets 4 has no such thing


def _reading(data: Any, label: str) -> Iterator[Mapping[str, Any]]:
    parts = data.items() if isinstance(data, Mapping) else [(None, data)]
    for name, part in parts:
        rows = iter(part.with_format(None))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # every reader of `datasets` has errors of its own
                raise InputError(f"{label} could not be read to its end ({one_line(error)})") from error
            yield row if name is None or "split" in row else {**row, "split": name}


def _digest(content: list[str]) -> int:
    lengths = " ".join(str(len(text)) for text in content)
    digest = hashlib.blake2b(f"{lengths} {''.join(content)}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
