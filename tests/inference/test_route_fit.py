"""Gates over finished adapters: what is fitted, what stays, and adapters that are added later."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, InputError, LoRA, Posterior, evaluate, fit, normal_guide, pool, save_peft
from bora_pyro.data import TaskData
from bora_pyro.exchange.pooling.fitted import pooled_fit
from bora_pyro.exchange.pooling.folder import read_adapters
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
from bora_pyro.inference.route_fit import CycleDraws, add_adapters, frozen, gates_of, route_fit, routed_model
from bora_pyro.likelihoods import Choice, LabelledGates
from bora_pyro.predict.gates import read_gates
from bora_pyro.predict.mixture import predictive
from bora_pyro.priors import FrozenAdapters
from bora_pyro.routers import MeteoRA
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora, tiny_data, tiny_split

OPTIONS = {"epochs": 8, "token_budget": 60, "patience": 0, "learning_rate": 0.1, "gradient_norm": False}


def separable(counts=(12, 12, 12)):
    """Documents whose task is visible in every token: each task has four tokens of its own."""
    splits = []
    for seed in range(3):
        split = tiny_split(counts, seed=seed)
        owner = split.task.repeat_interleave(split.lengths)
        splits.append(split.replace(tokens=3 + 20 * owner + split.tokens % 4))
    return TaskData([f"task {d}" for d in range(len(counts))], *splits)


@pytest.fixture(scope="module")
def fitted():
    model = tiny_bora(targets=["q_proj", "fc1"], prior=HierarchicalNormal(0.5), adapter=LoRA(rank=2))
    return fit(model, separable(), **OPTIONS)


@pytest.fixture(scope="module")
def routed(fitted):
    return route_fit(fitted, separable(), MeteoRA(k=1), **OPTIONS)


def test_only_the_gates_are_fitted(fitted, routed):
    assert sum(value.numel() for value in routed.guide.parameters()) == 2 * TASKS * (32 + 32)
    assert routed.sites().keys() == {"theta.q_proj.gate", "theta.fc1.gate"}
    before, after = fitted.weights(), routed.weights()
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value)
        assert torch.equal(after[1][name], before[1][name])
    assert all(bool(value.any()) for value in gates_of(after[0]).values())
    assert not any(bool(value.any()) for value in gates_of(after[1]).values())


def test_gates_find_tasks_that_every_token_shows(fitted, routed):
    """Gates that are nearly always right give nearly the perplexity of the adapter of the right task."""
    data = separable()
    found = read_gates(routed.model, routed.weights()[0], data.test)
    assert found.by_layer["q_proj.0"] == 1  # its input is the token itself, and each task has its own tokens
    assert found.accuracy > 0.85
    assert found.joint_accuracy > 0.85
    assert found.accuracy == pytest.approx(sum(found.by_layer.values()) / 4)
    assert [len(p) for p in found.probabilities] == data.test.lengths.tolist()
    for p in found.probabilities:
        torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    oracle = fitted.evaluate(data.test)["test_perplexity"]
    (wrong,) = evaluate(fitted.model, data.test.replace(task=(data.test.task + 1) % TASKS), fitted.weights()[0])
    perplexity = routed.evaluate(data.test)["test_perplexity"]
    assert perplexity < 1.5 * oracle < 0.5 * wrong.perplexity()
    # the task of a text makes no difference
    other = routed.evaluate(data.test.replace(task=torch.zeros_like(data.test.task)))["test_perplexity"]
    assert other == pytest.approx(perplexity, rel=1e-6)
    # at zero gates every task is as probable
    even = {name: torch.zeros_like(value) if name.endswith("gate") else value for name, value in routed.weights()[0].items()}
    for p in read_gates(routed.model, even, data.test).probabilities:
        torch.testing.assert_close(p, torch.full_like(p, 1 / TASKS))


def test_the_objective_is_that_of_the_docstring(fitted):
    batch, prior = tiny_batch(), FrozenAdapters(*fitted.weights(), scale=0.5)
    model = routed_model(fitted.model, prior, MeteoRA(k=2), likelihood=LabelledGates(gate_weight=7.0, token_weight=0.5))
    weights = fitted.weights()[0] | {
        name: value for name, value in random_weights(model, seed=3).items() if name.endswith("gate")
    }
    sites = model.sites_given(weights, model.weights_given({f"theta.{n}": v for n, v in gates_of(weights).items()})[1])
    assert {name.removeprefix("theta.") for name in sites} == set(gates_of(weights))
    trace = poutine.trace(poutine.condition(model, data=sites)).get_trace(batch)
    trace.compute_log_prob()
    log_p = model.logits(batch, weights).log_softmax(-1)
    labels, read = batch.labels[:, 1:], batch.attention_mask.bool()
    tokens = log_p[:, :-1].gather(2, labels.clamp(min=0)[..., None])[..., 0][labels >= 0].sum()
    gates = {}
    model.backbone.logits(batch.input_ids, model.router.recorded_change(model, weights, gates))
    label = batch.task[:, None].expand_as(read)
    own = [g.log_softmax(-1).gather(2, label[..., None])[..., 0][read].sum() for g in gates.values()]
    assert len(own) == 4
    observed = sum(trace.nodes[name]["log_prob_sum"] for name in trace.observation_nodes if not name.startswith("theta."))
    torch.testing.assert_close(observed, batch.scale * (0.5 * tokens + 7.0 * torch.stack(own).mean()))
    prior_density = sum(torch.distributions.Normal(0, 0.5).log_prob(value).sum() for value in gates_of(weights).values())
    torch.testing.assert_close(sum(trace.nodes[name]["log_prob_sum"] for name in sites), prior_density)


def test_labels_alone(fitted):
    routed = route_fit(fitted, separable(), MeteoRA(k=2), token_weight=0.0, **OPTIONS)
    assert read_gates(routed.model, routed.weights()[0], separable().test).accuracy > 0.85


def test_an_added_adapter_leaves_the_gates_of_the_others(fitted):
    three = separable()
    two_tasks = TaskData(three.tasks[:2], *(only(split, 2) for split in (three.train, three.validation, three.test)))
    pair = fit(tiny_bora(targets=["q_proj", "fc1"], tasks=2, adapter=LoRA(rank=2)), two_tasks, **OPTIONS)
    routed = route_fit(pair, two_tasks, MeteoRA(k=1), **OPTIONS)
    new = {name: value[2] for name, value in fitted.weights()[0].items()}
    more = add_adapters(routed, {"task 2": new}, three, **OPTIONS)
    before, after = routed.weights()[0], more.weights()[0]
    assert more.tasks == three.tasks
    for name, value in before.items():
        assert torch.equal(after[name][:2], value)
        assert torch.equal(after[name][2], new[name]) if name in new else bool(after[name][2].any())
    # the guide has the new row alone
    assert sum(value.numel() for value in more.guide.parameters()) == 2 * (32 + 32)
    assert read_gates(more.model, after, three.test).accuracy > 0.8
    for adapters, data, words in (
        ({}, three, "no adapter is given"),
        ({"task 1": new}, three, "task 'task 1' has an adapter already"),
        ({"task 9": new}, three, "give those of"),
        ({"task 2": {}}, three, "the adapter of task 'task 2' has no"),
    ):
        with pytest.raises(InputError, match=words):
            add_adapters(routed, adapters, data)
    with pytest.raises(InputError, match="has no gates over finished adapters"):
        add_adapters(pair, {"task 2": new}, three)


def only(split, tasks):
    """The documents of the first tasks."""
    chosen = split.subset((split.task < tasks).nonzero()[:, 0])
    return chosen.replace(num_tasks=tasks)


def test_gates_over_draws_of_a_posterior():
    model, data = tiny_bora(targets=["q_proj"], prior=HierarchicalNormal(5.0), adapter=LoRA(rank=2)), separable()
    posterior = Posterior(fit(model, data, guide=normal_guide(model, scale=1.0), **OPTIONS))
    draws = [posterior.draw(k) for k in range(2)]
    read = []

    class Seen(CycleDraws):
        """Notes which adapters a step has read."""

        name = "seen"

        def after_step(self, loop):
            read.append(frozen(loop.model)._number)

    prior = FrozenAdapters(posterior.mean(), posterior.fitted.weights()[1], draws=draws)
    own = routed_model(model, prior, MeteoRA(k=1))
    fit(own, data, callbacks=[Seen(), CycleDraws()], **OPTIONS)
    assert read[:4] == [None, 0, 1, None]
    routed = route_fit(posterior.fitted, data, MeteoRA(k=1), draws=draws, **OPTIONS)
    weights = routed.weights()[0]
    for name, value in posterior.mean().items():
        assert torch.equal(weights[name], value)
    mixed = predictive(routed.model, data.test, lambda: [draw | gates_of(weights) for draw in draws])
    alone = [evaluate(routed.model, data.test, draw | gates_of(weights))[0].log_likelihood for draw in draws]
    torch.testing.assert_close(mixed.log_likelihood, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1])
    new = {name: value[0] for name, value in posterior.mean().items()}
    with pytest.raises(InputError, match="fitted over draws, which a new adapter does not have"):
        add_adapters(routed, {"x": new}, dataclasses.replace(data, tasks=[*data.tasks, "x"]))


def test_gates_over_adapters_from_peft_folders(fitted, tmp_path):
    theta, _ = fitted.weights()
    for d, task in enumerate(fitted.tasks):
        save_peft(tmp_path / task, fitted.model, {name: value[d] for name, value in theta.items()})
    pooled = pool(read_adapters(tmp_path), fitted.model.backbone, FixedShrinkage(0.0), same_base=False)
    routed = route_fit(pooled_fit(pooled, shrunk=False), separable(), MeteoRA(k=2), **(OPTIONS | {"epochs": 1}))
    weights = routed.weights()[0]
    own = routed_model(fitted.model, FrozenAdapters(*fitted.weights()), MeteoRA(k=2))
    batch = tiny_batch()
    expected = own.logits(batch, theta | gates_of(weights))
    torch.testing.assert_close(routed.model.logits(batch, weights), expected, rtol=1e-3, atol=1e-3)


def test_what_has_no_gates(fitted):
    data = separable()
    with pytest.raises(InputError, match="k is 4, and there are 3 adapters; give a whole number from 1 to 3"):
        route_fit(fitted, data, MeteoRA(k=4))
    with pytest.raises(InputError, match="documents are of 2 tasks"):
        route_fit(fitted, dataclasses.replace(data, tasks=data.tasks[:2]))
    routed = route_fit(fitted, data, MeteoRA(k=1), **(OPTIONS | {"epochs": 1}))
    with pytest.raises(InputError, match=r"read by MeteoRA\(k=1.*already"):
        route_fit(routed, data)
    with pytest.raises(InputError, match="has no gates"):
        read_gates(fitted.model, fitted.weights()[0], data.test)
    with pytest.raises(InputError, match=r"MeteoRA\(k=1.* cannot be exported|cannot be exported from MeteoRA"):
        save_peft("/nowhere", routed.model, {name: value[0] for name, value in routed.weights()[0].items()})
    answers = fit(tiny_bora(), tiny_data(), epochs=1)
    answers.model.likelihood = Choice()
    with pytest.raises(InputError, match="route_fit needs a fit to texts"):
        route_fit(answers, tiny_data())
