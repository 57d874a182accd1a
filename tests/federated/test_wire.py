"""Letters as bytes: what comes back is what was sent, and what is no letter is refused by its sender's name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save

from bora_pyro.federated.agreement import difference
from bora_pyro.federated.message import Expected, RefusedMessage
from bora_pyro.federated.wire import LARGEST_HEADER, Letter, decode, encode, most_bytes


def with_header(header, content=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + content


def test_a_letter_comes_back_bit_for_bit():
    shared = torch.randn(2, 3)
    tensors = {
        "theta": shared,
        "view": shared.T,  # shares its memory, and is not contiguous
        "validation": torch.tensor([-1e-300, 7.0], dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("inf")]),  # refused later, by name
    }
    about = {"best": 3, "name": "Børge B.", "nested": {"list": [1, 2.5, None, float("inf")]}}
    found = decode(encode(Letter("train", 4, tensors, about)), most=10_000, sender="ada")
    assert (found.kind, found.number, dict(found.about)) == ("train", 4, about)
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name].nan_to_num(), value.nan_to_num())


GOOD = encode(Letter("train", 1, {"x": torch.ones(3)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        GOOD[:-1],
        GOOD + b"0",
        pickle.dumps({"kind": "train"}),
        (2**62).to_bytes(8, "little") + b"{}",
        with_header(b"[" * 5000),
        with_header({}),
        with_header({"__metadata__": {"letter": "{"}}),
        with_header({"__metadata__": {"letter": json.dumps({"kind": "train", "number": "1", "about": {}})}}),
        with_header({"__metadata__": {"letter": json.dumps({"kind": "train", "number": True, "about": {}})}}),
        with_header({"__metadata__": {"letter": json.dumps({"kind": "train", "number": 1, "about": []})}}),
        with_header({"__metadata__": {"letter": '{"kind": "a", "kind": "b", "number": 1, "about": {}}'}}),
        save({"x": torch.ones(3)}),
        GOOD.replace(b'"F32"', b'"F64"'),
    ],
)
def test_what_is_no_letter_is_refused(data):
    with pytest.raises(RefusedMessage, match=r"^'bob' sent bytes that are no letter: "):
        decode(data, most=10_000, sender="bob")


def test_too_many_bytes_are_refused_before_they_are_read():
    expected = {"x": Expected((3,), torch.float32)}
    assert len(GOOD) <= most_bytes(expected) == 3 * 4 + LARGEST_HEADER + 8
    with pytest.raises(RefusedMessage, match=f"'bob' sent {len(GOOD)} bytes, expected at most {len(GOOD) - 1}"):
        decode(GOOD, most=len(GOOD) - 1, sender="bob")


OPTIONS = "{'rounds': 20, 'tau': 100.0}"


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ({"base": "aa", "options": {"rounds": 20, "tau": 100.0}}, None),
        ({"base": "aa", "options": {"rounds": 20, "tau": 100.000001}}, None),
        ({"base": "ab", "options": {"rounds": 20, "tau": 100.0}}, "base is 'ab' at the client and 'aa' at the server"),
        ({"base": "aa", "options": {"rounds": 21, "tau": 100.0}}, "options.rounds is 21 at the client and 20 at the server"),
        ({"base": "aa", "options": {"rounds": 20}}, "options.tau is missing at the client"),
        ({"base": "aa", "options": {"rounds": 20, "tau": 100.0, "x": 1}}, "options.x is missing at the server"),
        (
            {"base": "aa", "options": [20, 100.0]},
            f"options is [20, 100.0] at the client and {OPTIONS} at the server",
        ),
        ({"base": "aa", "options": {"rounds": True, "tau": 100.0}}, "options.rounds is True at the client and 20 at the server"),
        (None, " is None at the client and {'base': 'aa', 'options': {'rounds': 20, 'tau': 100.0}} at the server"),
    ],
)
def test_the_first_difference_is_named(client, expected):
    assert difference({"base": "aa", "options": {"rounds": 20, "tau": 100.0}}, client) == expected
