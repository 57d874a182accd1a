"""Tiny random language models of every causal class that transformers has.

    python -c "from tiny_architectures import tiny_model; print(tiny_model('llama'))"

A configuration is shrunk by the names of its fields (``hidden_size``, ``num_experts``, ...), with a table of exceptions for the
types whose fields depend on each other. A hybrid keeps one layer of each kind. The weights are far from zero, so that the
logits of different tokens differ and a wrong layer is seen in them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Tokens of every tiny vocabulary, and the longest text in tokens.
VOCABULARY, CONTEXT = 128, 64
#: Ids of the special tokens.
PAD, START, END = 1, 2, 3

_SIZES: dict[str, int] = {
    # widths: 4 heads of 8 numbers
    "hidden_size|d_model|n_embd|dim|emb_dim|word_embed_proj_dim|embedding_size|embedding_dim|lru_width|attention_hidden_size": 32,
    "input_embedding_size|output_embedding_size|attn_hidden_size|hidden_size_global|mamba_d_ssm|pooler_hidden_size": 32,
    "(decoder_|encoder_)?(num_)?attention_heads|n_heads?|num_heads|num_(en|de)coder_attention_heads": 4,
    "swa_num_attention_heads|linear_num_heads|index_n_heads": 4,
    "num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_(key|value)_heads": 2,
    "(swa_|global_)?head_dim|dim_head|d_head|attention_head_size|index_head_dim|linear_(key_|value_)?head_dim": 8,
    "kv_channels|d_kv": 8,
    "qk_nope_head_dim|v_head_dim|qk_rope_head_dim|rotary_dim": 8,
    "qk_head_dim": 16,
    "kv_lora_rank|q_lora_rank|o_lora_rank|hc_lowrank|laurel_rank|gated_norm_rank|adapter_rank|router_hidden_size": 8,
    "hidden_size_per_layer_input|ple_embed_dim|d_rel|(pronunciation|shape)_embed_dim": 8,
    ".*intermediate_size(_mlp)?|d_ff|dff|dim_ff|d_inner|n_inner|(de|en)coder_ffn_dim|ffn_dim|feed_forward_size": 48,
    "(expert_)?ffn_hidden_size|mlp_dim": 48,
    # depth
    "(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|num_blocks|n_decoder_layers|num_(en|de)coder_layers": 2,
    "num_layers_per_stack": 1,
    # experts
    "num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num": 4,
    "num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts": 2,
    "n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts": 1,
    # state spaces
    "(mamba_)?d_state|ssm_state_size|state_size|mamba_d_state": 8,
    "(mamba_)?(dt|time_step)_rank": 4,
    "(mamba_|block_multiple_|index_block_)?(chunk_|block_)?(size|of)": 8,
    # lengths
    "max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|context_length|model_max_length": CONTEXT,
    "sliding_window(_size)?|window_size|local_attention|attention_window_size|attention_chunk_size|conf_attention.*": 8,
    "index_topk|index_topk_blocks|local_attention_window_len|keep_window_size": 16,
    # tokens
    "(audio_|decoder_)?vocab_size|vocab_size_per_layer_input|unpadded_vocab_size": VOCABULARY,
}  # fmt: skip
_PATTERNS = [(re.compile(pattern), size) for pattern, size in _SIZES.items()]
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "layer_rope_theta", "no_rope_layers",
              "num_attention_heads_per_layer", "activation_sparsity_pattern")  # fmt: skip

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 4}
_ATTENTION_KINDS = ["sliding_attention", "full_attention"]
_SHARED = {"num_hidden_layers": 4, "layer_types": 2 * _ATTENTION_KINDS, "num_kv_shared_layers": 2}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4}
_GRANITE = {"logits_scaling": 2.0, "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
_ASSISTANT = {
    "num_hidden_layers": 2,
    "layer_types": _ATTENTION_KINDS,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16, "shared_experts_intermediate_size": 48,
}  # fmt: skip
#: Fields of types that shrink in their own way, or have scales that the checks should see. A mapping within a mapping is for a
#: nested configuration; ``__default__`` is for the configuration that is shrunk.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere": {"logit_scale": 0.7},
    "cohere2": {"logit_scale": 0.7},
    "cohere2_moe": {"logit_scale": 0.7},
    "cohere_compass_text": {
        "layer_types": _ATTENTION_KINDS,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]} for kind in _ATTENTION_KINDS
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "embed_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 48},
    "gemma4_assistant": {"__default__": {"text_config": _ASSISTANT}, "text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"__default__": {"text_config": _ASSISTANT}, "text_config": _ASSISTANT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    **dict.fromkeys(["granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"], _GRANITE),
    "granitemoehybrid": {
        **_GRANITE,
        **_MAMBA2,
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "ministral": {"head_dim": 8},
    "minicpm3": {"dim_model_base": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "hash_seed": 0,
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}


#: Encoders that read in one direction if their configuration says so. Their names end with this as decoders.
DECODER = " as a decoder"
ENCODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
            "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip


def causal_types() -> list[str]:
    """The model types that ``AutoModelForCausalLM`` loads, and encoders as decoders, in alphabetical order."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(f"{name}{DECODER}" for name in ENCODERS)])


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """A small configuration of a type.

    Args:
        name: one of ``causal_types``.
        changes: fields with other values.
    """
    model_type = name.removesuffix(DECODER)
    if name.endswith(DECODER):
        changes = {"is_decoder": True} | changes
    kind = CONFIG_MAPPING[model_type]
    exceptions = EXCEPTIONS.get(model_type, {})
    default = kind(**exceptions.get("__default__", {}))
    fields = _merged(_shrunk(default), {k: v for k, v in exceptions.items() if k != "__default__"})
    return kind(**_merged(fields, changes))


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small model of a type with random weights, in evaluation mode.

    Args:
        name: one of ``causal_types``.
        seed: seed of the weights.
        changes: as for :func:`tiny_config`.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
        randomise(model)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw matrices of std √(1/inputs), and move vectors a little, such as the scales of norms and the rates of state spaces."""
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2 or name.rsplit(".", 1)[-1] in ("A_log", "D"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            fan_in = parameter.shape[-1] if parameter.dim() < 4 else parameter[0].numel()
            parameter.copy_(torch.randn_like(parameter) * max(fan_in, 8) ** -0.5 * 1.2)
        if (row := padding.get(id(parameter))) is not None:
            parameter[row] = 0  # as transformers initialises it


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are smaller than by default, nested ones included."""
    fields: dict[str, Any] = {}
    kept = _kept_layers(config)
    aliases = getattr(config, "attribute_map", {})
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(value)
        elif name in _PER_LAYER and isinstance(value, list | tuple):
            fields[name] = [value[layer] for layer in kept]
        elif name.endswith("softcapping") and value is not None:
            fields[name] = 3.0  # near enough to bend the tiny model's logits
        elif isinstance(value, bool) or not isinstance(value, int) or name in aliases:
            continue
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            fields[name] = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}[name]
        else:
            size = next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)
            if size == 2 and "layer" in name and "_per_" not in name and kept:
                size = len(kept)
            if size is not None and value > size:
                fields[name] = size
    if "qk_nope_head_dim" in vars(config) and "num_key_value_heads" in vars(config):
        fields["num_key_value_heads"] = 4  # latent attention has keys for each head
    return fields


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that a hybrid keeps: the first of each kind, and at least two; empty if all layers are alike."""
    lists = [value for name in _PER_LAYER if isinstance(value := getattr(config, name, None), list | tuple) and len(value)]
    if not lists:
        return []
    kinds = list(zip(*lists, strict=False))
    kept = sorted({kinds.index(kind) for kind in kinds})
    return kept if len(kept) > 1 else [0, 1]


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in changes.items():
        own = merged.get(name)
        merged[name] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, ``w5`` to ``w127``, which puts the start before a text."""
    special = {"<unk>": 0, "<pad>": PAD, "<s>": START, "</s>": END, ".": 4}
    words = special | {f"w{token}": token for token in range(5, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
