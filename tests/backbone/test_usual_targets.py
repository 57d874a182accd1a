"""Which layers get an adapter if the user names none, and gradient checkpointing of all of them."""

from __future__ import annotations

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from bora_pyro import Backbone, BoRA, InputError, LoRA
from bora_pyro.backbone.slots import find_slots
from bora_pyro.backbone.usual_targets import usual_targets
from tests.tiny import of_task, random_ids, random_weights
from tests.tiny_base import script

# the last parts of the paths
TARGETS = {
    "llama": {"q_proj", "v_proj"},
    "phi3": {"qkv_proj"},
    "codegen": {"qkv_proj"},
    "gpt_bigcode": {"c_attn"},
    "openai-gpt": {"c_attn"},
    "mpt": {"Wqkv"},
    "dbrx": {"Wqkv"},
    "persimmon": {"query_key_value"},
    "gpt_neox_japanese": {"query_key_value"},
    "ctrl": {"Wq", "Wv"},
    "deepseek_v2": {"q_b_proj", "kv_b_proj"},
    "deepseek_v3": {"q_b_proj", "kv_b_proj"},
    "minicpm3": {"q_b_proj", "kv_b_proj"},
    "jetmoe": {"kv_proj"},
    "rwkv": {"receptance", "value"},
    "xlstm": {"q", "v"},
    "mamba": {"in_proj"},
    "mamba2": {"in_proj"},
    "falcon_mamba": {"in_proj"},
    # hybrids have them in both kinds of their layers
    "jamba": {"in_proj", "q_proj", "v_proj"},
    "bamba": {"in_proj", "q_proj", "v_proj"},
    "falcon_h1": {"in_proj", "q_proj", "v_proj"},
    "nemotron_h": {"in_proj", "q_proj", "v_proj"},
    "zamba2": {"in_proj", "q_proj", "v_proj"},
    "lfm2": {"in_proj", "q_proj", "v_proj"},
    "qwen3_next": {"in_proj_qkvz", "q_proj", "v_proj"},
    "recurrent_gemma": {"linear_x", "linear_y", "q_proj", "v_proj"},
}


def tiny(name, **options):
    return Backbone(script("tiny_architectures").tiny_model(name), **options)


def ends(backbone):
    return {path.rsplit(".", 1)[-1] for slot in backbone.slots for path in slot.paths}


@pytest.mark.parametrize("name", TARGETS)
def test_usual_targets(name):
    assert ends(tiny(name)) == TARGETS[name]


# gemma4 has a pattern of whole paths there, and the others are encoders unless their configuration says otherwise
OTHERWISE = {"gemma4", "bert", "electra", "roberta", "xlm-roberta"}


@pytest.mark.parametrize("name", sorted(({*PEFT_TARGETS} & {*script("tiny_architectures").causal_types()}) - OTHERWISE))
def test_peft_adapts_these_layers_by_default_too(name):
    # PEFT adapts more kinds of layers in some types, and none of the state spaces in hybrids
    assert ends(tiny(name)) - {"in_proj"} <= set(PEFT_TARGETS[name])


def test_every_block_has_the_first_set_that_it_has_whole():
    kinds = {
        "l.*.q_proj": ["l.0.q_proj", "l.1.q_proj"],  # a block with queries alone has other names for the rest
        "l.*.v_proj": ["l.0.v_proj"],
        "l.*.kv_b_proj": ["l.1.kv_b_proj"],
        "l.*.out": ["l.0.out", "l.1.out"],
        "l.*.indexer.kv_b_proj": ["l.1.indexer.kv_b_proj"],
    }
    assert usual_targets(kinds) == ["l.*.q_proj", "l.*.v_proj", "l.*.kv_b_proj"]
    assert usual_targets({"l.*.up": ["l.0.up"]}) == []


def test_blocks_without_an_adapter_are_noted():
    assert tiny("nemotron_h").notes == [
        "no adapter on 2 blocks, which have none of the usual targets (--targets names others): model.layers.1, model.layers.3"
    ]
    assert tiny("nemotron_h", targets="in_proj").notes == []
    assert tiny("llama").notes == []


def test_a_model_without_usual_targets_names_its_layers():
    model = script("tiny_architectures").tiny_model("xlnet")
    with pytest.raises(
        InputError, match=r"no usual targets are known for 'xlnet'; name some of its layers: all-linear, layer_1,"
    ):
        find_slots(model)


@pytest.mark.parametrize("name", ["ctrl", "openai-gpt"])
def test_gradient_checkpointing_needs_marked_layers(name):
    with pytest.raises(InputError, match=f"gradient_checkpointing needs .* and '{name}' is not one; leave it out"):
        tiny(name, gradient_checkpointing=True)


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_checkpointing_where_decoder_layers_share_a_layer_and_contain_others(name):
    model = BoRA(tiny(name), 2, adapter=LoRA(rank=2))
    weights = {key: value.requires_grad_() for key, value in of_task(random_weights(model), slice(0, 1)).items()}
    ids, gradients = random_ids(1), []
    for backbone in (model.backbone, Backbone(model.backbone.model, gradient_checkpointing=True)):
        logits = backbone.logits(ids, model.change(weights, torch.zeros(1, dtype=torch.int64)))
        gradients.append(torch.autograd.grad(logits.log_softmax(-1).square().sum(), list(weights.values())))
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
