"""A base with an adapter merged into it gives the logits of the adapted model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bora_pyro import HierarchicalNormal, InputError
from bora_pyro.exchange.merge import MERGED, save_merged
from tests.tiny import of_task, random_ids, random_weights, tiny_bora
from tests.toy_members import model_with


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
def test_the_merged_base_is_the_adapted_model(architecture, tmp_path):
    model = tiny_bora(architecture, targets="all-linear", prior=HierarchicalNormal(10))
    weights, ids = random_weights(model), random_ids()
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    save_merged(tmp_path / "merged", model, of_task(weights, 1))
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
