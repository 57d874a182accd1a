"""The memory that the layers of a base need for a token: by a formula for attention, measured for other layers.

>>> import bora_pyro as bp
>>> layers = layers_of(bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2)))
>>> layers.kept(checkpointing=True) < layers.kept(checkpointing=False)
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro.backbone.configuration import Widths, widths_of
from bora_pyro.model import BoRA

FLOAT = 4  # bytes: adapters, gradients, optimiser and likelihood are float32 for any base
#: Tokens of the text by which layers are measured. State spaces work in chunks of up to 256 tokens.
MEASURED_TOKENS = 256


class Layers(Protocol):
    """Bytes per token that the layers of a base need."""

    @property
    def number(self) -> int:
        """The number of decoder layers."""

    def layer(self) -> int:
        """Bytes per token that one layer keeps for its backward pass."""

    def kept(self, *, checkpointing: bool) -> int:
        """Bytes per token that all layers keep."""

    def scratch(self) -> int:
        """Bytes per token that a layer needs while it runs, besides the memory that it keeps."""


def layers_of(model: BoRA) -> Layers:
    """The memory of the layers of a model's base.

    The formula needs layers of one kind, with attention and one feed-forward layer, as the configuration describes them. Mixtures
    of experts, state spaces and layers of different widths are measured on a short text.
    """
    base = model.backbone.model
    widths = widths_of(base.config)
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = [pair for block in blocks for pair in block.named_modules()]
    if widths is None or any(isinstance(module, nn.Conv1d) or "experts" in path.split(".") for path, module in inside):
        return _MeasuredLayers.of(model, len(blocks))
    return _Layers.of(model, widths, blocks)


@dataclass(frozen=True)
class _Layers:
    """The widths of a decoder layer and the memory that it keeps per token: the symbols of `estimate_memory`."""

    number: int
    hidden: int
    queries: int
    keys: int
    inner: int
    inner_kept: int  # kept by the activation and the gate, in units of f
    adapted_inputs: int  # numbers of normed or gated inputs that are kept only for the adapters
    ranks: int  # sum over all adapted layers of a block
    bytes: int
    norm_bytes: int

    @classmethod
    def of(cls, model: BoRA, widths: Widths, blocks: list[GradientCheckpointingLayer]) -> _Layers:
        base = model.backbone.model
        number, hidden, inner, activation = max(len(blocks), 1), widths.hidden, widths.inner, widths.activation
        linear = [m for m in (blocks[0].modules() if blocks else ()) if isinstance(m, nn.Linear)]
        gated = sum((m.in_features, m.out_features) == (hidden, inner) for m in linear) > 1
        kept = (4 if activation == "gelu_new" else 1) + (2 if gated else 0)
        adapted = {"attention": 0, "up": 0, "down": 0}
        rank = sum(model.adapter.kept_per_token(slot) * slot.layers for slot in model.backbone.slots) / number
        for slot in model.backbone.slots:
            if slot.in_features == inner != hidden:
                # ReLU already keeps its output, which is the next layer's input
                adapted["down"] = 0 if activation == "relu" and not gated else inner
            elif slot.out_features == inner != hidden:
                adapted["up"] = hidden
            elif not any(end in slot.name for end in ("o_proj", "out_proj", "c_proj", "dense")):
                adapted["attention"] = hidden
        itemsize = base.get_input_embeddings().weight.element_size()
        plain = any(isinstance(m, nn.LayerNorm) for m in base.modules())
        return cls(
            number=number,
            hidden=hidden,
            queries=widths.queries,
            keys=widths.keys,
            inner=inner,
            inner_kept=kept,
            adapted_inputs=sum(adapted.values()),
            ranks=round(rank),
            bytes=itemsize,
            norm_bytes=itemsize if plain else FLOAT,
        )

    def layer(self) -> int:
        """Bytes per token that one layer keeps for its backward pass."""
        numbers = 2 * self.queries + 2 * self.keys + self.inner_kept * self.inner + self.adapted_inputs + self.ranks
        return 2 * self.hidden * self.norm_bytes + numbers * self.bytes

    def kept(self, *, checkpointing: bool) -> int:
        """Bytes per token that all layers keep."""
        # the embedding, the last norm, the observed states, their gradient, and two copies of that gradient
        ends = 6 * self.hidden * self.bytes
        if not checkpointing:
            return ends + self.number * self.layer()
        return ends + self.number * self.hidden * self.bytes

    def scratch(self) -> int:
        """Bytes per token that a layer needs while it runs, besides the memory that it keeps."""
        return (3 * self.hidden + 2 * self.inner) * self.bytes


@dataclass(frozen=True)
class _MeasuredLayers:
    """What the layers keep for a token, measured."""

    number: int
    hidden: int
    bytes: int
    measured: int  # bytes per token of all layers

    @classmethod
    def of(cls, model: BoRA, number: int) -> _MeasuredLayers:
        backbone = model.backbone
        tokens = min(MEASURED_TOKENS, backbone.context or MEASURED_TOKENS)
        ids = torch.arange(tokens, device=backbone.device)[None] % backbone.num_token_ids
        row = torch.zeros(1, dtype=torch.int64, device=backbone.device)
        weights = {name: start[None].detach().clone().requires_grad_() for name, start in model.starts.items()}
        own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.model.parameters(), *weights.values())}
        kept: dict[int, int] = {}
        held: list[Tensor] = []  # a freed storage would give its address to another one

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.shape[-1:] != (backbone.num_token_ids,):
                kept[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        checkpointing, backbone.gradient_checkpointing = backbone.gradient_checkpointing, False
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                backbone.lazy_logits(ids, model.change(weights, row))
        finally:
            backbone.gradient_checkpointing = checkpointing
        embedding = backbone.model.get_input_embeddings().weight
        return cls(max(number, 1), embedding.shape[1], embedding.element_size(), sum(kept.values()) // tokens)

    def layer(self) -> int:
        return self.measured // self.number

    def kept(self, *, checkpointing: bool) -> int:
        layers = self.number * self.hidden * self.bytes if checkpointing else self.measured
        return 6 * self.hidden * self.bytes + layers

    def scratch(self) -> int:
        return self.layer()
