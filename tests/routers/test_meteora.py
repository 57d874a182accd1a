"""MeteoRA's gates: the adapters that they choose, their weights, and that all ways to compute them agree."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError
from bora_pyro.inference.route_fit import gates_of, routed_model
from bora_pyro.priors import FrozenAdapters
from bora_pyro.routers import ByTask, MeteoRA
from bora_pyro.routers.meteora import DENSE, EXECUTIONS, GATHERED
from tests.tiny import TASKS, random_weights, tiny_adapter, tiny_batch, tiny_bora

ADAPTERS = ["lora", "lora_frozen_a", "lora_shared_plus_task", "mtlora", "sara"]


def of(router, *, adapter="lora", architecture="opt", seed=0):
    """A routed model with adapters far from any start, its adapters, and random gates."""
    plain = tiny_bora(architecture, adapter=tiny_adapter(adapter), prior=HierarchicalNormal(1.0))
    theta = random_weights(plain, seed=seed)
    shared = plain.adapter.shared
    theta = {n: v[:1].expand_as(v).clone() if n.rpartition(".")[-1] in shared else v for n, v in theta.items()}
    model = routed_model(plain, FrozenAdapters(theta, {name: value[0] for name, value in theta.items()}), router)
    return plain, model, theta, gates_of(random_weights(model, seed=seed + 1))


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_one_hot_gate_is_the_adapter_of_a_task(architecture, execution, monkeypatch):
    plain, model, theta, gates = of(MeteoRA(k=1, execution=execution), architecture=architecture)
    batch = tiny_batch()
    for d in range(TASKS):

        def one_hot(self, logits, d=d):
            return torch.ones_like(logits[..., :1]), torch.full_like(logits[..., :1], d).long()

        monkeypatch.setattr(MeteoRA, "choose", one_hot)
        row = torch.full_like(batch.task, d)
        expected = plain.backbone.logits(batch.input_ids, ByTask().route(plain, theta, row, row))
        torch.testing.assert_close(model.logits(batch, theta | gates), expected, rtol=1e-5, atol=1e-5)


def test_very_large_gates_choose_one_adapter_with_weight_1():
    weight, chosen = MeteoRA(k=2).choose(torch.tensor([[0.0, 1e4, -1e4]]))
    assert chosen[0, 0] == 1
    assert weight.tolist() == [[1.0, 0.0]]
    weight, chosen = MeteoRA(k=1).choose(torch.tensor([[0.3, 0.2, 0.1]]))
    assert (weight.tolist(), chosen.tolist()) == ([[1.0]], [[0]])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_all_adapters_with_equal_gates_are_the_mean_of_the_changes(adapter, execution):
    plain, model, theta, gates = of(MeteoRA(k=TASKS, execution=execution), adapter=adapter)
    batch = tiny_batch()

    def mean(slot, layer, x, output):
        """The layer with the mean of the tasks' changes."""
        added = 0
        for d in range(TASKS):
            one = {name: theta[f"{slot.name}.{name}"][d, layer] for name in plain.tensors.names(slot)}
            latents = {name: value.expand(len(x), *value.shape) for name, value in one.items()}
            task = torch.full((len(x),), d)
            added = added + plain.output(x, plain.tensors.at_layer(slot, layer, latents, task)) / TASKS
        return output + added

    even = {name: torch.zeros_like(value) for name, value in gates.items()}
    torch.testing.assert_close(
        model.logits(batch, theta | even), plain.backbone.logits(batch.input_ids, mean), rtol=1e-4, atol=1e-4
    )


def test_adapters_without_change_are_the_base():
    _, model, theta, gates = of(MeteoRA(k=2))
    zero = {name: torch.zeros_like(value) if name.endswith("lora_B") else value for name, value in theta.items()}
    torch.testing.assert_close(model.logits(tiny_batch(), zero | gates), model.logits(tiny_batch(), None))


