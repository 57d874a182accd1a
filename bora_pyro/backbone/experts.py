"""The experts of mixtures of experts that are no linear layers: transformers 5 fuses the weights of all experts of a layer."""

from __future__ import annotations

from torch import nn


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the tensors with the weights of all experts of a layer, which no adapter of linear layers changes.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=16, num_hidden_layers=1, num_local_experts=2, **sizes))
    >>> fused_experts(model)
    ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']
    """
    found = {
        ".".join(part for part in path.split(".") if not part.isdigit())
        for path, value in model.named_parameters()
        if value.dim() == 3 and "expert" in path
    }
    return sorted({".".join(path.split(".")[-3:]) for path in found})
