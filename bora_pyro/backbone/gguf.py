"""Read a base from a GGUF file, the format of llama.cpp. transformers unpacks its weights when it loads them.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp(), "model.gguf")
>>> _ = file.write_text("weights")
>>> gguf_path(file)
Traceback (most recent call last):
bora_pyro.errors.InputError: base model '...model.gguf' is no GGUF file: it does not begin with the letters GGUF; give ...

Three things go wrong unseen without this module. Other files in the folder of a GGUF file, such as a ``tokenizer.json``, would
replace what the file says. The rule by which the file's tokenizer cuts a text is only known to transformers for some models. And
tensors that transformers has no place for are left out.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.regular import open_regular

_MAGIC = b"GGUF"
#: What is installed to read a GGUF file.
INSTALL = "pip install 'bora_pyro[gguf]'"
#: Types of tensors that are numbers, not blocks of few bits.
_NUMBERS = ("F64", "F32", "F16", "BF16")
#: Rules of byte-level tokenizers that cut each digit off and then cut as GPT-2 does; transformers leaves the digits together.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
#: Rules of byte-level tokenizers that cut exactly as GPT-2 does, which is what transformers takes where it knows no other rule.
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        architecture: the name of its architecture in llama.cpp.
        types: the types of its tensors, the one with the most numbers first.
        numbers: how many numbers its tensors have together.
        tensors: the names of its tensors.
        pretokenizer: the kind of its tokenizer and the rule by which it cuts a text; the rule is empty if none is named.
    """

    path: Path
    architecture: str
    types: tuple[str, ...]
    numbers: int
    tensors: frozenset[str]
    pretokenizer: tuple[str, str]

    @property
    def packed(self) -> tuple[str, ...]:
        """The types that are blocks of few bits; empty if all tensors are plain numbers."""
        return tuple(name for name in self.types if name not in _NUMBERS)


def gguf_path(name: str | Path) -> Path | None:
    """The path of a base that is a GGUF file; None for folders and for names that are no file.

    Raises:
        InputError: the file does not exist, cannot be opened, or is another kind of file.
    """
    path = Path(name)
    try:
        named = path.suffix.lower() == ".gguf" and not path.is_dir()
        if not named and not path.is_file():
            return None
    except (OSError, ValueError):  # the name is too long for a path, or has a NUL byte
        return None
    try:
        with open_regular(path) as opened:
            begin = opened.read(len(_MAGIC))
    except OSError as error:
        raise InputError(
            f"base model {str(name)!r} cannot be opened ({error.strerror or error}); give the path of a file"
        ) from None
    if begin != _MAGIC:
        raise InputError(
            f"base model {str(name)!r} is no GGUF file: it does not begin with the letters GGUF; give a GGUF file, or the folder "
            "that save_pretrained wrote"
        )
    return path


def read_gguf(path: Path) -> GgufFile:
    """Read what a GGUF file says of itself, and check that all its tensors are there.

    Raises:
        InputError: a package is missing, or the file is damaged, cut off, or a part of a base that was split.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"base model {str(path)!r} is a GGUF file, which needs {package}, which is not installed; {INSTALL}")
    if not hasattr(transformers, "GgufConfig"):
        raise InputError(
            f"base model {str(path)!r} is a GGUF file, which needs transformers 5.23 or later, not {transformers.__version__}; "
            f"{INSTALL}"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        sizes = {tensor.name: (tensor.tensor_type.name, prod(map(int, tensor.shape))) for tensor in reader.tensors}
        fields = {name: _field(reader, name) for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")}
        parts = int(_field(reader, "split.count") or 1)
    except Exception as error:  # a damaged file can raise any type of error
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"base model {str(path)!r} cannot be read: the GGUF file is cut off or damaged ({reason}); get it again"
        ) from None
    if parts > 1:
        raise InputError(
            f"base model {str(path)!r} is one of {parts} parts; join them with llama-gguf-split --merge and give the whole file"
        )
    if not fields["general.architecture"] or not sizes:
        lacks = "tensors" if fields["general.architecture"] else "architecture"
        raise InputError(f"base model {str(path)!r} is a GGUF file without {lacks}; give one of a language model")
    counts: dict[str, int] = {}
    for kind, numbers in sizes.values():
        counts[kind] = counts.get(kind, 0) + numbers
    return GgufFile(
        path,
        str(fields["general.architecture"]),
        tuple(sorted(counts, key=lambda kind: -counts[kind])),
        sum(counts.values()),
        frozenset(sizes),
        (str(fields["tokenizer.ggml.model"] or ""), str(fields["tokenizer.ggml.pre"] or "")),
    )


@contextmanager
def alone(file: GgufFile) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A temporary folder with nothing but the file, and the arguments with which ``from_pretrained`` reads it from there.

    transformers reads other files in the folder of a GGUF file too: a ``tokenizer.json`` would replace the file's tokenizer.

    Raises:
        InputError: transformers does not read the architecture of the file. The message names those that it reads.
    """
    with tempfile.TemporaryDirectory(prefix="bora_pyro-gguf-") as folder:
        place = Path(folder, "model.gguf")
        try:
            place.symlink_to(file.path.resolve())
        except OSError:  # Windows lets not every user make links
            shutil.copyfile(file.path, place)
        try:
            yield Path(folder), {"gguf_file": place.name}
        except ValueError as error:
            raise _unknown(file) if "not supported yet" in str(error) else error from None


def unpacked() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give a model with plain weights, also where its blocks could be kept packed."""
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def cut_as_the_file_says(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> list[str]:
    """Let the tokenizer of a GGUF file cut a text by the rule that the file names.

    transformers knows the rules of llama 3, qwen 2 and some more. For others it cuts as GPT-2 does, so that for example
    SmolLM2 would read two spaces before a digit as two tokens, where it was trained with one.

    Returns:
        Notes: that the rule is not known.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, rule = file.pretokenizer
    if kind != "gpt2" or rule in GGUF_PRE_TOKENIZER_SPLITS or rule in _AS_GPT2:
        return []
    if rule in _SINGLE_DIGITS:
        backend: Any = tokenizer
        backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        return []
    named = f"the rule {shown(rule)}, which is not known here" if rule else "no rule"
    return [
        f"the GGUF file names {named} for cutting texts; they are cut as GPT-2 does, so some tokens may differ from its training"
    ]


def gguf_notes(file: GgufFile, model: PreTrainedModel) -> list[str]:
    """Notes for a user: from which types the weights were unpacked, and what of the file was not read."""
    notes = []
    if file.packed:
        precision = str(model.dtype).removeprefix("torch.")
        notes.append(f"the base is dequantised from {' and '.join(file.packed)} to {precision}")
    if "rope_freqs.weight" in file.tensors:
        notes.append(
            "transformers does not read the scaled rotary frequencies (rope_freqs.weight) of the GGUF file; long texts are "
            "predicted less well than by the original base"
        )
    read = sum(parameter.numel() for parameter in model.parameters())
    if (left := file.numbers - read) > 0:
        notes.append(
            f"{left:,} of the {file.numbers:,} numbers in the GGUF file have no place in transformers' {type(model).__name__} "
            "and are not read; compare the base's predictions with the original's"
        )
    return notes


def _unknown(file: GgufFile) -> InputError:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS})
    return InputError(
        f"base model {str(file.path)!r} is a GGUF file of architecture {shown(file.architecture)}, which transformers does not "
        f"read; it reads {', '.join(known)}{nearest(file.architecture, known)}"
    )


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
