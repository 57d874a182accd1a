"""The experts of mixtures of experts that are no linear layers: transformers 5 fuses the weights of all experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bora_pyro.backbone.slots import ALL_LINEAR


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


def experts_left_out(model: nn.Module, targets: Sequence[str] | str | None) -> list[str]:
    """A note if all linear layers are to be adapted, and the base has experts that are none.

    Args:
        model: the base.
        targets: as for :class:`~bora_pyro.backbone.backbone.Backbone`.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    if wanted != [ALL_LINEAR] or not (experts := fused_experts(model)):
        return []
    return [f"{ALL_LINEAR} adapts linear layers; the routed experts stay as they are: {', '.join(experts)}"]
