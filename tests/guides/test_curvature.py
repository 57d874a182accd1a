"""Gradients of single documents against plain autograd, one document at a time."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import CausalLM, FrozenALoRA
from bora_pyro.data import TokenSplit
from bora_pyro.guides.curvature import diagonal_fisher, document_gradients
from bora_pyro.likelihoods import NextTokens
from tests.tiny import random_weights, tiny_bora, tiny_split

CHOICES = [{}, {"likelihood": CausalLM("documents")}, {"adapter": FrozenALoRA(rank=2)}]


def alone(model, theta, split, index):
    """Gradient of one document's log-likelihood with respect to its own task's weights, (layers, *shape) by name."""
    document = split.document(index)[None]
    [batch] = TokenSplit.from_documents(document.tolist(), task=[0], num_tasks=1).batches()
    weights = {name: value[split.task[index]].clone()[None].requires_grad_() for name, value in theta.items()}
    logits = model.logits(batch, weights)
    value = NextTokens(logits, per_token=model.likelihood.unit == "documents").log_prob(batch.labels).sum()
    gradients = torch.autograd.grad(value, list(weights.values()))
    return {name: gradient[0] for name, gradient in zip(weights, gradients, strict=True)}


@pytest.mark.parametrize("options", CHOICES, ids=["tokens", "documents", "frozen A"])
def test_gradients_are_those_of_each_document_alone(options):
    model, split = tiny_bora(**options), tiny_split()
    theta = random_weights(model)
    seen = []
    for batch in split.batches(token_budget=24):  # several batches, with and without padding
        gradients = document_gradients(model, theta, batch)
        assert gradients.keys() == theta.keys()
        for row, index in enumerate(batch.index.tolist()):
            for name, expected in alone(model, theta, split, index).items():
                torch.testing.assert_close(gradients[name][row], expected, rtol=1e-4, atol=1e-6)
            seen.append(index)
    assert sorted(seen) == list(range(len(split)))


def test_neither_padding_nor_company_matters():
    model, split = tiny_bora(), tiny_split()
    theta = random_weights(model)
    [batch] = split.batches(token_budget=10_000)
    together = document_gradients(model, theta, batch)
    split.pad_token_id = 7
    [other_padding] = split.batches(token_budget=10_000)
    assert not torch.equal(batch.input_ids, other_padding.input_ids)
    for name, gradients in document_gradients(model, theta, other_padding).items():
        torch.testing.assert_close(gradients, together[name], rtol=1e-5, atol=1e-7)


def test_the_sum_over_documents_is_the_gradient_of_the_whole():
    model, split = tiny_bora(), tiny_split()
    theta = {name: value.requires_grad_() for name, value in random_weights(model).items()}
    [batch] = split.batches(token_budget=10_000)
    total = NextTokens(model.logits(batch, theta)).log_prob(batch.labels).sum()
    expected = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    for name, gradients in document_gradients(model, theta, batch).items():
        of_task = torch.zeros_like(theta[name]).index_add(0, batch.task, gradients)
        torch.testing.assert_close(of_task, expected[name], rtol=1e-4, atol=1e-6)


def test_a_layer_that_the_documents_do_not_use_has_no_gradient():
    """As an expert that no token of a batch chose, or a layer that compresses longer texts."""
    model, split = tiny_bora("llama", targets=["q_proj", "up_proj"]), tiny_split()
    for layer in model.backbone.model.model.layers:
        layer.mlp.forward = torch.zeros_like
    [batch] = split.batches(token_budget=10_000)
    gradients = document_gradients(model, random_weights(model), batch)
    assert {name: bool(value.any()) for name, value in gradients.items()} == {
        name: name.startswith("q_proj") for name in model.starts
    }


@pytest.mark.parametrize("token_budget", [1, 24, 10_000])
def test_fisher_sums_the_squares_of_each_task(token_budget):
    model, split = tiny_bora(), tiny_split((3, 0, 4))
    theta = random_weights(model)
    fisher = diagonal_fisher(model, theta, split, token_budget=token_budget)
    expected = {name: torch.zeros_like(value) for name, value in theta.items()}
    for index, task in enumerate(split.task.tolist()):
        for name, gradient in alone(model, theta, split, index).items():
            expected[name][task] += gradient.square()
    for name, value in fisher.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-7)
        assert value[0].any()
        assert not value[1].any()  # a task without documents
