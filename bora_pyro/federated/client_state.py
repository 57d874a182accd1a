"""The state of a client as tensors, so that a client whose process has died can go on where it was.

>>> import bora_pyro as bp, tempfile
>>> from pathlib import Path
>>> from bora_pyro.federated.options import FederatedOptions
>>> from bora_pyro.federated.strategies import FFA
>>> from bora_pyro.inference.checkpoint import Checkpoints
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = bp.table([{"task": "ada", "text": f"document {n}"} for n in range(9)])
>>> data = bp.load_tasks(table, backbone.tokenizer, least_tasks=1)
>>> model = bp.BoRA(backbone, 2, adapter=bp.FrozenALoRA(rank=2), prior=bp.Pooled())
>>> one, other = (Client("ada", model, data, FFA(), FederatedOptions(local_steps=2)) for _ in range(2))
>>> _ = one.train(1)
>>> with tempfile.TemporaryDirectory() as folder:
...     Checkpoints(Path(folder)).save(1, *state_of(one))
...     restore(other, Checkpoints(Path(folder)).newest())
>>> torch.equal(other.values["q_proj.lora_B"], one.values["q_proj.lora_B"])
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bora_pyro.federated.client import Client
from bora_pyro.federated.strategies.bora import tau_of
from bora_pyro.inference.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors
from bora_pyro.inference.continuation import check_same, digests

_VALUES, _KEPT, _COMMON, _TAU, _OPTIMIZER, _SUMS = "values", "kept", "common", "tau", "optimizer", "sums"
_NUMBERS = {"steps": (int,), "epoch": (int,), "version": (int,)}


def state_of(client: Client) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the numbers of a client's state, for a checkpoint."""
    groups = {
        _VALUES: {name: value.detach() for name, value in client.parameters.items()},
        _KEPT: client.kept(),
        _COMMON: client.common,
        _TAU: tau_of(client.model.prior),
        _OPTIMIZER: optimizer_tensors(client._optimizer),
        _SUMS: {_SUMS: client._tau_sums},
    }
    progress: dict[str, Any] = {"steps": client._steps_taken, "epoch": client._epoch, "version": client.version}
    return groups, progress | digests(client.data, client.model.backbone)


def restore(client: Client, checkpoint: Checkpoint) -> None:
    """Bring a new client into a stored state.

    Args:
        client: the client, which has not trained; it changes.
        checkpoint: what `state_of` returned.

    Raises:
        InputError: the state is of other documents, another base or another model, or it is damaged.
    """
    checkpoint.check_progress(_NUMBERS)
    check_same(checkpoint.progress, client.data, client.model.backbone, what=f"checkpoint {str(checkpoint.path)!r}")
    device = client.model.backbone.device
    groups = {name: checkpoint.group(name) for name in (_VALUES, _KEPT, _COMMON, _TAU, _OPTIMIZER, _SUMS)}
    with checkpoint.errors():
        own: dict[str, Mapping[str, Tensor]] = {_VALUES: client.parameters, _COMMON: client.common}
        own[_TAU] = tau_of(client.model.prior)
        for group, values in (own | ({_KEPT: client.values} if groups[_KEPT] else {})).items():
            if {name: value.shape for name, value in groups[group].items()} != {n: value.shape for n, value in values.items()}:
                raise ValueError(f"its {group} are those of another model")
        load_optimizer_tensors(client._optimizer, groups[_OPTIMIZER])
    with torch.no_grad():
        for name, value in client.parameters.items():
            value.copy_(groups[_VALUES][name])
    client.common = {name: value.to(device) for name, value in groups[_COMMON].items()}
    client._kept = {name: value.to(device) for name, value in groups[_KEPT].items()}
    client.model.prior.load_state({name: value.to(device) for name, value in groups[_TAU].items()})
    client._tau_sums = groups[_SUMS][_SUMS]
    progress = checkpoint.progress
    client.go_on(steps=progress["steps"], epoch=progress["epoch"], version=progress["version"])
