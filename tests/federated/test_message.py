"""A message is checked on arrival: each fault is refused in one line that names the sender."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.federated.message import Expected, Message, RefusedMessage, bytes_of, check_message

EXPECTED = {"q.lora_A": Expected((2, 3), torch.float32), "validation": Expected((2,), torch.float64)}


def tensors(**changes):
    return {"q.lora_A": torch.ones(2, 3), "validation": torch.ones(2, dtype=torch.float64)} | changes


def test_bytes_are_those_of_the_numbers():
    assert Message("ada", 1, tensors()).num_bytes == bytes_of(EXPECTED) == 2 * 3 * 4 + 2 * 8
    check_message(Message("ada", 1, tensors()), EXPECTED, number=1)


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({}, 2, "'ada', round 1: the message is of round 2"),
        ({"q.lora_A": torch.ones(3, 2)}, 1, r"'q.lora_A' has shape \(3, 2\), expected \(2, 3\)"),
        ({"q.lora_A": torch.ones(2, 3).double()}, 1, "'q.lora_A' is float64, expected float32"),
        ({"q.lora_A": torch.full((2, 3), torch.nan)}, 1, "'ada', round 1: 'q.lora_A' has a number that is not finite"),
        ({"validation": torch.tensor([1.0, torch.inf]).double()}, 1, "'validation' has a number that is not finite"),
        ({"q.lora_B": torch.ones(1)}, 1, "'q.lora_B' is not expected; did you mean 'q.lora_A'?"),
    ],
)
def test_a_wrong_message_is_refused(changes, number, message):
    with pytest.raises(RefusedMessage, match=message) as caught:
        check_message(Message("ada", number, tensors(**changes)), EXPECTED, number=1)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_refused():
    found = tensors()
    del found["validation"]
    with pytest.raises(RefusedMessage, match="'validation' is missing"):
        check_message(Message("ada", 1, found), EXPECTED, number=1)
