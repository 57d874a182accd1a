"""Stream corpora that are larger than memory: rows are read one by one, and their tokens go to a memory-mapped file.

Memory holds a task, a group, a digest and a few numbers for each document, and the texts and tokens of one batch. The reader of
data files also holds some rows: one row group of a parquet file in a folder, or what Arrow reads ahead from the hub. The file of
tokens lies in the cache folder of ``datasets`` and is deleted when the process ends.

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
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import Columns
from bora_pyro.data.counts import Documents
from bora_pyro.data.encode import encoder
from bora_pyro.data.files import choose_splits, one_line
from bora_pyro.data.forms import SAMPLE
from bora_pyro.data.rows import RowReader
from bora_pyro.data.tables import Source, check_source, is_hub_id
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, cache_folder, check_max_tokens, pad_token_id
from bora_pyro.errors import InputError, shown

#: A batch ends after this many rows or this many characters, whichever comes first.
BATCH_ROWS, BATCH_CHARACTERS = 1000, 2**18


def stream_documents(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    *,
    hub_split: str | None = None,
    max_tokens: int = 256,
    long_documents: str = "cut",
    chat_template: str | None = None,
) -> tuple[Documents, TokenFile]:
    """Read and tokenise documents in one pass.

    Args:
        source: a hub id, a folder of data files in the hub's form, a folder that ``save_to_disk`` wrote, or a
            ``datasets.Dataset`` or ``DatasetDict``.
        tokenizer: the tokenizer, as for `encoder`.
        columns: the names of the columns to read.
        hub_split: as for ``read_table``.
        max_tokens: longest document in tokens, as for `encoder`.
        long_documents: ``cut`` or ``split``, as for `encoder`.
        chat_template: a template for chats, as for `encoder`.

    Returns:
        The documents as from ``read_documents``, and their tokens. The table has columns ``task``, ``group``, ``split`` if there
        is a split, ``text`` (a digest of the document, equal for equal documents) and ``row`` (the number of the document in the
        file of tokens).

    Raises:
        InputError: the source cannot be streamed, or as for ``read_table`` and ``tokenise``.
    """
    check_max_tokens(max_tokens)
    encode = encoder(tokenizer, max_tokens, long_documents=long_documents, chat_template=chat_template)
    rows, label, has_splits = _open_rows(source, hub_split)
    if has_splits and columns.split is None:
        columns = replace(columns, split="split")
    first = list(islice(rows, SAMPLE))
    if not first:
        raise InputError(f"{label} has no rows; give one document a row")
    template = ChatTemplate.find(tokenizer, chat_template)
    reader = RowReader(columns, list(first[0]), label, first=first, template=template)
    table: dict[str, list[str]] = {name: [] for name in reader.form if name in ("task", "group", "split")}
    content = [name for name in reader.form if name not in table]
    tasks, digests = dict[str, str](), array("q")  # one string object for each distinct name
    with TokenFile() as tokens:
        for rows_of_batch in _batches(reader, chain(first, rows), content):
            for row in rows_of_batch:
                row["task"] = tasks.setdefault(row["task"], row["task"])
                digests.append(_digest([row[name] for name in content]))
                for name, column in table.items():
                    column.append(row[name])
            numbers = range(len(digests) - len(rows_of_batch), len(digests))
            tokens.write(encode({name: [row[name] for row in rows_of_batch] for name in ("task", *content)}, numbers))
    reader.check_any(len(digests))
    left_out = reader.left_out
    table_of_all = datasets.Dataset.from_dict({**table, "text": np.asarray(digests), "row": np.arange(len(digests))})
    return Documents(table_of_all, content, len(digests) + sum(left_out.values()), left_out, reader.notes()), tokens


def _batches(reader: RowReader, rows: Iterable[Mapping[str, Any]], content: Sequence[str]) -> Iterator[list[dict[str, str]]]:
    """The rows that have a document, in batches."""
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
    """A file of the tokens of documents. It is written within a ``with`` block, and then mapped into memory.

    Attributes:
        tokens: (all tokens,) int32, mapped; it exists after the ``with`` block.
        observed: (all tokens,) bool, mapped: whether a token is predicted. None: all are, except the first of each document.
    """

    def __init__(self) -> None:
        self._folder = cache_folder() or Path(tempfile.gettempdir())
        self._masked = False
        self._lengths, self._characters, self._row, self._cut = array("q"), array("q"), array("q"), array("b")

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
    # copy on write ("c"), though nothing is written: torch warns about read-only memory
    values = np.memmap(file, dtype=kind, mode="c") if file.tell() else np.zeros(0, dtype=kind)
    return torch.from_numpy(np.asarray(values))


def _open_rows(source: Source, hub_split: str | None) -> tuple[Iterator[Mapping[str, Any]], str, bool]:
    """An iterator over the rows of a source, the source's name for errors, and whether it has splits of its own."""
    if not isinstance(source, str | Path):
        label = "the DataFrame" if isinstance(source, pd.DataFrame) else "the Dataset"
    else:
        label = f"data {str(source)!r}"
    data = _open(source, label)
    if not isinstance(data, Mapping):
        if hub_split is not None:
            raise InputError(f"hub_split is {shown(hub_split)}, but {label} has no splits; leave it out")
        return _iterate([(None, data)], label), label, False
    parts = choose_splits(data, hub_split)
    return _iterate(parts if len(parts) > 1 else [(None, parts[0][1])], label), label, len(parts) > 1


def _open(source: Source, label: str) -> Any:
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
        data = datasets.load_dataset(str(path if path.is_dir() else source), streaming=True)
        # Read one row group at a time; otherwise Arrow reads ahead as far as it can in a parquet file. Not from the hub, where
        # every row group would be a request.
        return _resharded(data) if path.is_dir() else data
    except Exception as error:  # no network or no such id: one message for all
        raise InputError(
            f"{label} could not be opened as a folder of data files or a hub data set ({one_line(error)}); check the path or "
            "the id"
        ) from error


def _resharded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _resharded(part) for name, part in data.items()}
    return data.reshard() if hasattr(data, "reshard") else data  # datasets 4 has no reshard


def _iterate(parts: Iterable[tuple[str | None, Any]], label: str) -> Iterator[Mapping[str, Any]]:
    for name, part in parts:
        rows = iter(part.with_format(None))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # the readers of `datasets` raise many types of errors
                raise InputError(f"{label} could not be read to its end ({one_line(error)})") from error
            yield row if name is None else {**row, "split": name}


def _digest(content: list[str]) -> int:
    lengths = " ".join(str(len(text)) for text in content)
    digest = hashlib.blake2b(f"{lengths} {''.join(content)}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
