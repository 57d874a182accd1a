"""LoRA with dropout: plain LoRA in predictions, PEFT's own dropout in a step, and masks that only a seed decides."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from bora_pyro import BoRA, InputError, LoRA, fit
from bora_pyro.adapters import DropoutLoRA
from bora_pyro.predict.mixture import predictive
from tests.tiny import TASKS, of_task, peft_model, random_ids, random_weights, tiny_backbone, tiny_batch, tiny_bora, tiny_data

OPTIONS = {"epochs": 2, "token_budget": 30, "patience": 0}


def dropped(**options):
    return tiny_bora(adapter=DropoutLoRA(rank=2, alpha=3.0, **options))


def test_a_prediction_is_that_of_lora():
    weights = random_weights(tiny_bora())
    torch.testing.assert_close(dropped(dropout=0.5).logits(tiny_batch(), weights), tiny_bora().logits(tiny_batch(), weights))


def test_a_mask_is_peft_s_dropout():
    """The same random numbers drop the same entries of the same inputs."""
    adapter, generator = DropoutLoRA(rank=2, alpha=3.0, dropout=0.4, always=True), torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((3, 5, 16), (3, 2, 16), (3, 24, 2)))
    tensors, output = {"lora_A": a, "lora_B": b}, torch.randn((3, 5, 24), generator=generator)
    with poutine.seed(rng_seed=1):
        found = adapter.output(x, tensors)
    with poutine.seed(rng_seed=1):
        added = adapter.add(output, x, tensors)
    with poutine.seed(rng_seed=1):
        thinned = torch.nn.Dropout(0.4)(x)
    assert 0.3 < float((thinned == 0).double().mean()) < 0.5
    torch.testing.assert_close(found, LoRA(rank=2, alpha=3.0).output(thinned, tensors))
    torch.testing.assert_close(added, output + found)


def test_the_mean_over_masks_is_the_output_of_lora():
    adapter, generator = DropoutLoRA(rank=2, dropout=0.5, always=True), torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((1, 1, 16), (1, 2, 16), (1, 3, 2)))
    tensors = {"lora_A": a, "lora_B": b}
    with poutine.seed(rng_seed=0):
        mean = adapter.output(x.expand(1, 20_000, 16), tensors).mean(1)
    torch.testing.assert_close(mean, LoRA(rank=2).output(x, tensors)[:, 0], atol=0.2, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_is_that_of_its_own_masks(checkpointing):
    """Recomputed layers have the masks of the forward pass."""
    backbone = tiny_backbone("llama", gradient_checkpointing=checkpointing)
    model, batch = BoRA(backbone, TASKS, adapter=DropoutLoRA(rank=2, dropout=0.3)), tiny_batch()
    name, weights = "q_proj.lora_B", random_weights(model)

    def loss(shift):
        theta = weights | {name: (weights[name] + shift).requires_grad_()}
        with poutine.seed(rng_seed=0):
            value = model.logits(batch, theta).double().square().sum()
            (gradient,) = torch.autograd.grad(value, theta[name])
        return float(value.detach()), gradient

    direction = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    slope = (loss(step * direction)[0] - loss(-step * direction)[0]) / (2 * step)
    assert float((loss(0.0)[1] * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_without_dropout_a_fit_is_that_of_lora_and_with_it_the_seed_decides():
    plain, zero, one, same = (
        fit(model, tiny_data(), **OPTIONS) for model in (tiny_bora(), dropped(dropout=0.0), dropped(), dropped())
    )
    assert [epoch["loss"] for epoch in zero.history] == [epoch["loss"] for epoch in plain.history]
    assert [epoch["loss"] for epoch in one.history] == [epoch["loss"] for epoch in same.history]
    assert one.history[0]["loss"] != plain.history[0]["loss"]
    torch.testing.assert_close(one.sites(), same.sites(), rtol=0, atol=0)


def test_masks_at_prediction_give_a_mixture():
    weights, split = random_weights(tiny_bora()), tiny_data().test
    found = []
    for always in (False, True):
        with poutine.seed(rng_seed=0):
            found.append(predictive(dropped(always=always), split, lambda: [weights] * 4))
    assert float(found[0].epistemic.abs().max()) < 1e-6
    assert float(found[1].epistemic.min()) > 0


def test_an_adapter_of_peft_without_its_dropout_is_the_same():
    model = dropped()
    weights, ids = of_task(random_weights(model), 0), random_ids()
    ours = model.backbone.logits(ids, model.change({n: v[None] for n, v in weights.items()}, torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(peft_model(model, weights)(input_ids=ids).logits, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_a_probability_out_of_range_is_refused(dropout):
    with pytest.raises(InputError, match=f"dropout is {dropout}; give a probability from 0"):
        DropoutLoRA(dropout=dropout)
