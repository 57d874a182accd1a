"""Means of clients' values: weights, trimmed ends, and bounded updates, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.federated.aggregate import check_trim, clipped, trimmed_mean, weighted_mean


def values(*numbers):
    return [{"x": torch.tensor([number, -number])} for number in numbers]


def test_a_weighted_mean():
    assert weighted_mean(values(1.0, 2.0, 6.0), [1, 2, 1])["x"].tolist() == [2.75, -2.75]
    [alone] = values(0.1)
    assert torch.equal(weighted_mean([alone], [3.0])["x"], alone["x"])


def test_a_trimmed_mean_ignores_one_client_of_five_however_large():
    clean = trimmed_mean(values(1.0, 2.0, 3.0, 4.0, 5.0), 0.2)["x"]
    assert clean.tolist() == [3.0, -3.0]
    for garbage in (1e30, -1e30):
        found = trimmed_mean(values(garbage, 2.0, 3.0, 4.0, 5.0), 0.2)["x"]
        assert 2.0 <= float(found[0]) <= 5.0
        assert -5.0 <= float(found[1]) <= -2.0
    # a message is missing: one value is left out at each end all the same
    assert trimmed_mean(values(1e30, 2.0, 3.0, 4.0), 0.2)["x"].tolist() == [3.5, -3.5]


def test_the_norm_of_an_update_is_bounded_over_all_tensors():
    before = {"x": torch.ones(2), "y": torch.zeros(1)}
    value = {"x": torch.tensor([4.0, 1.0]), "y": torch.tensor([4.0])}
    near, norm = clipped(value, before, 2.5)
    assert norm == 5.0
    assert near["x"].tolist() == [2.5, 1.0]
    assert near["y"].tolist() == [2.0]
    same, _ = clipped(value, before, math.inf)
    assert all(torch.equal(same[name], value[name]) for name in value)
    far, _ = clipped({"x": torch.full((2,), 1e30), "y": torch.zeros(1)}, before, 1.0)
    torch.testing.assert_close((far["x"] - before["x"]).norm(), torch.tensor(1.0))


def test_a_trimmed_mean_that_trims_nothing_is_refused():
    check_trim(0.2, 5)
    with pytest.raises(InputError, match=r"trim is 0.2, which leaves no value of 4 clients out; give 0.25 or more"):
        check_trim(0.2, 4)
    with pytest.raises(InputError, match="needs three clients a round, and there are 2"):
        check_trim(0.4, 2)
