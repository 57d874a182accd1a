"""Tiny mixtures of experts and other architectures of which PEFT rewrites or refuses layers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_FEW = {"num_experts": 4}

#: Further sizes by model type.
MIXTURES = {
    "deepseek_v2": {**_SHARED, **_LATENT},
    "deepseek_v3": {**_SHARED, **_LATENT},
    "dots1": _SHARED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "glm4_moe": {**_SHARED, "head_dim": 8},
    "hunyuan_v1_moe": {**_FEW, "moe_topk": 2, "head_dim": 8},
    "laguna": {**_FEW, "shared_expert_intermediate_size": 16, "head_dim": 8, "num_attention_heads_per_layer": None},
    "qwen3_next": {
        **_FEW, "shared_expert_intermediate_size": 16, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": {},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": _FEW,
    "qwen2_moe": {**_FEW, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_FEW, "head_dim": 8},
}  # fmt: skip


def tiny_mixture(model_type, *, seed=0, **changes):
    """A causal language model with random weights whose layers matter, in evaluation mode."""
    config = AutoConfig.for_model(model_type, **{**_SIZES, **MIXTURES[model_type], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for value in model.parameters():
            if value.dim() > 1:
                value.data.normal_(0, 0.2)
    return model
