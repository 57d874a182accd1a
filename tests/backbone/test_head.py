from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bora_pyro.backbone import head as token_loss
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import IGNORED
from bora_pyro.likelihoods import NextTokens
from tests.tiny import ARCHITECTURES, VOCABULARY, random_ids, random_weights, tiny_batch, tiny_bora

WIDTH = 8


def head(bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype).requires_grad_(False)
    for tensor in layer.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def states(rows=3, tokens=7, dtype=torch.float64):
    return torch.randn((rows, tokens, WIDTH), generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def observed_targets():
    targets = random_ids()
    targets[0, 2:] = targets[2] = IGNORED  # a row cut short, and one without any target
    return targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entries", [1, 2**21])  # in chunks of 64 tokens, and all at once
def test_losses_and_gradient_are_those_of_cross_entropy(monkeypatch, bias, entries):
    monkeypatch.setitem(token_loss.CHUNK_ENTRIES, "cpu", entries)
    layer = head(bias)
    rows = 40  # 280 positions: several chunks of 64
    targets = observed_targets().repeat(rows, 1)[:rows]
    weight = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = states(rows), states(rows)
    losses = LazyLogits(ours, layer).token_losses(targets)
    expected = F.cross_entropy(layer(theirs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.view(targets.shape).float())
    (losses * weight).sum().backward()
    (expected.view(targets.shape) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert (ours.grad[targets == IGNORED] == 0).all()


def test_no_target_at_all_gives_no_loss_and_no_gradient():
    value = states()
    losses = LazyLogits(value, head()).token_losses(torch.full((3, 7), IGNORED))
    losses.sum().backward()
    assert not losses.any()
    assert not value.grad.any()


def test_bf16_states_give_float32_losses_and_a_bf16_gradient():
    value, layer = states(dtype=torch.bfloat16), head(dtype=torch.bfloat16)
    losses = LazyLogits(value, layer).token_losses(random_ids())
    losses.sum().backward()
    assert (losses.dtype, value.grad.dtype) == (torch.float32, torch.bfloat16)
    expected = F.cross_entropy(layer(value).float().flatten(0, 1), random_ids().flatten(), reduction="none").view(3, 7)
    torch.testing.assert_close(losses, expected)


def test_called_it_is_the_logits_and_it_expands_over_rows():
    layer, value = head(), states(rows=1).detach()
    logits = LazyLogits(value, layer)
    assert torch.equal(logits(), layer(value))
    assert logits.shape == (1, 7, VOCABULARY)
    assert torch.equal(logits.expand(4, 7, VOCABULARY)(), layer(value.expand(4, 7, WIDTH)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_same_density_by_its_logits_and_without_them(architecture):
    model, batch = tiny_bora(architecture), tiny_batch()
    weights = random_weights(model)
    unprojected = model.lazy_logits(batch, weights)
    # Gemma 2 caps its logits after the head: they are computed whole
    assert isinstance(unprojected, torch.Tensor if architecture == "gemma2" else LazyLogits)
    expected = NextTokens(model.logits(batch, weights)).log_prob(batch.labels)
    torch.testing.assert_close(NextTokens(unprojected).log_prob(batch.labels), expected)


def test_samples_are_drawn_from_the_same_logits():
    layer, value = head(dtype=torch.float32), states(dtype=torch.float32).detach()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = NextTokens(LazyLogits(value, layer)).sample()
        torch.manual_seed(0)
        assert torch.equal(drawn, NextTokens(layer(value)).sample())
