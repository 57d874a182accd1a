"""Which ranks the tokens of each task use, under the adapter SMoRA.

>>> usage = {"fc1": torch.tensor([[[30, 0]], [[0, 10]]])}  # two tasks, one layer, two experts
>>> usage_information(usage)["fc1"]  # the expert tells the task: 0.75 ln(1/0.75) + 0.25 ln(1/0.25)
tensor([0.5623], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bora_pyro.adapters import SMoRA
from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights


@torch.inference_mode()
def rank_usage(fitted: Fitted, split: TokenSplit, *, predicting: bool = False, token_budget: int = 8192) -> dict[str, Tensor]:
    """How many tokens of each task each expert reads, in each layer. Every document is read by the adapter of its task.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=SMoRA(rank=4, active=2), prior=bp.Pooled()), data, epochs=1)
        >>> usage = rank_usage(fitted, data.test)
        >>> usage["q_proj"].shape, int(usage["q_proj"][0, 0].sum()) == 2 * int(data.test.lengths[data.test.task == 0].sum())
        (torch.Size([2, 4, 4]), True)

    Args:
        fitted: the fitted model.
        split: the documents.
        predicting: count only tokens after which something is predicted. Default: all tokens but padding.
        token_budget: tokens of a batch, padding included.

    Returns:
        (D, layers, experts) int64 by name of the slot.

    Raises:
        InputError: the adapter is not SMoRA.
    """
    model, weights = fitted.model, fitted.weights_of()
    adapter = model.adapter
    if not isinstance(adapter, SMoRA):
        raise InputError(f"{adapter} has no experts among which a token chooses; rank usage is that of smora")
    device = model.backbone.device
    counts = {
        slot.name: torch.zeros((model.num_tasks, slot.layers, adapter.experts), dtype=torch.int64, device=device)
        for slot in model.backbone.slots
    }
    for batch in split.batches(token_budget=token_budget):
        batch = batch.to(device)
        tasks, row = batch.task.unique(return_inverse=True)
        read = batch.attention_mask.bool()
        if predicting:
            read = torch.nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
        change = _counted(model, adapter, weights(tasks)[0], row, batch, read, counts)
        model.backbone.lazy_logits(batch.input_ids, change, layout=batch.layout)
    return counts


def _counted(
    model: BoRA, adapter: SMoRA, theta: Weights, row: Tensor, batch: Batch, read: Tensor, counts: dict[str, Tensor]
) -> Change:
    """The change of the layers, which also counts the experts of the tokens that it sees.

    Args:
        model: the model.
        adapter: its adapter.
        theta: the weights of the batch's tasks, (tasks, layers, *shape) by name.
        row: (rows,) position of each row's task in the weights.
        batch: the documents.
        read: (rows, tokens) bool, the tokens to count.
        counts: (D, layers, experts) by name of the slot; they change.
    """
    change = model.change(theta, row, batch.task)
    task = batch.task[:, None].expand_as(read)[read]  # of each token

    def counted(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
        latents = {name: theta[f"{slot.name}.{name}"][:, layer].index_select(0, row) for name in model.tensors.names(slot)}
        tensors = model.tensors.at_layer(slot, layer, latents, batch.task)
        chosen, _ = adapter.route(x, {name: value.to(x.device) for name, value in tensors.items()})
        chosen = chosen.to(read.device)[read]  # (tokens, chosen experts)
        place = (task[:, None].expand_as(chosen), chosen)
        counts[slot.name][:, layer].index_put_(place, torch.ones_like(chosen), accumulate=True)
        return change(slot, layer, x, output)

    return counted


def usage_information(usage: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mutual information of the expert and the task of a token, in nats: (layers,) float64 by name of the slot.

    It is 0 where all tasks use the experts alike, and the entropy of the tasks where each has experts of its own.

    Args:
        usage: as :func:`rank_usage` returns it.
    """
    found = {}
    for name, counts in usage.items():
        joint = counts.double() / counts.sum((0, 2), keepdim=True)
        apart = joint.sum(0, keepdim=True) * joint.sum(2, keepdim=True)
        found[name] = torch.where(joint > 0, joint * (joint / apart).log(), 0.0).sum((0, 2)).cpu()
    return found
