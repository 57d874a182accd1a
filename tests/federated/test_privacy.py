"""Federated fits with private steps: what they report, and what of the documents they do not depend on."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

from bora_pyro import FrozenALoRA, HierarchicalNormal, InputError, LearnedPrecision, Pooled
from bora_pyro.federated.accountant import epsilon_of
from bora_pyro.federated.loop import Federation, federate
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.privacy import privacy_record
from bora_pyro.federated.strategies import FFA, FederatedBoRA
from tests.tiny import tiny_bora, tiny_data, tiny_split

QUICK = {"rounds": 3, "local_steps": 2, "noise_multiplier": 1.0, "document_clip": 0.5, "sample_rate": 0.5, "delta": 0.01}
STRATEGIES = {"ffa": FFA, "bora": FederatedBoRA}


def model_of(strategy):
    adapter = FrozenALoRA(rank=2) if strategy == "ffa" else None
    prior = HierarchicalNormal(50.0) if strategy == "bora" else Pooled()
    return tiny_bora(targets=["q_proj"], adapter=adapter, prior=prior)


def private(strategy, data=None, **changes):
    return federate(model_of(strategy), data or tiny_data(), STRATEGIES[strategy](), **QUICK | changes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_round_costs_more_and_the_last_one_is_kept(strategy):
    fitted = private(strategy)
    rounds = [entry["privacy"] for entry in fitted.history]
    for number, spent in enumerate(rounds, 1):
        expected = epsilon_of(1.0, sample_rate=0.5, steps=2 * number, delta=0.01)
        assert spent["epsilon"] == expected
        assert spent["delta"] == 0.01
        assert {name: (own["steps"], own["epsilon"]) for name, own in spent["clients"].items()} == {
            f"task {d}": (2 * number, expected) for d in range(3)
        }
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"] < rounds[2]["epsilon"]
    assert fitted.best_epoch == 3
    assert fitted.validation_score is None
    assert all(entry["loss"] is None and entry["moved"] for entry in fitted.history)


def test_a_client_that_was_absent_has_spent_less():
    federation = Federation(model_of("ffa"), tiny_data(), FFA(), **QUICK)
    federation.server.draw = lambda number: ["task 0", "task 2"] if number == 2 else ["task 0"]
    last = federation.run().history[-1]["privacy"]
    assert [own["steps"] for own in last["clients"].values()] == [6, 0, 2]
    found = [own["epsilon"] for own in last["clients"].values()]
    assert found[1] == 0 < found[2] < found[0] == last["epsilon"]


def test_a_target_decides_the_noise_of_each_client():
    history = private("ffa", noise_multiplier=None, epsilon=2.0, delta=None, data=tiny_data((3, 2, 4))).history
    clients = history[-1]["privacy"]["clients"]
    assert [own["delta"] for own in clients.values()] == [1 / 3, 1 / 2, 1 / 4]
    assert all(1.9 < own["epsilon"] <= 2.0 for own in clients.values())
    sigma = [own["noise_multiplier"] for own in clients.values()]
    assert sigma[1] < sigma[0] < sigma[2]  # a smaller delta needs more noise


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_is_new_in_each_fit_unless_it_has_a_seed(strategy):
    def values(**changes):
        return torch.cat([value.flatten() for value in private(strategy, **changes).weights()[1].values()])

    assert not torch.equal(values(), values())
    seeded = values(noise_seed=1)
    torch.testing.assert_close(seeded, values(noise_seed=1), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(seeded, values(noise_seed=2), atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_documents_and_lengths_do_not_leave_the_client(strategy):
    data, messages = tiny_data(), []

    def keep(message):
        messages.append(message)
        return message

    other = replace(data, validation=tiny_split((2, 5, 1), seed=9))
    one, same = (
        federate(model_of(strategy), of, STRATEGIES[strategy](), on_upload=keep, **QUICK, noise_seed=1) for of in (data, other)
    )
    for ours, theirs in zip(one.weights(), same.weights(), strict=True):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)
    sums = [message.tensors["validation"] for message in messages if "validation" in message.tensors]
    assert sums
    assert not torch.stack(sums).any()
    enrolled = Federation(model_of(strategy), data, STRATEGIES[strategy](), **QUICK).server.clients.values()
    assert [client.observations for client in enrolled] == [client.documents for client in enrolled] == [3.0, 1.0, 4.0]


def test_a_learned_tau_is_refused():
    model = tiny_bora(targets=["q_proj"], prior=LearnedPrecision())
    with pytest.raises(InputError, match="tau is learned from sums of single documents, which get no noise"):
        federate(model, tiny_data(), **QUICK)


def record_of(**changes):
    options = FederatedOptions(**QUICK | changes)
    return privacy_record(options, federate(model_of("ffa"), tiny_data(), FFA(), options).history[-1]["privacy"])


def test_what_is_guaranteed():
    found = record_of()
    assert found["guaranteed"]
    assert "why_not" not in found
    shown = float(re.search(r"ε = ([\d.]+),", found["statement"])[1])
    assert found["epsilon"] <= shown < found["epsilon"] + 0.01
    assert f"δ = {found['delta']:.3g}) differential privacy against all who see what its client has sent" in found["statement"]
    assert "the names and the number of the tasks" in found["statement"]
    assert found["accountant"] == "rdp"
    assert found["noise_seed"] is None
    assert "weak" not in found["statement"]
    assert "a δ of 1 / N or more of N documents is weak" in record_of(delta=0.5)["statement"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"noise_multiplier": 0.0}, "no noise was added (noise_multiplier 0)"),
        ({"noise_seed": 3}, "the seed of the noise is known (noise_seed), and with it the noise can be taken away"),
    ],
)
def test_what_is_not_guaranteed(changes, why):
    found = record_of(**changes)
    assert not found["guaranteed"]
    assert found["why_not"] == why
    assert found["statement"] == f"no privacy is claimed: {why}"
    assert (found["epsilon"] is None) == (changes.get("noise_multiplier") == 0.0)


def test_without_an_accountant_noise_is_only_noise(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    found = record_of()
    assert found["epsilon"] is None
    assert found["accountant"] is None
    assert (
        found["statement"] == "no privacy is claimed: the noise is only noise, because the accountant, opacus, is not installed"
    )
    with pytest.raises(InputError, match=r"pip install 'bora_pyro\[privacy\]', or give noise_multiplier"):
        record_of(noise_multiplier=None, epsilon=1.0)
