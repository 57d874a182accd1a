"""Shard the frozen base over the processes, for bases that are too large for one of them (torch's FSDP2).

Each process stores a part of the weights of every decoder layer. A layer is gathered just before its forward or backward pass and
freed after it. Every process has the whole embedding, last norm and head. All processes must run through the layers at the same
time. A process without work therefore makes a dummy pass (`Processes.lockstep`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.configuration import model_type
from bora_pyro.errors import InputError


def shard_base(backbone: Backbone, device: torch.device) -> None:
    """Move this process's part of each decoder layer, and all other weights of the base, to ``device``.

    Args:
        backbone: the base, loaded on the CPU in the same way in every process of the group.
        device: the device of this process.

    Raises:
        InputError: transformers does not mark the decoder layers of this model.
    """
    _ = backbone.digest  # computed (and cached) while this process has all weights
    blocks = [module for module in backbone.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        kind = model_type(backbone.model.config)
        raise InputError(
            f"shard_base needs a model whose decoder layers transformers marks, and {kind!r} is not one; leave it out"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    block_tensors = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
        if id(tensor) not in block_tensors:
            tensor.data = tensor.data.to(device)
