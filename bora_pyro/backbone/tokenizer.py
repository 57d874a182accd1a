"""Load the tokenizer of a base model without its weights.

>>> tokenizer, context = load_tokenizer("builtin:nano")
>>> len(tokenizer), context
(4096, 256)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from bora_pyro.backbone.configuration import context_of
from bora_pyro.backbone.loading import check_no_adapter
from bora_pyro.errors import InputError, nearest

BUILTIN_BASES = {"builtin:nano": Path(__file__).parents[1] / "assets" / "nano"}


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Load a tokenizer as :meth:`~bora_pyro.Backbone.from_pretrained` does.

    Args:
        name: ``builtin:nano``, a folder or a hub id.
        trust_remote_code: run the code that the model's repository contains.

    Returns:
        The tokenizer, and the longest document that the model can read, in tokens; None if its configuration sets no limit.

    Raises:
        InputError: there is no such base, or it is an adapter, or it needs code of its own and ``trust_remote_code`` is False.
    """
    source = base_source(name)
    with base_errors(name):
        check_no_adapter(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer, context_of(config)


def base_source(name: str | Path) -> str | Path:
    """The folder of an embedded base; any other name stays as it is.

    Raises:
        InputError: there is no such embedded base.
    """
    if str(name).startswith("builtin:") and str(name) not in BUILTIN_BASES:
        raise InputError(f"no embedded base {name!r}; there is {', '.join(BUILTIN_BASES)}{nearest(str(name), BUILTIN_BASES)}")
    return BUILTIN_BASES.get(str(name), name)


@contextmanager
def base_errors(name: str | Path) -> Iterator[None]:
    """Make one ``InputError`` of whatever the loading of a base raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise any type of error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"base model {str(name)!r} brings code of its own, which is not run: read it, and if you trust it give "
                "--trust_remote_code true; or use another base"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"base model {str(name)!r} cannot be loaded: give builtin:nano, a folder saved with save_pretrained, "
            f"or the hub id of a causal language model ({reason})"
        ) from error
