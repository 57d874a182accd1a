"""Load the tokenizer of a base model without its weights.

>>> tokenizer, context = load_tokenizer("builtin:nano")
>>> len(tokenizer), context
(4096, 256)
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.configuration import context_of
from bora_pyro.backbone.source import open_base


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Load a tokenizer as :meth:`~bora_pyro.Backbone.from_pretrained` does.

    Args:
        name: an embedded base such as ``builtin:nano``, a folder, a GGUF file or a hub id.
        trust_remote_code: run the code that the model's repository contains.

    Returns:
        The tokenizer, and the longest document that the model can read, in tokens; None if its configuration sets no limit.

    Raises:
        InputError: there is no such base, or it is an adapter, or it needs code of its own and ``trust_remote_code`` is False.
    """
    with open_base(name, trust_remote_code=trust_remote_code) as base:
        return base.tokenizer(), context_of(base.config())
