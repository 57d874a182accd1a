"""Write safetensors files tensor by tensor, so that not all tensors need to fit into memory, and verify their digests.

>>> import tempfile
>>> from safetensors.torch import load_file
>>> with tempfile.TemporaryDirectory() as folder:
...     write_safetensors(Path(folder) / "x.safetensors", {"x": torch.arange(3.0)}, {"made": "here"})
...     load_file(f"{folder}/x.safetensors")
{'x': tensor([0., 1., 2.])}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bora_pyro.files.regular import open_regular
from bora_pyro.files.row_file import RowTensor

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

#: The errors that reading a damaged or hostile safetensors file can raise: those of safetensors, and of torch for a false header.
DAMAGE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError, OverflowError)


def not_a_number(value: Tensor) -> str | None:
    """Why a stored tensor cannot come from a fit (NaN, infinity, or a type that no fit writes), or None if it can.

    >>> not_a_number(torch.tensor([1.0, float("nan")])), not_a_number(torch.zeros(2))
    ('values that are not finite', None)
    """
    if value.dtype not in _DTYPES:
        return f"the type {str(value.dtype).removeprefix('torch.')}"
    return None if not value.is_floating_point() or bool(value.isfinite().all()) else "values that are not finite"


#: The metadata key of the digest.
DIGEST = "sha256"
_UNKNOWN = "0" * 64


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | RowTensor], metadata: Mapping[str, str], *, digest: bool = False
) -> None:
    """Write a safetensors file tensor by tensor, and a ``RowTensor`` a few rows at a time.

    The format (huggingface/safetensors, README) is the length of the header in 8 bytes, the header as JSON, and the bytes of the
    tensors. Tensors that share memory are written separately.

    Args:
        path: the file to write; an existing file is replaced.
        tensors: the tensors by name.
        metadata: texts by name.
        digest: store the SHA-256 of the whole file in its metadata, for ``is_intact``. It is computed with zeros in place of
            the digest itself.
    """
    texts = ({DIGEST: _UNKNOWN} if digest else {}) | dict(metadata)
    header: dict[str, Any] = {"__metadata__": texts} if texts else {}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    sum_so_far = hashlib.sha256()

    with path.open("wb") as file:

        def write(part: Any) -> None:
            file.write(part)
            if digest:
                sum_so_far.update(part)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for value in tensors.values():
            for part in value.chunks() if isinstance(value, RowTensor) else [value.detach()]:
                write(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if digest:
            file.seek(8 + encoded.index(_UNKNOWN.encode()))
            file.write(sum_so_far.hexdigest().encode())


def is_intact(path: Path) -> bool:
    """Whether a file that was written with a digest is unchanged.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "x.safetensors"
        ...     write_safetensors(file, {"x": torch.arange(3.0)}, {}, digest=True)
        ...     before = is_intact(file)
        ...     _ = file.write_bytes(file.read_bytes()[:-1] + b"!")
        ...     before, is_intact(file)
        (True, False)

    Raises:
        OSError: the file cannot be read.
    """
    written, found, _ = read_digest(path)
    return written == found


def read_digest(path: Path) -> tuple[str, str, int]:
    """The digest that is stored in a file, the digest of its bytes, and the position of the stored one in bytes.

    If the file has no digest, the two digests differ.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    found = hashlib.sha256()
    with open_regular(path) as file:
        size = int.from_bytes(prefix := file.read(8), "little")
        if size > path.stat().st_size:
            return "", _UNKNOWN, 0
        header = file.read(size)
        place = header.find(mark := f'"{DIGEST}": "'.encode()) + len(mark)
        written = header[place : place + len(_UNKNOWN)]
        found.update(prefix + header[:place] + _UNKNOWN.encode() + header[place + len(_UNKNOWN) :])
        while part := file.read(2**20):
            found.update(part)
    return written.decode("latin-1"), found.hexdigest(), 8 + place
