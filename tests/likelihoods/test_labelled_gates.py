"""The objective of gates: its density is in tests/inference/test_route_fit.py; here its weights, tasks and options."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine

from bora_pyro import InputError
from bora_pyro.likelihoods import LabelledGates
from tests.tiny import tiny_batch


class Routed:
    """A model of uniform predictions and of gates that are given."""

    def __init__(self, gates):
        self.gates, self.router, self.backbone = gates, self, self

    def recorded_change(self, model, weights, gates):
        gates.update(self.gates)

    def lazy_logits(self, input_ids, change, *, layout=None):
        return torch.zeros(*input_ids.shape, 64)


def log_prob(likelihood, batch, gates):
    trace = poutine.trace(likelihood).get_trace(Routed(gates), None, batch)
    trace.compute_log_prob()
    return {name: float(trace.nodes[name]["log_prob_sum"]) for name in trace.observation_nodes}


def test_each_layer_is_a_site_and_padding_counts_nowhere():
    batch = tiny_batch()
    gates = {name: torch.zeros(*batch.input_ids.shape, 3) for name in ("q.0", "q.1")}
    found = log_prob(LabelledGates(gate_weight=6.0, token_weight=0.5), batch, gates)
    read, predicted = int(batch.attention_mask.sum()), int(batch.predicted.sum())
    assert read < batch.input_ids.numel()  # there is padding
    assert found.keys() == {"tokens", "gate.q.0", "gate.q.1"}
    assert found["tokens"] == pytest.approx(-0.5 * predicted * math.log(64), rel=1e-5)
    for name in ("gate.q.0", "gate.q.1"):
        assert found[name] == pytest.approx(-3.0 * read * math.log(3), rel=1e-5)
    assert log_prob(LabelledGates(token_weight=0.0), batch, gates).keys() == {"gate.q.0", "gate.q.1"}


def test_task_weights_are_factors():
    batch, weights = tiny_batch(), torch.tensor([1.0, 2.0, 5.0])
    gates = {"q.0": torch.zeros(*batch.input_ids.shape, 3)}
    found = log_prob(LabelledGates(gate_weight=1.0).with_task_weights(weights), batch, gates)
    read = (batch.attention_mask.sum(1) * weights[batch.task]).sum()
    assert found["gate.q.0"] == pytest.approx(-float(read) * math.log(3), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_weight": 0.0}, "gate_weight is 0.0; give a finite number above 0"),
        ({"gate_weight": math.nan}, "gate_weight is nan"),
        ({"token_weight": -1.0}, "token_weight is -1.0; give a finite number from 0 up"),
        ({"token_weight": math.inf}, "token_weight is inf"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InputError, match=words):
        LabelledGates(**options)
