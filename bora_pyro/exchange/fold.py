"""Fold several adapters of one layer structure into one: the mean of their ΔW, exact or cut to a lower rank.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> from bora_pyro.exchange.factors import lora_form
>>> draw = torch.Generator().manual_seed(0)
>>> fits = [{name: torch.randn(value.shape, generator=draw) for name, value in model.starts.items()} for _ in range(3)]
>>> forms = [lora_form(model, weights) for weights in fits]
>>> exact, short = mean_form(forms), mean_form(forms, rank=2)
>>> exact.rank, exact.alpha, exact.relative_error
(6, 2.0, 0.0)
>>> short.rank, 0 < short.relative_error < 1
(2, True)

The mean of K changes of rank r is a change of rank K r: the matrices of all are put side by side. The means of A and of B give
another change: (B, A) and (B G⁻¹, G A) have the same ΔW, but other means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import LoraForm
from bora_pyro.model import BoRA, Weights


def mean_form(forms: Sequence[LoraForm], *, rank: int | None = None) -> LoraForm:
    """The mean of the ΔW of several adapters as LoRA matrices.

    With [A_1; ...; A_K] and [B_1, ..., B_K], and the scale α/r of the first divided by K, the mean is exact. If all adapters have
    one rank r and one α, the result has the rank K r and the same α.

    Args:
        forms: the adapters, with the same layers.
        rank: the largest rank of the result. If it is lower than the exact one, each layer is cut to it by the singular value
            decomposition of the product, which is computed from the factors alone. The scale α/r is then 1. None: exact.

    Returns:
        The matrices. ``relative_error`` is ‖mean − (α/r) B A‖ / ‖mean‖ over all layers of the cut; 0 if nothing is cut.

    Raises:
        InputError: the adapters have different layers, or the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}; give a whole number from 1 up, or leave it out for the exact mean")
    first = forms[0]
    for form in forms:
        if form.factors.keys() != first.factors.keys():
            path = min(form.factors.keys() ^ first.factors.keys())
            raise InputError(f"only some of the adapters change {path!r}; fold adapters with the same targets")
    scale, exact = first.alpha / first.rank, sum(form.rank for form in forms)
    factors = {
        path: {
            "lora_A": torch.cat([form.factors[path]["lora_A"] for form in forms]),
            "lora_B": torch.cat([_scaled(form, form.factors[path]["lora_B"], scale) for form in forms], 1),
        }
        for path in first.factors
    }
    if rank is None or rank >= exact:
        return LoraForm(factors, scale * exact / len(forms))
    lost = total = 0.0
    for path, of_layer in factors.items():
        factors[path], left, whole = _cut(of_layer["lora_A"], of_layer["lora_B"], scale / len(forms), rank)
        lost, total = lost + left, total + whole
    return LoraForm(factors, float(rank), math.sqrt(lost / total) if total else 0.0)


def _scaled(form: LoraForm, b: Tensor, scale: float) -> Tensor:
    own = form.alpha / form.rank
    return b if own == scale else b * (own / scale)


def _cut(a: Tensor, b: Tensor, scale: float, rank: int) -> tuple[dict[str, Tensor], float, float]:
    """The best approximation of ``scale`` B A of a rank, and the squared norms of the rest and of the whole.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the singular values of B A are those of R_b R_aᵀ, which is as small as the rank of A.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    left, values, right = torch.linalg.svd(scale * r_b @ r_a.mT, full_matrices=False)
    root = values[:rank].sqrt()
    short = {"lora_A": (root[:, None] * right[:rank]) @ q_a.mT, "lora_B": q_b @ (left[:, :rank] * root)}
    more = rank - len(root)  # of a layer that is narrower than the rank
    short = {"lora_A": F.pad(short["lora_A"], (0, 0, 0, more)), "lora_B": F.pad(short["lora_B"], (0, more))}
    squares = values.square()
    return {name: value.to(a.dtype) for name, value in short.items()}, float(squares[rank:].sum()), float(squares.sum())


def stacked(model: BoRA, forms: Sequence[LoraForm]) -> Weights:
    """The LoRA matrices of several tasks as weights of a model with the adapter ``LoRA``: (tasks, layers, *shape) by name."""
    weights: Weights = {}
    for slot in model.backbone.slots:
        for name in ("lora_A", "lora_B"):
            rows = [torch.stack([form.factors[path][name] for path in slot.paths]) for form in forms]
            weights[f"{slot.name}.{name}"] = torch.stack(rows).to(model.backbone.device)
    return weights
