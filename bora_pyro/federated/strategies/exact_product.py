"""The mean of the clients' changes B A, cut to the rank by a singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bora_pyro.federated.aggregate import Tensors
from bora_pyro.federated.strategies.base import Strategy, check_latents, check_pooled
from bora_pyro.model import BoRA

# Singular values below this part of the largest one are rounding.
_ROUNDING = 1e-6


class ExactProduct(Strategy):
    """The server averages the products B_k A_k, and cuts the mean to LoRA's rank r by its r largest singular values.

        >>> A, B = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0], [0.0]]])
        >>> values = {"q.lora_A": A, "q.lora_B": B}
        >>> merged = ExactProduct().merged(ExactProduct().averaged(values), values)
        >>> torch.allclose(merged["q.lora_B"] @ merged["q.lora_A"], B @ A)
        True

    The mean of K products has rank up to K r. The cut is the best approximation of rank r (Eckart & Young, 1936); ``lost`` has
    what it leaves out. The factors are balanced, A = √S Vᵀ and B = U √S.

    Decided here: where the mean has fewer than r directions, the rows of A have the length of those before, and the columns of B
    are 0. With zeros in both, neither would have a gradient again. A mean product needs the memory of the whole weight of each
    layer at the server.
    """

    def check(self, model: BoRA) -> None:
        check_pooled(self, model)
        check_latents(self, model, {"lora_A", "lora_B"}, "give LoRA() (--adapter lora)")

    def averaged(self, values: Mapping[str, Tensor]) -> Tensors:
        """B A of each layer: (layers, out, in) float64 by slot."""
        slots = [name.removesuffix(".lora_A") for name in values if name.endswith(".lora_A")]
        return {slot: values[f"{slot}.lora_B"].double() @ values[f"{slot}.lora_A"].double() for slot in slots}

    def merged(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensors:
        found: Tensors = {}
        for slot, product in mean.items():
            rank = before[f"{slot}.lora_A"].shape[-2]
            u, s, vh = torch.linalg.svd(product, full_matrices=False)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
            used = s > _ROUNDING * s[..., :1].clamp(min=torch.finfo(torch.float32).tiny)
            usual = before[f"{slot}.lora_A"].double().norm(dim=-1).mean(-1, keepdim=True)
            scale = torch.where(used, s.sqrt(), usual.clamp(min=_ROUNDING))
            like = before[f"{slot}.lora_A"]
            found[f"{slot}.lora_A"] = (scale[..., None] * vh).to(like.dtype)
            found[f"{slot}.lora_B"] = (u * torch.where(used, s / scale, 0.0)[..., None, :]).to(like.dtype)
        # in the order of the latents
        return {name: found[name] for name in before}

    def lost(self, mean: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> float:
        """‖mean − B A‖ / ‖mean‖ over all layers: what the cut to the rank leaves out, from 0 to 1."""
        products = self.averaged(merged)
        rest = sum(float((mean[slot] - products[slot]).square().sum()) for slot in mean)
        whole = sum(float(value.square().sum()) for value in mean.values())
        return (rest / whole) ** 0.5 if whole else 0.0
