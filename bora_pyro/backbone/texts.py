"""Texts at hand, not of a table, as documents that the model reads.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> token_split(backbone, ["A tree.", "A node."], task=[0, 1], num_tasks=2)
TokenSplit(2 documents, 8 predicted tokens, 2 tasks)
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.encode import encoder
from bora_pyro.data.files import check_unicode
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import pad_token_id
from bora_pyro.errors import InputError, shown


def token_split(
    backbone: Backbone, texts: Sequence[str], *, task: Sequence[int], num_tasks: int, max_tokens: int | None = None
) -> TokenSplit:
    """Every text a document, in order.

    Args:
        backbone: the base, whose tokenizer reads them.
        texts: the texts; there may be none.
        task: index of the task of each.
        num_tasks: number of tasks.
        max_tokens: longer texts are cut; default, and at most: what the base reads.

    Raises:
        InputError: what is no text, or one without a token or with half a character; a base without tokenizer; max_tokens
            below 2.
    """
    tokenizer, texts = tokenizer_of(backbone), list(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(f"text {number} of {len(texts)} is {shown(text)}; give texts")
        check_unicode(text, f"text {number} ({shown(text)})")
    encode = encoder(tokenizer, longest_read(backbone, max_tokens))
    # a tokenizer reads no empty list
    columns = encode({"text": texts, "task": [""] * len(texts)}) if texts else {"input_ids": [], "characters": []}
    if len(columns["input_ids"]) < len(texts):
        raise InputError(f"{len(texts)} texts given, of which {len(columns['input_ids'])} have a token; leave empty texts out")
    return TokenSplit.from_documents(
        columns["input_ids"],
        task=task,
        characters=columns["characters"],
        num_tasks=num_tasks,
        pad_token_id=pad_token_id(tokenizer),
    )


def longest_read(backbone: Backbone, max_tokens: int | None = None) -> int:
    """Tokens of a document that are read: ``max_tokens``, and no more than the base reads.

    Raises:
        InputError: fewer than 2, of which the first is never predicted.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens}; give a whole number from 2 up")
    return min(max_tokens or 10**9, backbone.context or 10**9)


def tokenizer_of(backbone: Backbone, to: str = "read texts with") -> PreTrainedTokenizerBase:
    """The tokenizer of a base, which may have been given none.

    Raises:
        InputError: it has none.
    """
    if backbone.tokenizer is None:
        raise InputError(f"the base has no tokenizer to {to}; give Backbone one")
    return backbone.tokenizer
