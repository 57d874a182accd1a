"""What travels between a client and the server: named tensors, which are checked when they arrive.

>>> expected = {"q_proj.lora_B": Expected((2, 3), torch.float32)}
>>> good = Message("ada", 1, {"q_proj.lora_B": torch.zeros(2, 3)})
>>> check_message(good, expected, number=1)
>>> good.num_bytes, bytes_of(expected)
(24, 24)
>>> check_message(Message("bob", 1, {"q_proj.lora_B": torch.full((2, 3), torch.nan)}), expected, number=1)
Traceback (most recent call last):
bora_pyro.federated.message.RefusedMessage: 'bob', round 1: 'q_proj.lora_B' has a number that is not finite
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.errors import InputError, nearest, shown

#: The name of the server as a sender.
SERVER = "server"
#: The sums of a client's validation documents, and its sums for a learned τ.
VALIDATION, TAU_SUMS = "validation", "tau_sums"


class RefusedMessage(InputError):
    """A message that is not what its receiver expects. The round goes on without it."""


@dataclass(frozen=True)
class Expected:
    """The form of one tensor of a message.

    Attributes:
        shape: its shape.
        dtype: its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: Tensor) -> Expected:
        """The form of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Message:
    """Named tensors from a client to the server, or from the server to a client.

    Attributes:
        sender: the name of the client, or ``SERVER``.
        number: the round that the message is of; rounds count from 1.
        tensors: the tensors by name.
    """

    sender: str
    number: int
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers of all tensors; the names, and what a transport adds, are not counted."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


def bytes_of(expected: Mapping[str, Expected]) -> int:
    """Bytes of a message of this form."""
    return sum(form.num_bytes for form in expected.values())


def check_message(message: Message, expected: Mapping[str, Expected], *, number: int) -> None:
    """Check a message on arrival.

    Args:
        message: the message.
        expected: the form of each of its tensors.
        number: the present round.

    Raises:
        RefusedMessage: the message is of another round, a tensor is missing or unknown, or has another shape or type, or a number
            in it is NaN or infinite. The text names the sender.
    """
    where = f"{shown(message.sender)}, round {number}"
    if message.number != number:
        raise RefusedMessage(f"{where}: the message is of round {message.number}")
    if missing := sorted(expected.keys() - message.tensors.keys()):
        raise RefusedMessage(f"{where}: {shown(missing[0])} is missing")
    if unknown := sorted(message.tensors.keys() - expected.keys()):
        raise RefusedMessage(f"{where}: {shown(unknown[0])} is not expected{nearest(unknown[0], expected)}")
    for name, form in expected.items():
        value = message.tensors[name]
        if tuple(value.shape) != form.shape:
            raise RefusedMessage(f"{where}: {name!r} has shape {tuple(value.shape)}, expected {form.shape}")
        if value.dtype != form.dtype:
            given, wanted = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, form.dtype))
            raise RefusedMessage(f"{where}: {name!r} is {given}, expected {wanted}")
        if not bool(value.isfinite().all()):
            raise RefusedMessage(f"{where}: {name!r} has a number that is not finite")
