"""Bases that are no causal language models, or lack weights, are refused by what they are."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from bora_pyro import Backbone, InputError
from tests.tiny import tiny_model
from tests.tiny_base import save_base

SIZES = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 20, "hidden_size": 8,
         "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "architecture", "named"),
    [
        ("t5", "T5ForConditionalGeneration", r"of type 't5' \(a T5ForConditionalGeneration\), an encoder-decoder model"),
        ("albert", "AlbertForMaskedLM", r"of type 'albert' \(a AlbertForMaskedLM\), no causal language model"),
        ("vit", "ViTForImageClassification", r"of type 'vit' \(a ViTForImageClassification\), no causal language model"),
    ],
)
def test_another_type_is_named(tmp_path, kind, architecture, named):
    save_base(tmp_path)
    config = AutoConfig.for_model(kind, **SIZES, architectures=[architecture])
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=named + r"; give one of the \d+ types that .* loads, such as llama"):
        Backbone.from_pretrained(tmp_path)


def test_a_body_without_its_head(tmp_path):
    save_base(tmp_path)
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert AutoModel.from_pretrained(tmp_path) is not None
    assert config["architectures"] == ["LlamaModel"]
    with pytest.raises(InputError, match=r"has no weights for 'lm_head.weight', which a LlamaForCausalLM needs; give a"):
        Backbone.from_pretrained(tmp_path)


def test_a_file_that_lacks_layers(tmp_path):
    save_base(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if ".mlp." not in name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"no weights for 'model.layers.0.mlp.down_proj.weight' and 5 more, which"):
        Backbone.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_missing(tmp_path, tied):
    save_base(tmp_path)
    tiny_model("opt", tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path).slots
