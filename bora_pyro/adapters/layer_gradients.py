"""The gradient of the loss with respect to the weights of the adapted layers, for adapters that begin along it.

>>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj"])
>>> split = TokenSplit.from_documents([[0, 5, 6, 9], [0, 7]], task=[0, 0], num_tasks=1)
>>> {path: tuple(value.shape) for path, value in list(layer_gradients(backbone, split).items())[:1]}
{'model.decoder.layers.0.self_attn.q_proj': (256, 256)}
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.batch import IGNORED
from bora_pyro.data.token_split import TokenSplit


def layer_gradients(backbone: Backbone, split: TokenSplit, *, token_budget: int = 4096) -> dict[str, Tensor]:
    """The gradient of the mean negative log-likelihood of a token, by path of the layer: (out, in) float32, on the CPU.

    All documents count, whatever their task. The frozen weights have no gradients of their own; these are those of a change ΔW
    at 0.

    Args:
        backbone: the frozen model.
        split: documents.
        token_budget: tokens of a batch, padding included.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch in split.batches(token_budget=token_budget):
        batch = batch.to(backbone.device)
        deltas: dict[str, Tensor] = {}

        def change(slot: Slot, layer: int, x: Tensor, output: Tensor, deltas: dict[str, Tensor] = deltas) -> Tensor:
            shape = (slot.out_features, slot.in_features)
            delta = deltas[slot.paths[layer]] = torch.zeros(shape, device=x.device, requires_grad=True)
            return output + x @ delta.to(x.dtype).mT

        with torch.enable_grad():
            logits = backbone.logits(batch.input_ids, change, layout=batch.layout)
            labels = batch.labels[:, 1:]
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            gradients = torch.autograd.grad(loss, list(deltas.values()), allow_unused=True, materialize_grads=True)
        tokens += int((labels != IGNORED).sum())
        for path, gradient in zip(deltas, gradients, strict=True):
            sums[path] = sums[path] + gradient.cpu() if path in sums else gradient.cpu()
    return {path: value / max(1, tokens) for path, value in sums.items()}
