"""The change of each layer as LoRA matrices: exact, or the best approximation of a given rank.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> found = lora_form(model, model.starts)
>>> found.rank, found.alpha, found.relative_error
(2, 2.0, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from bora_pyro.adapters import Adapter, Factors
from bora_pyro.adapters.gives_change import gives_change
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA
from bora_pyro.routers import ByTask

#: The rank of the approximation if a change has no exact LoRA form. Servers accept this rank in their default settings.
EXPORT_RANK = 16


@dataclass(frozen=True)
class LoraForm:
    """The change of every adapted layer as LoRA matrices. All layers have the same rank and scale.

    Attributes:
        factors: ``lora_A`` (r, in) and ``lora_B`` (out, r) by the path of the layer.
        alpha: α; a layer changes by (α/r) B A.
        relative_error: ‖ΔW − (α/r) B A‖ / ‖ΔW‖ over all layers; 0 if the form is exact.
    """

    factors: dict[str, dict[str, Tensor]]
    alpha: float
    relative_error: float = 0.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return next(iter(self.factors.values()))["lora_A"].shape[-2]

    def without_zeros(self) -> LoraForm:
        """The same change and scale without the directions that are zero in A and in B of every layer; one of them stays.

        >>> a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]])
        >>> form = LoraForm({"fc": {"lora_A": a, "lora_B": b}}, alpha=9.0).without_zeros()
        >>> form.rank, form.alpha
        (2, 6.0)
        """
        used = torch.stack([(of["lora_A"] != 0).any(1) | (of["lora_B"] != 0).any(0) for of in self.factors.values()]).any(0)
        if used.all():
            return self
        used[0] |= not used.any()
        factors = {path: {"lora_A": of["lora_A"][used], "lora_B": of["lora_B"][:, used]} for path, of in self.factors.items()}
        return LoraForm(factors, float(Fraction(self.alpha) * int(used.sum()) / self.rank), self.relative_error)

    def with_rank(self, ranks: Sequence[int]) -> LoraForm:
        """The same change with scale 1 and the least of these ranks that is large enough. Rows and columns of zeros fill it up.

            >>> form = LoraForm({"fc": {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}}, alpha=6.0)
            >>> other = form.with_rank([8, 16])
            >>> matrices = other.factors["fc"]
            >>> other.rank, other.alpha, torch.equal(matrices["lora_B"] @ matrices["lora_A"], torch.full((4, 3), 6.0))
            (8, 8.0, True)

        Args:
            ranks: the allowed ranks.

        Raises:
            InputError: the rank is larger than all of these.
        """
        rank = min((r for r in ranks if r >= self.rank), default=0)
        if not rank:
            raise InputError(f"the rank {self.rank} is too large; the largest allowed rank is {max(ranks)}")
        more, scale = rank - self.rank, self.alpha / self.rank
        factors = {
            path: {"lora_A": F.pad(of["lora_A"], (0, 0, 0, more)), "lora_B": F.pad(scale * of["lora_B"], (0, more))}
            for path, of in self.factors.items()
        }
        return LoraForm(factors, float(rank), self.relative_error)


def lora_form(model: BoRA, weights: Mapping[str, Tensor], *, task: int | None = None, rank: int = EXPORT_RANK) -> LoraForm:
    """The adapter of one task, or Θ, as LoRA matrices.

    Args:
        model: the model that the weights belong to.
        weights: latents by name, (layers, *shape) each.
        task: index of the task, needed if tasks have masks of their own; None: Θ.
        rank: rank of the approximation of a change that has no exact LoRA form.

    Raises:
        InputError: the adapter gives no ΔW, or the router is not :class:`ByTask`.
    """
    exact, deltas = _changes(model, weights, task)
    if not deltas:
        alphas = {path: of_layer.alpha / of_layer.rank for path, of_layer in exact.items()}
        if len(set(alphas.values())) == 1 and len({of_layer.rank for of_layer in exact.values()}) == 1:
            factors = {path: {"lora_A": f.lora_A, "lora_B": f.lora_B} for path, f in exact.items()}
            return LoraForm(factors, next(iter(exact.values())).alpha)
    parts, lost, total = {}, 0.0, 0.0
    for path, of_layer in exact.items():  # ranks or scales differ: put the scale into B
        parts[path] = (of_layer.lora_A, of_layer.scaling * of_layer.lora_B)
        total += float(of_layer.delta().double().square().sum())
    for path, delta in deltas.items():
        parts[path] = cut(delta, rank)
        a, b = parts[path]
        lost += float((delta.double() - b.double() @ a.double()).square().sum())
        total += float(delta.double().square().sum())
    r = max(len(a) for a, _ in parts.values())
    # pad with zeros, which change nothing, so that all layers have the same rank
    padded = {
        path: {"lora_A": F.pad(a, (0, 0, 0, r - len(a))), "lora_B": F.pad(b, (0, r - len(a)))} for path, (a, b) in parts.items()
    }
    return LoraForm(padded, float(r), math.sqrt(lost / total) if total else 0.0)


def layer_deltas(model: BoRA, weights: Mapping[str, Tensor], *, task: int | None = None) -> dict[str, Tensor]:
    """ΔW of every adapted layer, (out, in) by the path of the layer, for one task's weights or Θ.

    Raises:
        InputError: as for :func:`lora_form`.
    """
    exact, deltas = _changes(model, weights, task)
    return {path: of_layer.delta() for path, of_layer in exact.items()} | deltas


def check_gives_change(adapter: Adapter, backbone: Backbone) -> None:
    """Check before long work that an adapter gives a ΔW, without which nothing can be exported or merged.

    >>> import bora_pyro as bp
    >>> check_gives_change(bp.LoRA(rank=2), bp.Backbone.from_pretrained("builtin:nano"))

    Raises:
        InputError: it gives none (:func:`~bora_pyro.adapters.gives_change.gives_change`).
    """
    if not gives_change(adapter, backbone):
        raise _no_change(adapter)


def _no_change(adapter: Adapter) -> InputError:
    return InputError(f"{adapter} cannot be written as LoRA matrices, because it gives no ΔW; use the run itself")


def cut(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) such that B A is the best approximation of ΔW of rank r.

    It keeps the r largest singular values (Eckart and Young).

    >>> a, b = cut(torch.diag(torch.tensor([4.0, 1.0])), 1)
    >>> (b @ a).abs().tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    r = min(rank, len(values))
    root = values[:r].sqrt()
    return root[:, None] * right[:r], left[:, :r] * root


def _changes(model: BoRA, weights: Mapping[str, Tensor], task: int | None) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The exact factors by path, and ΔW of the layers that have none."""
    if not isinstance(model.router, ByTask):
        raise InputError(
            f"adapters cannot be exported from {model.router}: which of them is used depends on the token; use the run itself"
        )
    exact: dict[str, Factors] = {}
    deltas: dict[str, Tensor] = {}
    of_task = None if task is None else torch.tensor([task])
    for slot in model.backbone.slots:
        for layer, path in enumerate(slot.paths):
            latents = {name: weights[f"{slot.name}.{name}"][layer][None] for name in model.tensors.names(slot)}
            tensors = model.tensors.at_layer(slot, layer, latents, of_task)
            tensors |= {name: tensors[name][0] for name in latents}
            if (factors := model.adapter.factors(tensors)) is not None:
                exact[path] = factors
            elif (delta := model.adapter.delta(tensors)) is not None:
                deltas[path] = delta
            else:
                raise InputError(
                    f"{model.adapter} cannot be written as LoRA matrices, because it gives no ΔW; use the run itself"
                )
    return exact, deltas
