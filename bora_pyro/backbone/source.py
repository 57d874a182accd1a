"""Where the files of a base are: in an embedded base, a folder, a GGUF file or a hub repository; and how they are loaded.

>>> with open_base("builtin:nano") as base:
...     base.config().model_type, len(base.tokenizer())
('opt', 4096)
>>> base_source("builtin:nan")
Traceback (most recent call last):
bora_pyro.errors.InputError: no embedded base 'builtin:nan'; there is builtin:nano, builtin:smollm2; did you mean 'builtin:nano'?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bora_pyro.backbone.gguf import GgufFile, alone, cut_as_the_file_says, gguf_notes, gguf_path, read_gguf, unpacked
from bora_pyro.backbone.loading import check_causal, check_no_adapter, load_causal
from bora_pyro.backbone.smollm2 import SMOLLM2, smollm2_folder, smollm2_note
from bora_pyro.errors import InputError, nearest

#: The bases whose files come with this package.
BUILTIN_BASES = {"builtin:nano": Path(__file__).parents[1] / "assets" / "nano"}
#: The names of all embedded bases. The files of builtin:smollm2 come with a package of its own.
EMBEDDED = (*BUILTIN_BASES, SMOLLM2)


@dataclass
class BaseFiles:
    """The files of a base, from :func:`open_base`.

    Attributes:
        name: the name that the user gave.
        place: the folder or hub id that transformers reads them from.
        gguf: what the base's GGUF file says of itself; None for other bases.
        arguments: further arguments of every ``from_pretrained``.
        notes: what a user should know about what was loaded.
    """

    name: str | Path
    place: str | Path
    gguf: GgufFile | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def config(self) -> PreTrainedConfig:
        """The configuration of the model."""
        return AutoConfig.from_pretrained(self.place, **self.arguments)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(self.place, **self.arguments)
        if self.gguf is not None:
            self.notes.extend(cut_as_the_file_says(tokenizer, self.gguf))
            tokenizer.name_or_path = str(self.name)
        return tokenizer

    def model(self, precision: torch.dtype, **placement: Any) -> PreTrainedModel:
        """The model with all its weights.

        Raises:
            InputError: the base is no causal language model, or lacks weights.
        """
        check_causal(self.name, self.place, **self.arguments)
        if self.gguf is not None:
            placement |= unpacked()
        model = load_causal(self.name, self.place, dtype=precision, **self.arguments, **placement)
        if self.gguf is not None:
            self.notes.extend(gguf_notes(self.gguf, model))
        if self.gguf is not None or self.name == SMOLLM2:
            model.config.name_or_path = str(self.name)  # not that of a temporary folder or of a cache
        return model


@contextmanager
def open_base(name: str | Path, *, trust_remote_code: bool = False) -> Iterator[BaseFiles]:
    """The files of a base. Whatever goes wrong with them inside the ``with`` block becomes one ``InputError``.

    Args:
        name: an embedded base such as ``builtin:nano``, a folder, a GGUF file or a hub id.
        trust_remote_code: run the code that the model's repository contains.

    Raises:
        InputError: there is no such base, or it is an adapter, or it needs code of its own and ``trust_remote_code`` is False.
    """
    source = base_source(name)
    with base_errors(name):
        arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if (path := gguf_path(source)) is not None:
            file = read_gguf(path)
            with alone(file) as (folder, of_file):
                yield BaseFiles(name, folder, file, arguments | of_file)
            return
        check_no_adapter(source)
        yield BaseFiles(name, source, None, arguments, [smollm2_note(source)] if str(name) == SMOLLM2 else [])


def base_source(name: str | Path) -> str | Path:
    """The folder of an embedded base; any other name stays as it is.

    Raises:
        InputError: there is no such embedded base, or its package is not installed.
    """
    if str(name) == SMOLLM2:
        return smollm2_folder()
    if str(name).startswith("builtin:") and str(name) not in BUILTIN_BASES:
        raise InputError(f"no embedded base {name!r}; there is {', '.join(EMBEDDED)}{nearest(str(name), EMBEDDED)}")
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
            f"base model {str(name)!r} cannot be loaded: give {', '.join(EMBEDDED)}, a folder saved with save_pretrained, "
            f"a GGUF file, or the hub id of a causal language model ({reason})"
        ) from error
