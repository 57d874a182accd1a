"""Adapters of different layers as one: every ΔW stays as it is."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, LoRA
from bora_pyro.exchange.compose import union_form
from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.fold import stacked
from tests.tiny import of_task, random_ids, random_weights, tiny_bora, tiny_model


def fit(layers, *, rank, alpha, seed):
    model = BoRA(Backbone(tiny_model(), layers=layers), 2, adapter=LoRA(rank=rank, alpha=alpha))
    return model, of_task(random_weights(model, seed=seed), 1)


def test_the_union_changes_each_layer_as_its_own_adapter_does():
    (low, of_low), (high, of_high) = fit("0", rank=1, alpha=2.0, seed=0), fit("1", rank=3, alpha=1.5, seed=1)
    form = union_form([lora_form(low, of_low), lora_form(high, of_high)])
    assert (form.rank, form.alpha) == (3, 6.0)
    whole = tiny_bora(adapter=LoRA(rank=3, alpha=6.0), tasks=2)
    joined = stacked(whole, [form])
    row, ids = torch.zeros(3, dtype=torch.int64), random_ids()
    apart = [model.change({k: v[None] for k, v in of.items()}, row) for model, of in ((low, of_low), (high, of_high))]

    def both(slot, layer, x, output):
        return apart[layer](slot, 0, x, output)

    torch.testing.assert_close(whole.backbone.logits(ids, whole.change(joined, row)), whole.backbone.logits(ids, both))


def test_a_zero_adapter_changes_nothing():
    (low, of_low), (high, of_high) = fit("0", rank=2, alpha=2.0, seed=0), fit("1", rank=2, alpha=2.0, seed=1)
    nothing = {name: torch.zeros_like(value) if name.endswith("_B") else value for name, value in of_high.items()}
    form, whole = union_form([lora_form(low, of_low), lora_form(high, nothing)]), tiny_bora(adapter=LoRA(rank=2), tasks=2)
    row, ids = torch.zeros(3, dtype=torch.int64), random_ids()
    alone = low.backbone.logits(ids, low.change({k: v[None] for k, v in of_low.items()}, row))
    assert torch.equal(whole.backbone.logits(ids, whole.change(stacked(whole, [form]), row)), alone)


def test_one_layer_has_one_adapter():
    form = lora_form(*fit("0", rank=1, alpha=1.0, seed=0))
    with pytest.raises(InputError, match=r"two of the adapters change 'model.decoder.layers.0.self_attn.*different layers"):
        union_form([form, form])
