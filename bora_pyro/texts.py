"""Texts at hand, not of a table, as documents that the model reads.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> token_split(backbone, ["A tree.", "A node."], task=[0, 1], num_tasks=2)
TokenSplit(2 documents, 8 predicted tokens, 2 tasks)
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone import Backbone
from bora_pyro.data.encode import encoder
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import pad_token_id
from bora_pyro.errors import InputError


def token_split(
    backbone: Backbone, texts: Sequence[str], *, task: Sequence[int], num_tasks: int, max_tokens: int | None = None
) -> TokenSplit:
    """Every text a document, in order.

    Args:
        backbone: the base, whose tokenizer reads them.
        texts: the texts; there may be none.
        task: index of the task of each.
        num_tasks: number of tasks.
        max_tokens: longer texts are cut; default: what the base reads.

    Raises:
        InputError: a text without a token; a base without tokenizer.
    """
    tokenizer = tokenizer_of(backbone)
    encode = encoder(tokenizer, max_tokens or backbone.context or 10**9)
    columns = encode({"text": list(texts), "task": [""] * len(texts)})
    if len(columns["input_ids"]) < len(texts):
        raise InputError(f"{len(texts)} texts given, of which {len(columns['input_ids'])} have a token; leave empty texts out")
    return TokenSplit.from_documents(
        columns["input_ids"],
        task=task,
        characters=columns["characters"],
        num_tasks=num_tasks,
        pad_token_id=pad_token_id(tokenizer),
    )


def tokenizer_of(backbone: Backbone, to: str = "read texts with") -> PreTrainedTokenizerBase:
    """The tokenizer of a base, which may have been given none.

    Raises:
        InputError: it has none.
    """
    if backbone.tokenizer is None:
        raise InputError(f"the base has no tokenizer to {to}; give Backbone one")
    return backbone.tokenizer
