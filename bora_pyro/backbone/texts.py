"""Tokenise a list of texts in memory, for a base model.

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
from bora_pyro.errors import InputError, check_at_least, shown


def token_split(
    backbone: Backbone, texts: Sequence[str], *, task: Sequence[int], num_tasks: int, max_tokens: int | None = None
) -> TokenSplit:
    """A split with one document for each text, in order.

    Args:
        backbone: the base; its tokenizer tokenises the texts.
        texts: the texts; the list may be empty.
        task: task index of each text.
        num_tasks: number of tasks.
        max_tokens: longest document in tokens; longer texts are cut. The default, and the largest possible value, is the base's
            context.

    Raises:
        InputError: an entry is not a text, has no token, has half a surrogate pair or has a token that the base cannot read; the
            base has no tokenizer; or ``max_tokens`` is below 2.
    """
    tokenizer, texts = tokenizer_of(backbone), list(texts)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(f"text {number} of {len(texts)} is {shown(text)}; give texts")
        check_unicode(text, f"text {number} ({shown(text)})")
    encode = encoder(tokenizer, longest_read(backbone, max_tokens))
    # tokenizers do not accept an empty list
    columns = encode({"text": texts, "task": [""] * len(texts)}) if texts else {"input_ids": [], "characters": []}
    if len(columns["input_ids"]) < len(texts):
        raise InputError(f"{len(texts)} texts given, of which {len(columns['input_ids'])} have a token; leave empty texts out")
    split = TokenSplit.from_documents(
        columns["input_ids"],
        task=task,
        characters=columns["characters"],
        num_tasks=num_tasks,
        pad_token_id=pad_token_id(tokenizer),
    )
    check_token_ids(backbone, split)
    return split


def check_token_ids(backbone: Backbone, *splits: TokenSplit) -> None:
    """Check that the base can read every token of some splits, and the token that pads their batches.

    A tokenizer may have more tokens than the base's embedding has rows, for example if only the tokenizer got new tokens.
    Documents without these tokens can be read.

    Args:
        backbone: the base.
        splits: the tokens of its tokenizer, or ids from elsewhere.

    Raises:
        InputError: an id is as large as the number of rows, or larger.
    """
    rows = backbone.num_token_ids
    if backbone.largest_token_id is not None and backbone.largest_token_id < rows:
        return
    for split in splits:
        found = max(int(split.tokens.max()), split.pad_token_id) if len(split) else 0
        if found >= rows:
            raise InputError(
                f"the documents have the token id {found}{_token(backbone, found)}, and the base reads ids from 0 to {rows - 1}; "
                "give the tokenizer of this base, or add rows for the new tokens (resize_token_embeddings) and save the base anew"
            )


def _token(backbone: Backbone, token_id: int) -> str:
    return "" if backbone.tokenizer is None else f" ({shown(backbone.tokenizer.convert_ids_to_tokens(token_id))})"


def longest_read(backbone: Backbone, max_tokens: int | None = None) -> int:
    """The longest document in tokens: the smaller of ``max_tokens`` and the base's context.

    Raises:
        InputError: ``max_tokens`` is below 2. The first token is never predicted, so a document needs two.
    """
    if max_tokens is not None:
        check_at_least("max_tokens", max_tokens, 2)
    return min(max_tokens or 10**9, backbone.context or 10**9)


def tokenizer_of(backbone: Backbone, to: str = "read texts with") -> PreTrainedTokenizerBase:
    """The tokenizer of a base.

    Args:
        backbone: the base.
        to: what the tokenizer is needed for, in the error.

    Raises:
        InputError: the base has no tokenizer.
    """
    if backbone.tokenizer is None:
        raise InputError(f"the base has no tokenizer to {to}; give Backbone one")
    return backbone.tokenizer
