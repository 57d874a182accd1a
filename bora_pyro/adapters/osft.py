"""OSFT (Nayak et al., 2025, arXiv 2504.07097): any adapter, without what it does to a weight's leading singular directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Adapter, Factors, ScaledAdapter
from bora_pyro.adapters.lora import RowLinear
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.options.members import build_member

LEFT, RIGHT = "osft_left", "osft_right"


@dataclass(frozen=True)
class OSFT(Adapter):
    """ΔW = (I − U_h U_hᵀ) ΔW_inner (I − V_h V_hᵀ), with the k leading singular vectors U_h and V_h of W_full.

        >>> adapter, slot = OSFT(preserve=0.25, rank=2), Slot("q_proj", ("q_proj",), 16, 32)
        >>> weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        >>> start = adapter.start(slot, lambda: weight, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in (start.latents | start.fixed).items()}
        {'lora_A': (2, 16), 'lora_B': (32, 2), 'osft_left': (4, 32), 'osft_right': (4, 16)}
        >>> delta = adapter.delta({"lora_A": torch.ones(2, 16), "lora_B": torch.ones(32, 2)} | start.fixed)
        >>> bool(torch.linalg.svd(weight).U[:, :4].T.matmul(delta).abs().max() < 1e-5)
        True

    U_hᵀ ΔW = 0 and ΔW V_h = 0 hold for all values of the latents, thus for any optimiser and any draw of a posterior. The leading
    singular triplets of W_full stay those of W_full + ΔW as long as ΔW is smaller than they are. The released code and PEFT
    project the gradients instead, and AdamW's steps leave the space of projected gradients. Their projection, as the one here, is
    on both sides; the paper's formula G − U_h U_hᵀ G V_h V_hᵀ would remove only the part between leading directions. They train
    the remaining singular triplets; here the inner adapter says what is trained, and it keeps its prior.

    ``soft`` scales the change along the leading directions down instead of removing it: along the i-th one by σ_{k+1}/σ_i on each
    side. If ΔW_inner has a Normal prior with independent entries, this is the same Normal with a standard deviation that falls
    with σ_i (in the basis of singular vectors). The adapter does this because a prior does not know the frozen weights. The paper
    has no such option.

    The paper preserves, of each layer, the fraction least + I (most − least) of its min(out, in) directions, where the importance
    I has the mean 1 (:func:`layer_importance`). Without ``importance`` the fraction is ``preserve`` for all layers, as in PEFT.

    The singular vectors are fixed tensors of k (out + in) numbers a layer. With half of the directions of a square layer they
    are as large as its weight. The projection of the matrices of a LoRA costs little. An inner adapter without LoRA's form is
    projected through its inputs and outputs, which costs two more products of that size per token.

    Args:
        preserve: the fraction of the min(out, in) singular directions that is preserved, from 0 (the inner adapter) to 1 (no
            change at all). The number k is rounded down.
        soft: scale the change along the preserved directions down, and do not remove it.
        inner: the inner adapter, or its name.
        inner_options: the options of an inner adapter that is given by its name: ``key=value``, with commas between them.
        rank: rank of an inner adapter that is given by its name and has one.
        alpha: its α.
        importance: I of layers by their paths, for the paper's number of directions; a layer without one has I = 1. It takes the
            place of ``preserve``.
        least: the fraction that is preserved at I = 0 (the paper's mrr).
        most: the fraction that is preserved at I = 1 (the paper's trr).

    Raises:
        InputError: a value is not allowed, or (from ``start``) ``preserve`` is above 0 and too small for a layer.
    """

    preserve: float = 0.5
    soft: bool = False
    inner: str | Adapter = "lora"
    inner_options: str = ""
    rank: int = 8
    alpha: float | None = None
    importance: Mapping[str, float] | None = None
    least: float = 0.1
    most: float = 0.8
    wrapped: Adapter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("preserve", "least", "most"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; give a number from 0 to 1, nearest: {1 if value > 1 else 0}")
        if self.least > self.most:
            raise InputError(f"least is {self.least} and most is {self.most}; give least <= most")
        wrapped = self.inner if isinstance(self.inner, Adapter) else self._named(self.inner)
        object.__setattr__(self, "wrapped", wrapped)
        object.__setattr__(self, "shared", wrapped.shared)

    def _named(self, name: str) -> Adapter:
        # not at the top: the registry lists this adapter too
        from bora_pyro.adapters import ADAPTERS

        others = {other: kind for other, kind in ADAPTERS.items() if kind is not OSFT}
        options = [option.strip() for option in self.inner_options.split(",") if option.strip()]
        return build_member("inner", others, name, options, usual={"rank": self.rank, "alpha": self.alpha})

    def preserved(self, slot: Slot) -> int:
        """k, the number of preserved directions of a layer.

        Raises:
            InputError: the fraction is above 0 and gives none.
        """
        most = min(slot.out_features, slot.in_features)
        if self.importance is not None:
            fraction = self.least + self.importance.get(slot.paths[0], 1.0) * (self.most - self.least)
            return max(0, min(most, int(fraction * most)))
        k = int(self.preserve * most + 1e-9)
        if self.preserve and not k:
            raise InputError(
                f"preserve {self.preserve:g} preserves no direction of layer {slot.name} ({slot.out_features} x "
                f"{slot.in_features}); give at least {1 / most:.3g}, or 0"
            )
        return k

    def for_tasks(self, tasks: Sequence[str] | None) -> OSFT:
        inner = self.wrapped.for_tasks(tasks)
        return self if inner is self.wrapped else replace(self, inner=inner, inner_options="")

    def check(self, slots: Sequence[Slot], num_tasks: int) -> None:
        self.wrapped.check(slots, num_tasks)

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        inner, k = self.wrapped.start(slot, weight, generator), self.preserved(slot)
        left, values, right = torch.linalg.svd(weight(), full_matrices=False)
        left, right = left[:, :k].mT, right[:k]
        if k:  # a decomposition gives each pair of vectors up to its sign, and a run is known again by its fixed tensors
            sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
            left, right = sign * left, sign * right
        if self.soft and k:
            after = values[k] if k < len(values) else values.new_zeros(())
            # I − Q Qᵀ scales the direction i by 1 − (1 − s_i) = s_i
            removed = (1 - after / values[:k].clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0).sqrt()[:, None]
            left, right = removed * left, removed * right
        own = {LEFT: left.contiguous(), RIGHT: right.contiguous()}
        return Start(inner.latents, fixed=inner.fixed | own, buffers=inner.buffers, masks=inner.masks)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        inner = self.wrapped.delta(tensors)
        return None if inner is None else _project(_project(inner, tensors[RIGHT]).mT, tensors[LEFT]).mT

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        inner = self.wrapped.factors(tensors)
        if inner is None:
            return None
        b = _project(inner.lora_B.mT, tensors[LEFT]).mT
        return Factors(_project(inner.lora_A, tensors[RIGHT]), b, inner.alpha)

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.soft:
            return super().from_factors(factors, fixed)
        for name, matrix, rows in (("A", factors.lora_A, fixed[RIGHT]), ("B", factors.lora_B.mT, fixed[LEFT])):
            if (matrix @ rows.mT).norm() > 1e-4 * matrix.norm():
                raise InputError(
                    f"the {name} of these matrices changes the directions that {self} preserves; read them as plain LoRA"
                )
        return self.wrapped.from_factors(factors, fixed)

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        factors = self.factors(tensors)
        if factors is not None:
            inner = RowLinear.apply(x, factors.lora_A.to(x.dtype))
            return inner @ (factors.scaling * factors.lora_B).to(x.dtype).mT
        left, right = tensors[LEFT].to(x.dtype), tensors[RIGHT].to(x.dtype)
        return _project(self.wrapped.output(_project(x, right), tensors), left)

    def log_factor(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.wrapped.log_factor(tensors)

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        left, right = tensors[LEFT].to(x.dtype), tensors[RIGHT].to(x.dtype)
        return self.wrapped.linear_maps(_project(x, right), _project(gradient, left), tensors)

    def kept_per_token(self, slot: Slot) -> int:
        return self.wrapped.kept_per_token(slot)

    def kept_per_row(self, slot: Slot) -> int:
        projected = self.wrapped.rank * (slot.in_features + slot.out_features) if isinstance(self.wrapped, ScaledAdapter) else 0
        return self.wrapped.kept_per_row(slot) + projected

    def callbacks(self) -> Sequence[Any]:
        return self.wrapped.callbacks()


def _project(x: Tensor, rows: Tensor) -> Tensor:
    """x (I − Rᵀ R) for rows R (k, n) and x (..., n)."""
    return x - (x @ rows.mT) @ rows


@torch.no_grad()
def layer_importance(backbone: Backbone, split: TokenSplit, *, token_budget: int = 4096) -> dict[str, float]:
    """The paper's importance I of the adapted layers by path: the mean cosine of a layer's input and output, divided by its mean.

        >>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "fc1"])
        >>> split = TokenSplit.from_documents([[0, 5, 6, 9], [0, 7]], task=[0, 0], num_tasks=1)
        >>> found = layer_importance(backbone, split)
        >>> len(found), round(sum(found.values()) / len(found), 4)
        (8, 1.0)

    The paper takes the documents of the previous task. It does not tell what holds for a layer whose input and output have
    different sizes; such a layer has I = 1 here. A mean cosine below 0 counts as 0.

    Args:
        backbone: the frozen model.
        split: documents.
        token_budget: tokens of a batch, padding included.
    """
    sums: dict[str, float] = {}
    tokens = 0
    for batch in split.batches(token_budget=token_budget):
        batch = batch.to(backbone.device)
        read = batch.attention_mask.bool()
        tokens += int(read.sum())

        def change(slot: Slot, layer: int, x: Tensor, output: Tensor, read: Tensor = read) -> Tensor:
            if slot.in_features == slot.out_features:
                cosine = torch.cosine_similarity(x.float(), output.float(), dim=-1)
                path = slot.paths[layer]
                sums[path] = sums.get(path, 0.0) + float(cosine[read.to(cosine.device)].sum())
            return output

        backbone.logits(batch.input_ids, change, layout=batch.layout)
    means = {path: max(0.0, value / max(1, tokens)) for path, value in sums.items()}
    average = sum(means.values()) / len(means) if means else 0.0
    own = {path: value / average if average else 1.0 for path, value in means.items()}
    return {path: own.get(path, 1.0) for slot in backbone.slots for path in slot.paths}
