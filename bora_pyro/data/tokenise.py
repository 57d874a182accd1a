"""Tokenise a table of documents, and cache the tokens for the next run.

The tokens are kept in the cache of ``datasets``, under a fingerprint of the documents, the tokenizer and the options.
``encode.py`` describes which tokens a document has.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.encode import content_columns, encoder
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError

# Increase this number when `tokenise` changes its output, so that older caches are not read.
_CACHE_VERSION = 4


class Tokenised(NamedTuple):
    """The tokens of one split, and counts of the documents that were changed.

    Attributes:
        split: the tokens. Each piece of a document that was split is a row, as is each option of a question.
        num_documents: number of rows of the table that have tokens.
        num_cut: number of these rows that were cut.
        num_split: number of these rows that were split.
        num_dropped: number of rows without a token to predict.
    """

    split: TokenSplit
    num_documents: int
    num_cut: int
    num_split: int
    num_dropped: int


def tokenise(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task_index: Mapping[str, int],
    max_tokens: int = 256,
    long_documents: str = "cut",
    chat_template: str | None = None,
) -> Tokenised:
    """Tokenise a table from ``read_table``, with ``task`` and the columns of the content.

    Args:
        dataset: one document a row.
        tokenizer: any tokenizer with a bos or an eos token.
        task_index: index of each task, by name.
        max_tokens: longest document in tokens, with start and end.
        long_documents: ``cut`` or ``split``, see `encoder`.
        chat_template: a Jinja template for chats; default: the tokenizer's own.

    Returns:
        The split, and the numbers of documents that were cut, split, and dropped because they have no token to predict.

    Raises:
        InputError: the tokenizer has neither bos nor eos, ``max_tokens`` is below 2, or a chat cannot be read.
    """
    check_max_tokens(max_tokens)
    encode = encoder(tokenizer, max_tokens, long_documents=long_documents, chat_template=chat_template)
    content = content_columns(dataset.column_names)
    masked, questions = content != ["text"], "options" in content
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "task": datasets.Value("string"),
            "characters": datasets.Value("int64"),
            "cut": datasets.Value("bool"),
            "row": datasets.Value("int64"),
            **({"observed": datasets.List(datasets.Value("bool"))} if masked else {}),
            **({"correct": datasets.Value("bool")} if questions else {}),
        }
    )
    # The default fingerprint of datasets would hash the tokenizer, whose state changes with every call.
    fingerprint = _fingerprint(dataset, tokenizer, [max_tokens, long_documents], chat_template)
    with _without_progress_bars():
        encoded = dataset.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=features,
            new_fingerprint=fingerprint,
            cache_file_name=_cache_file(fingerprint),
        )
    pad = pad_token_id(tokenizer)
    if not len(encoded):  # the result of map has no columns if it has no rows
        empty = TokenSplit.from_documents([], task=[], num_tasks=len(task_index), pad_token_id=pad)
        return Tokenised(empty, num_documents=0, num_cut=0, num_split=0, num_dropped=len(dataset))
    columns = encoded.with_format("arrow")[:]
    documents = columns.column("input_ids").combine_chunks()
    row = _tensor(columns.column("row"))
    rows_of = row.unique(return_counts=True)[1]
    split = TokenSplit(
        _tensor(documents.flatten()),
        _tensor(documents.value_lengths()),
        task=torch.tensor([task_index[name] for name in columns.column("task").to_pylist()], dtype=torch.int64),
        characters=_tensor(columns.column("characters")),
        num_tasks=len(task_index),
        pad_token_id=pad,
        observed=_tensor(columns.column("observed").combine_chunks().flatten()) if masked else None,
        document_index=row if len(rows_of) < len(row) else None,
        correct=_tensor(columns.column("correct")) if questions else None,
    )
    return Tokenised(
        split,
        num_documents=len(rows_of),
        num_cut=sum(columns.column("cut").to_pylist()),
        num_split=0 if questions else int((rows_of > 1).sum()),
        num_dropped=len(dataset) - len(rows_of),
    )


def check_max_tokens(max_tokens: int) -> None:
    """Raise ``InputError`` if ``max_tokens`` is below 2, the least for a start and one predicted token."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens!r}; give a whole number of 2 or more (a start and one predicted token)")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token of a batch: the tokenizer's, or 0 if it has none."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _fingerprint(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, options: list[Any], chat_template: str | None
) -> str:
    """A hash of everything that the tokens depend on: documents, tasks, the tokenizer's rules and the options."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {
            key: value for key, value in rules.items() if key not in ("truncation", "padding")
        }  # they hold the options of the last call
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    content = content_columns(dataset.column_names)
    template = None
    if "messages" in content:
        template = [*ChatTemplate(tokenizer, chat_template).sources(), tokenizer.special_tokens_map]
    parts = [_CACHE_VERSION, *options, content, template, tokenizer.bos_token_id, tokenizer.eos_token_id, rules]
    digest = hashlib.sha256(json.dumps(parts, default=str).encode())
    for column in ("task", *content):
        for cell in dataset[column][:]:
            digest.update(f"{len(cell)} {cell}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def cache_folder() -> Path | None:
    """The folder for tokens, in the cache of ``datasets``; None if it cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "bora_pyro"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return None
    return folder


def _cache_file(fingerprint: str) -> str | None:
    """The file of cached tokens; None if caching is off or not possible."""
    folder = cache_folder() if datasets.is_caching_enabled() else None
    return None if folder is None else str(folder / f"{fingerprint}.arrow")


def _tensor(column: Any) -> torch.Tensor:
    # copy, because Arrow's memory is read-only, and torch warns about tensors on read-only memory
    return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False) if hasattr(column, "type") else column))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
