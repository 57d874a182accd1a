"""Whether an adapter changes the weights of a layer by one ΔW, which can be exported, merged, and compared between tasks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bora_pyro.adapters.base import Adapter
from bora_pyro.backbone.backbone import Backbone


@torch.no_grad()
def gives_change(adapter: Adapter, backbone: Backbone) -> bool:
    """Whether an adapter has a ΔW, exact factors of one, or none because its change depends on the input of a layer.

    It looks at the first adapted layer, as the adapter begins there.

    >>> import bora_pyro as bp
    >>> from bora_pyro.adapters import SMoRA
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> gives_change(bp.LoRA(rank=2), backbone), gives_change(SMoRA(rank=4), backbone)
    (True, False)

    Args:
        adapter: the adapter.
        backbone: the base, with its adapted layers.
    """
    slot = backbone.slots[0]
    first = replace(slot, paths=slot.paths[:1], kind_paths=slot.paths)
    start = adapter.start(first, partial(backbone.weight, slot, 0), torch.Generator().manual_seed(0))
    tensors = {
        name: value.to(backbone.device) for part in (start.latents, start.fixed, start.buffers) for name, value in part.items()
    }
    return adapter.factors(tensors) is not None or adapter.delta(tensors) is not None
