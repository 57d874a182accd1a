"""A client: its steps in closed form, its state while it is absent, and its sums for τ."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import FrozenALoRA, HierarchicalNormal, InputError, LearnedPrecision, Pooled
from bora_pyro.data.subset import subset
from bora_pyro.federated.client import Client
from bora_pyro.federated.message import SERVER, Message
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.strategies import FFA, FederatedBoRA
from bora_pyro.federated.strategies.bora import learn_from, slope_sums
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.priors import GroupedNormal
from tests.federated.linear import COUNTS, linear
from tests.tiny import random_weights, tiny_bora, tiny_data

SGD = {"optimizer": "sgd", "warmup": 0.0, "schedule": "constant", "gradient_clip": float("inf")}


def test_local_steps_of_a_linear_gaussian_task():
    """θ_d − optimum shrinks by 1 − rate (1 + τ/N_d) a step; a task without documents has Θ."""
    tau, rate, steps = 0.5, 0.2, 4
    model, data, places = linear(HierarchicalNormal(tau), (3, 0, 4))
    client = Client("all", model, data, FederatedBoRA(), FederatedOptions(local_steps=steps, learning_rate=rate, **SGD))
    client.train(1)
    for name, place in places.items():
        n = torch.tensor([3.0, 4.0]).view(-1, *[1] * (place.dim() - 1))
        start, own = model.starts[name], place[[0, 2]]
        optimum = (tau * start + n * own) / (tau + n)
        expected = optimum + (1 - rate * (1 + tau / n)) ** steps * (start - optimum)
        torch.testing.assert_close(client.theta()[name][[0, 2]], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(client.theta()[name][1], start)
        torch.testing.assert_close(client.message(1).tensors[name], expected.mean(0), rtol=1e-4, atol=1e-5)
    assert client.enrolment.tasks == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_task_takes_the_same_steps_whoever_has_it(optimizer):
    options = FederatedOptions(local_steps=3, optimizer=optimizer, gradient_clip=0.1, token_budget=10_000)
    model, data = tiny_bora(targets=["q_proj"], prior=HierarchicalNormal(50.0)), tiny_data()
    together = Client("all", model, data, FederatedBoRA(), options)
    together.train(1)
    for d, task in enumerate(data.tasks):
        alone = Client(task, model, subset(data, [task]), FederatedBoRA(), options)
        alone.train(1)
        for name, value in alone.theta().items():
            assert not torch.equal(value[0], model.starts[name]) or name.endswith("lora_A")
            torch.testing.assert_close(value[0], together.theta()[name][d], rtol=1e-3, atol=1e-5)


def test_an_absent_client_returns_with_its_own_state():
    model, data = tiny_bora(targets=["q_proj"], prior=HierarchicalNormal(50.0)), tiny_data()
    client = Client("ada", model, data, FederatedBoRA(), FederatedOptions(local_steps=2))
    client.train(1)
    before = {name: value.clone() for name, value in client.theta().items()}
    moments = {name: value.clone() for name, value in client._optimizer.state[client.values["q_proj.lora_B"]].items()}
    theta = {name: torch.randn(start.shape) for name, start in model.starts.items()}
    client.receive(Message(SERVER, 7, theta))  # rounds 2 to 7 went on without it
    assert client.version == 7
    for name, value in client.theta().items():
        assert torch.equal(value, before[name])
        assert torch.equal(client.common[name], theta[name])
    for name, value in client._optimizer.state[client.values["q_proj.lora_B"]].items():
        assert torch.equal(value, moments[name])
    client.train(8)
    assert not torch.equal(client.theta()["q_proj.lora_B"], before["q_proj.lora_B"])


@pytest.mark.parametrize("per", ["site", "layer", "model"])
def test_tau_from_the_sums_is_tau_learned_from_all_documents(per):
    prior, data = LearnedPrecision(per=per, start=30.0), tiny_data()
    model = tiny_bora(targets=["q_proj", "fc1"], prior=prior)
    FederatedBoRA().check(model)
    theta = random_weights(model)
    mean = {name: value.mean(0) for name, value in theta.items()}
    [batch] = data.validation.batches(token_budget=10_000, seed=0)
    gradients, rows = document_gradients(model, theta, batch), batch.task
    central = LearnedPrecision(per=per, start=30.0)
    for name, start in model.starts.items():
        central.begin(name, start, 3)
    central.learn({name: (value - mean[name])[rows] for name, value in theta.items()}, gradients, rows)
    sums = []
    for d, task in enumerate(data.tasks):
        options = FederatedOptions(token_budget=20_000)
        client = Client(task, model, subset(data, [task]), FederatedBoRA(), options)
        client.receive(Message(SERVER, 1, mean | {f"tau.{name}": value for name, value in prior.tau.items()}))
        for name, value in client.values.items():
            value.data.copy_(theta[name][d : d + 1])
        client.measure_tau(1)
        sums.append(client.message(1).tensors["tau_sums"])
    learn_from(prior, model.starts, sums)
    for name, tau in prior.tau.items():
        torch.testing.assert_close(tau, central.tau[name], rtol=1e-4, atol=0)
        assert not bool((tau == 30.0).all())


def test_tau_priors_that_have_no_such_sums_are_refused():
    for prior, message in (
        (LearnedPrecision(robust=True), "compares each document with all others, which no client can; leave robust out"),
        (LearnedPrecision(per="task"), "has one tau for all tasks, and the prior learns one for each; give per='site'"),
        (Pooled(), r"needs the hierarchical Normal, and the prior is Pooled\(\)"),
        (GroupedNormal(["a", "a", "b"]), "needs the hierarchical Normal, and the prior is GroupedNormal"),
    ):
        with pytest.raises(InputError, match=message):
            FederatedBoRA().check(tiny_bora(targets=["q_proj"], prior=prior))
    prior = LearnedPrecision()
    model = tiny_bora(targets=["q_proj"], prior=prior)
    FederatedBoRA().check(model)
    assert not slope_sums(prior, model.starts).any()


def test_a_client_without_training_documents_is_refused_by_name():
    model, data, _ = linear(HierarchicalNormal(1.0), (3, 0, 4))
    with pytest.raises(InputError, match="client 'Ada' has no training documents"):
        Client("Ada", model, subset(data, ["task 1"]), FederatedBoRA(), FederatedOptions())


def test_a_never_travels_under_ffa():
    model = tiny_bora(targets=["q_proj"], adapter=FrozenALoRA(rank=2), prior=Pooled())
    fixed = {name: value.clone() for name, value in model.fixed.items()}
    client = Client("ada", model, tiny_data(), FFA(), FederatedOptions(local_steps=2))
    client.train(1)
    assert set(client.message(1).tensors) == {"q_proj.lora_B"}
    assert all(torch.equal(value, client.model.fixed[name]) for name, value in fixed.items())


def test_counts_are_those_of_the_documents():
    model, data, _ = linear(HierarchicalNormal(1.0))
    client = Client("ada", model, subset(data, ["task 0", "task 2"]), FederatedBoRA(), FederatedOptions())
    assert client.counts.tolist() == [COUNTS[0], COUNTS[2]]
