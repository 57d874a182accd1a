"""The frozen weight of a layer, as an adapter sees it: (out, in) float32, whatever the layer stores."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bora_pyro import Backbone
from tests.tiny import random_ids, tiny_backbone, tiny_model
from tests.tiny_base import save_base


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_weight_maps_the_input_to_the_output(architecture, precision):
    backbone = tiny_backbone(architecture, targets="all-linear")
    backbone.model.to(precision)
    modules = dict(backbone.model.named_modules())
    for slot in backbone.slots:
        x = torch.randn(5, slot.in_features, generator=torch.Generator().manual_seed(0))
        for layer, path in enumerate(slot.paths):
            weight = backbone.weight(slot, layer)
            assert (weight.shape, weight.dtype) == ((slot.out_features, slot.in_features), torch.float32)
            assert not weight.requires_grad
            module = modules[path]
            bias = 0 if module.bias is None else module.bias.float()
            tolerance = 1e-5 if precision == torch.float32 else 0.05
            torch.testing.assert_close(module(x.to(precision)).float(), x @ weight.mT + bias, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("quantization", "error"), [("8bit", 0.02), ("4bit", 0.25)])
def test_a_quantised_weight_is_dequantised(quantization, error, tmp_path):
    save_base(tmp_path)
    model = tiny_model("llama", hidden_size=64)
    model.save_pretrained(tmp_path)
    plain = Backbone(model, targets=["q_proj", "down_proj"])
    whole = {slot.name: plain.weight(slot, 1) for slot in plain.slots}
    quantised = Backbone.from_pretrained(tmp_path, quantization=quantization, targets=["q_proj", "down_proj"])
    before = {slot.name: quantised.weight(slot, 1) for slot in quantised.slots}
    quantised.logits(random_ids())  # an 8-bit layer keeps its scales elsewhere once it is used
    for slot in quantised.slots:
        found = quantised.weight(slot, 1)
        assert torch.equal(found, before[slot.name])
        assert (found.shape, found.dtype) == (whole[slot.name].shape, torch.float32)
        assert 0 < float((found - whole[slot.name]).norm() / whole[slot.name].norm()) < error
