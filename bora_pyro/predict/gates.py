"""What the gates of a routed model say about the task of each token, and how often they are right.

>>> import bora_pyro as bp
>>> from bora_pyro.inference.route_fit import route_fit
>>> backbone = bp.Backbone.from_pretrained("builtin:nano", targets=["v_proj"])
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> routed = route_fit(bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1), data, epochs=3)
>>> found = read_gates(routed.model, routed.weights()[0], data.test)
>>> found.probabilities[0].shape[1], 0 <= found.accuracy <= 1, len(found.by_layer)
(2, True, 4)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights
from bora_pyro.routers import MeteoRA


@dataclass(frozen=True, eq=False)
class GateReadings:
    """The gates at every token of some texts.

    Attributes:
        probabilities: one for each text, (tokens, D) float32: the mean over layers of softmax(G x), of every token that is read.
        task: (texts,) int64, the task of each text.
        by_layer: by ``<slot>.<layer>``, the share of tokens at which the largest gate is that of the task of the text.
    """

    probabilities: list[Tensor]
    task: Tensor
    by_layer: dict[str, float]

    @property
    def accuracy(self) -> float:
        """The mean of ``by_layer``: how often a gate is right."""
        return sum(self.by_layer.values()) / len(self.by_layer)

    @property
    def joint_accuracy(self) -> float:
        """The share of tokens at which the task of the text has the largest of the ``probabilities``."""
        right = [p.argmax(1) == d for p, d in zip(self.probabilities, self.task, strict=True)]
        return float(torch.cat(right).double().mean())

    def numbers(self) -> dict[str, float]:
        """The accuracies for ``metrics.json``: of all gates, of the layers together, and of the worst and the best layer."""
        layers = self.by_layer.values()
        return {"accuracy": self.accuracy, "joint": self.joint_accuracy, "worst_layer": min(layers), "best_layer": max(layers)}


@torch.inference_mode()
def read_gates(model: BoRA, weights: Weights, split: TokenSplit, *, token_budget: int = 4096) -> GateReadings:
    """Read texts with a routed model, and keep what the gates say.

    Args:
        model: the routed model.
        weights: adapters and gates of all tasks, (D, layers, *shape) by name.
        split: the texts. Their tasks are only compared with the gates.
        token_budget: tokens of a forward pass, padding included.

    Raises:
        InputError: the model has no gates, or there is no text.
    """
    if not isinstance(model.router, MeteoRA):
        raise InputError(f"{model} has no gates; give a model that route_fit returns")
    if not len(split):
        raise InputError("there is no text to read the gates of; give one or more")
    probabilities, right, tokens = [torch.zeros(0)] * len(split), dict[str, float](), 0
    for batch in split.batches(token_budget=token_budget):
        on_device, gates = batch.to(model.backbone.device), dict[str, Tensor]()
        change = model.router.recorded_change(model, weights, gates)
        model.backbone.lazy_logits(on_device.input_ids, change, layout=on_device.layout)
        read = batch.attention_mask.bool()
        total = torch.zeros(1)
        for name, of_layer in gates.items():
            of_layer = of_layer.cpu()
            right[name] = right.get(name, 0.0) + float(((of_layer.argmax(-1) == batch.task[:, None]) & read).sum())
            total = total + of_layer.softmax(-1) / len(gates)
        for text, p, own in zip(batch.index.tolist(), total, read, strict=True):
            probabilities[text] = p[own]
        tokens += int(read.sum())
    return GateReadings(probabilities, split.task, {name: value / tokens for name, value in right.items()})
