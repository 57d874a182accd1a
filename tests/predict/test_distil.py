"""Distilling: the divergence from a mixture, its gradient, and a student that gets nearer to the mixture."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import TaskData
from bora_pyro.backbone import head
from bora_pyro.backbone.head import LazyLogits, divergences
from bora_pyro.errors import InputError
from bora_pyro.predict.distil import MixtureTokens, distil
from bora_pyro.predict.mixture import predictive
from bora_pyro.priors import Independent
from tests.tiny import random_weights, tiny_batch, tiny_bora, tiny_data, tiny_split


def direct(logits, others, observed):
    mixture = torch.stack([other.softmax(-1) for other in others]).mean(0)
    return (mixture * (mixture.log() - logits.log_softmax(-1))).sum(-1) * observed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_divergence_and_its_gradient(bias, chunk, monkeypatch):
    monkeypatch.setattr(head, "chunk_tokens", lambda device, vocabulary: chunk)
    generator = torch.Generator().manual_seed(0)
    states, *others = (torch.randn(3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    linear = torch.nn.Linear(8, 11, bias=bias).double().requires_grad_(False)
    observed = torch.rand(3, 5, generator=generator) < 0.6
    weights = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    states.requires_grad_()
    lazy = divergences(LazyLogits(states, linear), [LazyLogits(other, linear) for other in others], observed)
    expected = direct(linear(states), [linear(other) for other in others], observed)
    torch.testing.assert_close(lazy.double(), expected, rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad((weights * lazy).sum(), states)
    [exact] = torch.autograd.grad((weights * expected).sum(), states)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    # logits that are computed already, as of models that do more after the last hidden state
    logits = linear(states).detach().requires_grad_()
    plain = divergences(logits, [linear(other) for other in others], observed)
    torch.testing.assert_close(plain, lazy)
    [gradient] = torch.autograd.grad((weights * plain).sum(), logits)
    [exact] = torch.autograd.grad((weights * direct(logits, [linear(other) for other in others], observed)).sum(), logits)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


def test_the_objective_is_the_scaled_divergence():
    teacher = tiny_bora()
    draws = [random_weights(teacher, seed=seed) for seed in range(3)]
    theta, batch, factors = random_weights(teacher, seed=9), tiny_batch(), torch.tensor([1.0, 2.0, 0.5])
    model = tiny_bora(prior=Independent(), likelihood=MixtureTokens(teacher, lambda: draws, task_weights=factors))
    trace = poutine.trace(lambda: model.likelihood(model, theta, batch)).get_trace()
    predicted = torch.nn.functional.pad(batch.labels[:, 1:] != -100, (0, 1))
    found = direct(teacher.logits(batch, theta), [teacher.logits(batch, draw) for draw in draws], predicted).sum(-1)
    expected = -batch.scale * (factors[batch.task] * found).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected), rel=1e-4)
    # a student that is the only teacher has nothing to learn
    alone = MixtureTokens(teacher, lambda: [theta])
    trace = poutine.trace(lambda: alone(model, theta, batch)).get_trace()
    assert float(trace.log_prob_sum()) == pytest.approx(0.0, abs=1e-4)
    assert repr(alone) == "MixtureTokens()"
    assert alone.observations(3, 40) == 40
    pyro.clear_param_store()


@pytest.mark.parametrize("task_subsampling", [False, True])
def test_a_student_gets_nearer_to_the_mixture(task_subsampling):
    teacher, split = tiny_bora(), tiny_split((6, 6, 6))
    draws = [random_weights(teacher, seed=seed) for seed in range(2)]
    data = TaskData([f"task {d}" for d in range(3)], split, split, split)
    start = {name: sum(draw[name] for draw in draws) / 2 for name in draws[0]}

    def distance(theta):
        return float(divergence(teacher, split, draws, theta))

    fitted = distil(
        teacher, data, lambda: draws, start, alpha=3.0, epochs=8, learning_rate=0.03, patience=0, token_budget=60,
        task_subsampling=task_subsampling,
    )  # fmt: skip
    assert fitted.model.adapter == teacher.adapter
    losses = [epoch["loss"] for epoch in fitted.history]
    assert losses[-1] < 0.7 * losses[0]
    last = {name: value.detach() for name, value in fitted.weights()[0].items()}
    scores = [predictive(teacher, split, lambda theta=theta: [theta]).perplexity() for theta in (start, last)]
    assert scores[1] <= scores[0]  # the start is kept if nothing is better
    if fitted.best_epoch:
        assert distance(last) < distance(start)
    else:
        for name, value in start.items():
            assert torch.equal(last[name], value)


def divergence(teacher, split, draws, theta):
    total = 0.0
    for batch in split.batches(token_budget=1000):
        predicted = torch.nn.functional.pad(batch.labels[:, 1:] != -100, (0, 1))
        total += direct(teacher.logits(batch, theta), [teacher.logits(batch, draw) for draw in draws], predicted).sum()
    return total


def test_documents_must_decide():
    teacher, data = tiny_bora(), tiny_data()
    empty = data.validation.subset(torch.zeros(0, dtype=torch.int64))
    theta = random_weights(teacher)
    with pytest.raises(InputError, match="there is no validation document"):
        distil(teacher, TaskData(data.tasks, data.train, empty, data.test), lambda: [theta], theta, alpha=3.0)
