"""What a fit learned, and two of them compared bit by bit."""

from __future__ import annotations

import torch


def parameters(fitted):
    return {name: value.detach().clone() for name, value in fitted.guide.named_parameters()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
