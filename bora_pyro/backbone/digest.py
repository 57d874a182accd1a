"""A digest of a base model's weights, by which a run knows its base again.

>>> from torch import nn
>>> one, other = nn.Linear(3, 2), nn.Linear(3, 2)
>>> weights_digest(one) == weights_digest(one.bfloat16()), weights_digest(one) == weights_digest(other)
(True, False)
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

# Numbers of each weight that are looked at, about so many.
_SAMPLE = 4096


def weights_digest(model: nn.Module) -> str | None:
    """The SHA-256 of each weight's shape and some of its numbers, rounded to bfloat16, as 64 hexadecimal digits.

    So it is that of the base's file, whatever the precision and the device, and whatever a version of transformers calls the
    weights.

    Returns:
        None where weights have no such numbers: those that wait on a disk, and those of quantised layers, which depend on the
        device that has quantised them, as does how the biases beside them are rounded once they are used.
    """
    weights = [parameter.detach() for parameter in model.parameters()]
    if getattr(model, "is_quantized", False) or any(weight.is_meta for weight in weights):
        return None
    return hashlib.sha256(b"".join(sorted(map(_of_weight, weights)))).hexdigest()


def _of_weight(weight: Tensor) -> bytes:
    flat = weight.reshape(-1)
    # an odd stride, so that it does not stay in one column of a matrix
    sample = flat[:: flat.numel() // _SAMPLE | 1].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(f"{[*weight.shape]}".encode() + sample.view(torch.uint8).numpy().tobytes()).digest()
