"""Letters between a server and its clients as bytes: safetensors, and a few plain values in its header. Nothing is pickled.

>>> import torch
>>> data = encode(Letter("train", 3, {"q_proj.lora_B": torch.ones(2)}, {"best": 2}))
>>> letter = decode(data, most=1000, sender="server")
>>> letter.kind, letter.number, letter.tensors, letter.about
('train', 3, {'q_proj.lora_B': tensor([1., 1.])}, {'best': 2})
>>> decode(b"garbage", most=1000, sender="ada")
Traceback (most recent call last):
bora_pyro.federated.message.RefusedMessage: 'ada' sent bytes that are no letter: they have 7 bytes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from bora_pyro.errors import shown
from bora_pyro.federated.message import Expected, RefusedMessage, bytes_of
from bora_pyro.files.json_keys import RepeatedKeyError, without_repeats
from bora_pyro.files.tensors import DAMAGE

#: The largest number of bytes of a header, and of a letter without tensors.
LARGEST_HEADER = 2**20
_KEY = "letter"
# The bytes of a safetensors file that say how long its header is.
_LENGTH = 8


@dataclass(frozen=True)
class Letter:
    """What a request or its answer consists of.

    Attributes:
        kind: what is asked, or how it is answered.
        number: the round; 0: before the first one.
        tensors: the tensors by name.
        about: other values, in a form that JSON can hold.
    """

    kind: str
    number: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def encode(letter: Letter) -> bytes:
    """The bytes of a letter."""
    text = json.dumps({"kind": letter.kind, "number": letter.number, "about": dict(letter.about)})
    # safetensors refuses tensors that share memory
    return save({name: value.detach().cpu().clone().contiguous() for name, value in letter.tensors.items()}, {_KEY: text})


def decode(data: bytes, *, most: int, sender: str) -> Letter:
    """Read a letter. Its size is checked before anything in it is read.

    Args:
        data: the bytes, from anybody.
        most: the largest number of bytes.
        sender: who has sent them, for the error.

    Raises:
        RefusedMessage: they are too many, or no letter. The text names the sender.
    """
    if len(data) > most:
        raise RefusedMessage(f"{shown(sender)} sent {len(data)} bytes, expected at most {most}")
    what = f"{shown(sender)} sent bytes that are no letter"
    header = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or header > min(LARGEST_HEADER, len(data) - _LENGTH):
        raise RefusedMessage(f"{what}: they have {len(data)} bytes" + f" and a header of {header}" * (len(data) >= _LENGTH))
    try:
        # safetensors would take the last of two equal keys
        own = json.loads(data[_LENGTH : _LENGTH + header], object_pairs_hook=without_repeats)["__metadata__"][_KEY]
        found = json.loads(own, object_pairs_hook=without_repeats)
        kind, number, about = found["kind"], found["number"], found["about"]
        if type(kind) is not str or type(number) is not int or type(about) is not dict:
            raise ValueError("kind, number or about has another type")
        tensors = load(data)
    except (*DAMAGE, KeyError, RecursionError, RepeatedKeyError) as error:
        raise RefusedMessage(f"{what}: {' '.join(str(error).split())[:200]}") from None
    return Letter(kind, number, tensors, about)


def most_bytes(expected: Mapping[str, Expected]) -> int:
    """The largest number of bytes of a letter with such tensors.

    >>> import torch
    >>> most_bytes({"x": Expected((2, 3), torch.float32)}) - LARGEST_HEADER
    32
    """
    return bytes_of(expected) + LARGEST_HEADER + _LENGTH
