"""LoRA with dropout on its input: LoRA's own regulariser, and with masks at prediction MC dropout (Gal and Ghahramani, 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class DropoutLoRA(LoRA):
    """y + (α/r) B A (x ⊙ m/(1 − p)), where each entry of the mask m is 0 with probability p and 1 otherwise.

        >>> import pyro, torch
        >>> x, a, b = torch.ones(1, 1, 1000), torch.ones(1, 1, 1000), torch.ones(1, 1, 1)
        >>> adapter = DropoutLoRA(rank=1, dropout=0.5)
        >>> adapter.output(x, {"lora_A": a, "lora_B": b}).item()  # a prediction
        1000.0
        >>> with pyro.poutine.seed(rng_seed=0):  # a step of a fit: 2 for each entry that is kept
        ...     adapter.output(x, {"lora_A": a, "lora_B": b.requires_grad_()}).detach().item() / 2 in range(450, 550)
        True

    Each token, layer and pass has its own mask, as in Hu et al. (2022). Masks are drawn where gradients of the adapter are taken:
    in the steps of a fit, and where gradients of single documents are, for a learned τ or a curvature. Predictions have none,
    unless ``always`` is true. A draw of MC dropout is then one more pass with the same weights: the model predicts with the mean
    of some passes. The masks come from torch's generator, which a fit seeds for each step (``pyro.poutine.seed``). The folders of
    PEFT and everything else that reads the weights have those of plain LoRA.

    Args:
        rank: r, at least 1.
        alpha: α; default: the rank.
        dropout: p, from 0 to below 1.
        always: whether predictions have masks too.

    Raises:
        InputError: p is out of range, or as for ``LoRA``.
    """

    dropout: float = 0.1
    always: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; give a probability from 0 (no dropout) to below 1")

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().output(self._thinned(x, tensors), tensors)

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().add(output, self._thinned(x, tensors), tensors)

    def _thinned(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        # not torch.is_grad_enabled(): a prediction outside torch.no_grad() is still a prediction
        return F.dropout(x, self.dropout, training=self.always or tensors["lora_B"].requires_grad)

    def kept_per_token(self, slot: Slot) -> int:
        return super().kept_per_token(slot) + 2 * slot.in_features  # the mask, and the input without the dropped entries
