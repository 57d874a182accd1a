"""Writing safetensors files of tensors that need not fit into memory together.

>>> import tempfile
>>> from safetensors.torch import load_file
>>> with tempfile.TemporaryDirectory() as folder:
...     write_safetensors(Path(folder) / "x.safetensors", {"x": torch.arange(3.0)}, {"made": "here"})
...     load_file(f"{folder}/x.safetensors")
{'x': tensor([0., 1., 2.])}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bora_pyro.row_tensor import RowTensor

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | RowTensor], metadata: Mapping[str, str]) -> None:
    """Write tensor by tensor, and rows that lie in a file a few at a time.

    The format (huggingface/safetensors, README): the header's length as 8 bytes, the header as JSON, and the tensors' bytes.
    Tensors that share memory are written each for itself.

    Args:
        path: the file, which is replaced where it stands already.
        tensors: by name.
        metadata: texts by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for value in tensors.values():
            for part in value.chunks() if isinstance(value, RowTensor) else [value.detach()]:
                file.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
