"""What a backbone finds out about its base is right, also where one pass of the base would not show it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from bora_pyro import Backbone
from bora_pyro.likelihoods import NextTokens
from tests.tiny import VOCABULARY, random_ids, tiny_model

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Bases that scale or cap their logits. Row 0 of their embedding is zero, as ``pad_token_id=0`` leaves it.
SCALED = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
    "gemma2 with a high cap": {"final_logit_softcapping": 1000.0, "head_dim": 8},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3},
    "nanochat": {"final_logit_softcapping": 15.0},
}


def base(model_type, *, seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **changes})).eval()


def losses_of(logits, targets):
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), reduction="none").view(3, -1).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_the_loss_is_that_of_the_models_own_logits_where_these_are_scaled(name, dtype):
    model = base(name.split()[0], **SCALED[name]).to(dtype)
    assert not model.get_input_embeddings().weight[0].any()
    backbone, input_ids = Backbone(model, targets=["down_proj"] if name == "recurrent_gemma" else "all-linear"), random_ids()
    assert not backbone.ends_with_head
    found = -NextTokens(backbone.lazy_logits(input_ids)).log_prob(input_ids)
    torch.testing.assert_close(found, losses_of(model(input_ids=input_ids).logits, input_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "granite", "granitemoe", "gemma", "mistral", "bloom", "mamba"])
def test_a_plain_head_is_recognised(model_type, dtype):
    assert Backbone(base(model_type).to(dtype), targets="all-linear").ends_with_head


def add_steps(model, after_head, before_head):
    """Put a step between the head and the logits, and one between the states and the head, as a model's own code has them."""
    forward = model.forward

    def changed(*args, **kwargs):
        before = model.lm_head.register_forward_pre_hook(lambda module, args: (before_head(args[0]),))
        after = model.lm_head.register_forward_hook(lambda module, args, output: after_head(output))
        try:
            return forward(*args, **kwargs)
        finally:
            before.remove()
            after.remove()

    model.forward = changed


def unchanged(x):
    return x


@pytest.mark.parametrize(
    ("after_head", "before_head"),
    [
        (lambda x: torch.tanh(x / 1e4) * 1e4, unchanged),
        (lambda x: x.clamp(-50, 50), unchanged),
        (lambda x: x * 1.001, unchanged),
        (unchanged, lambda x: x * 0.5),
        (unchanged, lambda x: x.clamp(-50, 50)),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_step_that_the_models_own_numbers_would_not_show_is_found(architecture, after_head, before_head):
    model = tiny_model(architecture)
    add_steps(model, after_head, before_head)
    assert not Backbone(model).ends_with_head
