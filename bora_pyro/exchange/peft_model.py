"""PEFT's own LoRA model on the layers of a backbone, to train or measure beside this library.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano", targets=["q_proj", "fc1"])
>>> model = peft_model(backbone, rank=2)
>>> model.num_parameters(only_trainable=True)
14336
>>> model.get_base_model().lm_head.weight is backbone.model.lm_head.weight
True
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from bora_pyro.backbone.attention import NAME as SHORT_SDPA
from bora_pyro.backbone.backbone import Backbone


def peft_model(
    backbone: Backbone,
    *,
    rank: int,
    alpha: float | None = None,
    adapters: Sequence[str] = ("default",),
    float32: bool = False,
    seed: int = 0,
) -> Any:
    """Make a PEFT LoRA model that shares the backbone's weights, but has modules of its own. Needs the extra ``peft``.

    The model has no avoidable cost: no dropout and no key-value cache. It has the attention of transformers, not that of this
    library. All adapters are trainable, and the last one is active.

    Args:
        backbone: the backbone whose layers are adapted.
        rank: rank of the adapters.
        alpha: their scale is alpha/rank; default: the rank.
        adapters: names of the adapters.
        float32: whether the adapters are float32 on a base of another precision, as is usual in PEFT. Otherwise they have the
            base's precision, and PEFT need not cast each layer's input.
        seed: seed of their start.
    """
    import peft  # an optional package, and slow to import

    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=[path for slot in backbone.slots for path in slot.paths],
        fan_in_fan_out=backbone.slots[0].fan_in_fan_out,
    )
    base, kind = backbone.model, {"autocast_adapter_dtype": float32}
    shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base, shared), lora, adapter_name=adapters[0], **kind)
        for name in adapters[1:]:
            model.add_adapter(name, lora, **kind)
            model.set_adapter(name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.config.use_cache = False
    if base.config._attn_implementation == SHORT_SDPA:
        model.set_attn_implementation("sdpa")
    return model.eval()
