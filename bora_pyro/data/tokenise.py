"""From texts to the tokens that a causal language model predicts.

Every document becomes ``start, text..., end``: the start (bos, or eos where the tokenizer has no bos) makes the first token of
the text a predicted one, the end (eos) makes the model say where a document stops. A document that is too long is cut and
has no end. The tokens are kept in the cache of ``datasets``, by the texts and the tokenizer that they come from.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.batches import TokenSplit
from bora_pyro.errors import InputError

# Changes with what `tokenise` makes of a text, so that no older cache is read.
_FORM = 1


class Tokenised(NamedTuple):
    """The tokens of one split, and what became of its documents."""

    split: TokenSplit
    num_cut: int
    num_dropped: int


def tokenise(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, task_index: Mapping[str, int], max_tokens: int = 256
) -> Tokenised:
    """Tokenise a table with columns ``task`` and ``text``.

    Args:
        dataset: one document a row.
        tokenizer: any tokenizer with a bos or an eos token.
        task_index: position of each task.
        max_tokens: longest document in tokens, with start and end; longer ones are cut.

    Returns:
        The split, the number of documents that were cut, and the number that were dropped because no token of their text is
        left. The characters of a document are those of its text up to its last token.

    Raises:
        InputError: the tokenizer has neither bos nor eos, or `max_tokens` is below 2.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens!r}; give a whole number of 2 or more (a start and one predicted token)")
    encode = encoder(tokenizer, max_tokens)
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "task": datasets.Value("string"),
            "characters": datasets.Value("int64"),
            "cut": datasets.Value("bool"),
        }
    )
    # A fingerprint of our own: datasets would hash the tokenizer, whose state changes with every call.
    fingerprint = _fingerprint(dataset, tokenizer, max_tokens)
    with _without_progress_bars():
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            new_fingerprint=fingerprint,
            cache_file_name=_cache_file(fingerprint),
        )
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not len(encoded):  # map gives an empty table no columns
        empty = TokenSplit.from_documents([], task=[], num_tasks=len(task_index), pad_token_id=pad)
        return Tokenised(empty, num_cut=0, num_dropped=len(dataset))
    columns = encoded.with_format("arrow")[:]
    documents = columns.column("input_ids").combine_chunks()
    split = TokenSplit(
        _tensor(documents.flatten()),
        _tensor(documents.value_lengths()),
        task=torch.tensor([task_index[name] for name in columns.column("task").to_pylist()], dtype=torch.int64),
        characters=_tensor(columns.column("characters")),
        num_tasks=len(task_index),
        pad_token_id=pad,
    )
    return Tokenised(split, num_cut=sum(columns.column("cut").to_pylist()), num_dropped=len(dataset) - len(encoded))


def _fingerprint(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """What the tokens depend on: the texts and their tasks, the tokenizer's rules, the longest document."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # of the last call
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps([_FORM, max_tokens, tokenizer.bos_token_id, tokenizer.eos_token_id, rules]).encode())
    for column in ("task", "text"):
        for cell in dataset[column][:]:
            digest.update(f"{len(cell)} {cell}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def _cache_file(fingerprint: str) -> str | None:
    """Where the tokens are kept for the next run, beside the other caches of ``datasets``; None where nothing can be kept."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "bora_pyro"
    if not datasets.is_caching_enabled():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return None
    return str(folder / f"{fingerprint}.arrow")


def encoder(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Callable[[dict[str, list[str]]], dict[str, list[Any]]]:
    """The function that makes ``input_ids`` and the other columns of rows of ``text`` and ``task``; empty texts are left out."""
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if start is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token, so the first token of a text cannot be "
            "predicted; set tokenizer.bos_token, or use the tokenizer of a causal language model"
        )

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        # verbose=False: lengths over the model's limit are cut below, there is nothing to warn of.
        encoding = tokenizer(
            rows["text"],
            add_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        columns: dict[str, list[Any]] = {"input_ids": [], "task": [], "characters": [], "cut": []}
        for row, text_ids in enumerate(encoding["input_ids"]):
            text_ids = list(text_ids)
            shift = 0 if text_ids[:1] == [start] else 1  # the start that is put in front has no offset
            ids = [start] * shift + text_ids
            if len(ids) - (len(ids) > 1 and ids[-1] == end) < 2:
                continue
            if end is not None and ids[-1] != end:
                ids.append(end)
            cut = len(ids) > max_tokens
            characters = len(rows["text"][row])
            if cut:
                ids = ids[:max_tokens]
                kept = max_tokens - shift
                if tokenizer.is_fast:
                    characters = max((stop for _, stop in encoding["offset_mapping"][row][:kept]), default=0)
                else:
                    characters = len(tokenizer.decode(text_ids[:kept], skip_special_tokens=True))
            columns["input_ids"].append(ids)
            columns["task"].append(rows["task"][row])
            columns["characters"].append(characters)
            columns["cut"].append(cut)
        return columns

    return encode


def _tensor(column: Any) -> torch.Tensor:
    # A copy: Arrow's memory is read-only, and torch warns of tensors on it.
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
