"""The frozen base in parts, one in each process, where one cannot hold it all (torch's FSDP2).

Each process keeps a share of every decoder layer's weights; a layer is put together when its turn comes, forward and backward,
and taken apart again. Embedding, last norm and head are whole in each. All processes must so pass through the layers together:
`Processes.lockstep` lets one that has nothing to do make an idle pass for the others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.errors import InputError


def shard_base(backbone: Backbone, device: torch.device) -> None:
    """Keep this process's share of each decoder layer on ``device``, and the rest of the base too.

    Args:
        backbone: loaded on the CPU, in the same way in every process of the group.
        device: where it computes.

    Raises:
        InputError: transformers does not say what the model's decoder layers are.
    """
    _ = backbone.digest  # taken while the weights are whole
    blocks = [module for module in backbone.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        kind = backbone.model.config.model_type
        raise InputError(f"shard_base needs a model whose layers transformers can name, and {kind!r} is none; leave it out")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    of_blocks = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
        if id(tensor) not in of_blocks:
            tensor.data = tensor.data.to(device)
