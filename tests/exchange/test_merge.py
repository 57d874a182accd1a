"""A base with an adapter merged into it gives the logits of the adapted model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bora_pyro import Backbone, BoRA, HierarchicalNormal, InputError, LoRA
from bora_pyro.exchange.factors import layer_deltas
from bora_pyro.exchange.merge import MERGED, save_merged
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny import of_task, random_ids, random_weights, tiny_bora
from tests.toy_members import model_with


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
def test_the_merged_base_is_the_adapted_model(architecture, tmp_path):
    model = tiny_bora(architecture, targets="all-linear", prior=HierarchicalNormal(10))
    weights, ids = random_weights(model), random_ids()
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    error = save_merged(tmp_path / "merged", model, of_task(weights, 1))
    assert error < 1e-4  # of rounding to float32
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = model.backbone.logits(ids, model.change(weights, torch.tensor([1, 1, 1])))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.model.state_dict().items())
    assert json.loads((tmp_path / "merged" / MERGED).read_text(encoding="utf-8"))["model"] == repr(model)
    with pytest.raises(InputError, match="holds an earlier result; give --overwrite true"):
        save_merged(tmp_path / "merged", model, of_task(weights, 1))


def test_a_routed_model_is_not_merged(tmp_path):
    model = model_with("router")
    with pytest.raises(InputError, match="which of them is used depends on the token"):
        save_merged(tmp_path / "merged", model, model.starts)
    assert not list(tmp_path.iterdir())


def test_the_error_of_rounding_is_that_of_the_precision(tmp_path):
    model = tiny_bora("llama", prior=HierarchicalNormal(10))
    model.backbone.model.bfloat16()
    weights = of_task(random_weights(model), 1)
    error = save_merged(tmp_path / "merged", model, weights)
    lost = total = 0.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    for path, delta in layer_deltas(model, weights, task=1).items():
        before = model.backbone.model.state_dict()[f"{path}.weight"].double()
        lost += (merged[f"{path}.weight"].double() - before - delta.double()).square().sum()
        total += delta.double().square().sum()
    assert error == pytest.approx(float((lost / total).sqrt()), rel=1e-3)
    assert error > 1e-3


def test_two_layers_that_are_one_tensor_are_not_merged(tmp_path):
    model = tiny_bora("llama", targets=["q_proj"])
    first, second = (model.backbone.model.get_submodule(path) for path in model.backbone.slots[0].paths)
    second.weight = first.weight
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight and .*layers\.1.* are one tensor"):
        save_merged(tmp_path / "merged", model, model.starts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_merged_mixtures_of_experts_are_read_back(architecture, tmp_path):
    base = tiny_mixture(architecture)
    model = BoRA(Backbone(base, targets="all-linear"), 2, adapter=LoRA(rank=2))
    weights, ids = random_weights(model), random_ids()
    save_merged(tmp_path / "merged", model, of_task(weights, 1))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = model.backbone.logits(ids, model.change(weights, torch.tensor([1, 1, 1])))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
