"""A digest of a base model's weights. A run stores it to recognise its base later.

>>> from torch import nn
>>> one, other = nn.Linear(3, 2), nn.Linear(3, 2)
>>> weights_digest(one) == weights_digest(one.bfloat16()), weights_digest(one) == weights_digest(other)
(True, False)
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

# About how many numbers of each weight go into the digest.
_SAMPLE = 4096


def weights_digest(model: nn.Module) -> str | None:
    """The SHA-256 of the shape of each weight and of a sample of its numbers, rounded to bfloat16.

    The digest does not depend on the precision, on the device, or on the names that a version of transformers gives the weights.

    Returns:
        The digest as 64 hexadecimal digits. None if some weights are not loaded (they wait on a disk), or if the model is
        quantised: quantised weights depend on the device that quantised them, and so does the rounding of their biases.
    """
    weights = [parameter.detach() for parameter in model.parameters()]
    if getattr(model, "is_quantized", False) or any(weight.is_meta for weight in weights):
        return None
    return hashlib.sha256(b"".join(sorted(map(_weight_digest, weights)))).hexdigest()


def _weight_digest(weight: Tensor) -> bytes:
    flat = weight.reshape(-1)
    # The stride is odd. With an even one, all sampled numbers could come from one column of a matrix.
    sample = flat[:: flat.numel() // _SAMPLE | 1].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(f"{[*weight.shape]}".encode() + sample.view(torch.uint8).numpy().tobytes()).digest()