@pytest.mark.parametrize("k", [1, 2, TASKS])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("chunk", [2**24, 400])
def test_gathered_and_dense_are_a_loop_over_adapters(adapter, k, chunk, monkeypatch):
    plain, gathered, theta, gates = of(MeteoRA(k=k, temperature=0.7), adapter=adapter)
    dense = routed_model(plain, gathered.prior, MeteoRA(k=k, temperature=0.7, execution=DENSE))
    batch, weights = tiny_batch(), theta | gates

    def loop(slot, layer, x, output):
        """One adapter after another, with the weight that its gate has for each token."""
        logits = x @ gates[f"{slot.name}.gate"][:, layer].mT
        largest = logits >= logits.topk(k, -1).values[..., -1:]
        of_all = torch.where(largest, logits / 0.7, -torch.inf).softmax(-1)
        assert ((of_all > 0).sum(-1) == k).all()
        for d in range(TASKS):
            one = {name: theta[f"{slot.name}.{name}"][d, layer] for name in plain.tensors.names(slot)}
            latents = {name: value.expand(len(x), *value.shape) for name, value in one.items()}
            task = torch.full((len(x),), d)
            output = output + of_all[..., d, None] * plain.output(x, plain.tensors.at_layer(slot, layer, latents, task))
        return output

    expected = plain.backbone.logits(batch.input_ids, loop)
    monkeypatch.setattr("bora_pyro.routers.meteora._CHUNK_ENTRIES", chunk)
    for model in (gathered, dense):
        torch.testing.assert_close(model.logits(batch, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_exactly_k_gates_are_not_zero_and_sum_to_1(k):
    logits = torch.randn((5, 7, 4), generator=torch.Generator().manual_seed(0))
    weight, chosen = MeteoRA(k=k, temperature=2.0).choose(logits)
    every = torch.zeros_like(logits).scatter(-1, chosen, weight)
    assert ((every > 0).sum(-1) == k).all()
    torch.testing.assert_close(every.sum(-1), torch.ones(5, 7))
    order = logits.argsort(-1, descending=True)[..., :k]
    assert torch.equal(chosen, order)
    # at T = 1 it is the softmax over all gates, normalised over the k largest
    of_all = logits.softmax(-1).gather(-1, order)
    torch.testing.assert_close(MeteoRA(k=k).choose(logits)[0], of_all / of_all.sum(-1, keepdim=True))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_of_the_text_reach_the_chosen_gates_alone(execution):
    """One layer and one token: only the rows of its k adapters have a gradient, and with k = 1 none has."""
    for k in (1, 2):
        _, model, theta, gates = of(MeteoRA(k=k, execution=execution))
        gates = {name: value.requires_grad_() for name, value in gates.items()}
        recorded = {}
        change = model.router.recorded_change(model, theta | gates, recorded)
        slot = model.backbone.slots[0]
        x = torch.randn((1, 1, slot.in_features), generator=torch.Generator().manual_seed(4))
        output = change(slot, 1, x, torch.zeros(1, 1, slot.out_features))
        if k == 1:
            assert not output.requires_grad
            continue
        output.square().sum().backward()
        gradient = gates[f"{slot.name}.gate"].grad
        chosen = recorded[f"{slot.name}.1"][0, 0].topk(2).indices.tolist()
        for d in range(TASKS):
            assert bool(gradient[d, 1].any()) == (d in chosen)
        assert not gradient[:, 0].any()


def test_the_temperature_does_not_change_the_choice():
    logits = torch.randn((6, 5), generator=torch.Generator().manual_seed(1))
    cold, hot = MeteoRA(k=3, temperature=0.1).choose(logits), MeteoRA(k=3, temperature=1e6).choose(logits)
    assert torch.equal(cold[1], hot[1])
    torch.testing.assert_close(hot[0], torch.full((6, 3), 1 / 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0; give a whole number from 1 up"),
        ({"temperature": 0.0}, "temperature is 0.0; give a finite number above 0"),
        ({"execution": "gatherd"}, "execution is 'gatherd'; allowed: gathered, dense; did you mean 'gathered'"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InputError, match=words):
        MeteoRA(**options)


def test_too_few_adapters():
    with pytest.raises(InputError, match="k is 4, and there are 3 adapters"):
        of(MeteoRA(k=4))
    assert MeteoRA().execution == GATHERED
