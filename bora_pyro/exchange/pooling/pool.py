"""Independently trained LoRA adapters under one hierarchy: their Θ and τ, and each of them shrunk towards Θ, nothing retrained.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import bora_pyro as bp
    >>> from bora_pyro.exchange.pooling.hierarchy import MarginalLikelihood
    >>> from bora_pyro.exchange.load import read_peft
    >>> backbone, adapters = bp.Backbone.from_pretrained("builtin:nano"), {}
    >>> for seed, task in enumerate(["ada", "bo", "cleo"]):
    ...     model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed)  # each with a start of its own
    ...     with tempfile.TemporaryDirectory() as folder:
    ...         _ = bp.save_peft(Path(folder), model, {name: value + 0.01 for name, value in model.starts.items()})
    ...         adapters[task] = read_peft(folder)
    >>> pooled = pool(adapters, backbone, MarginalLikelihood([10, 40, 160]))
    >>> list(pooled.groups), pooled.frames["q_proj"]
    (['v_proj', 'q_proj'], [6, 6, 6, 6])

LoRA's factors have a gauge: (B, A) and (B G⁻¹, G A) are the same ΔW, and adapters that started from different A stand in
different gauges, so that the mean of their B and of their A is the mean of nothing. They are therefore brought into one frame
first. With V (in, R) an orthonormal basis of the union of the row spaces of all A_d in a layer, every task's change is

    ΔW_d = B'_d Vᵀ,  B'_d = (α/r) B_d A_d V  (out, R),

exactly, whatever its gauge, and the hierarchical Normal is put on B'_d: an isotropic one on ΔW within that subspace, which does
not depend on the choice of the basis. Shrinkage is then linear in ΔW, and the result is cut back to a low rank by its singular
values. Adapters of a common start, as BoRA's own, can also be pooled entry by entry of A and B (``space="weights"``), where
nothing is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.diagnostics.deviations import SPACES
from bora_pyro.errors import InputError, nearest
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.pooling.hierarchy import Estimator, Hierarchy, centred
from bora_pyro.exchange.save import LayerFactors

FULL = "full"
# A direction of the frame below this share of the largest is float32's rounding of the others.
_RANK_TOLERANCE = 1e-5


@dataclass(eq=False)
class Pooled:
    """What :func:`pool` makes of a set of adapters.

    Attributes:
        backbone: the base.
        tasks: names, in the order of the estimates.
        adapters: the adapters as they were given, by task.
        groups: what was found, by group: a kind of layer, or in the space of the weights a kind of layer and a factor.
        frames: R of each layer, by kind of layer; empty in the space of the weights.
        factors: the shrunk adapters by task, all of one rank.
        mean: Θ in the same form.
        alpha: α of both; a layer changes by (α/r) B A.
        distances: ‖ΔW_d − ΔW_Θ‖ over all layers as given, and after shrinkage, before it is cut to its rank: (D,) each. In the
            space of the weights ‖θ_d − Θ‖.
        lost: relative Frobenius error of cutting each shrunk adapter to its rank, over all layers, (D,); ``mean_lost`` that of Θ.
    """

    backbone: Backbone
    tasks: list[str]
    adapters: dict[str, PeftAdapter]
    groups: dict[str, Hierarchy]
    frames: dict[str, list[int]]
    factors: dict[str, LayerFactors]
    mean: LayerFactors
    alpha: float
    distances: tuple[Tensor, Tensor]
    lost: Tensor
    mean_lost: float


def pool(
    adapters: Mapping[str, PeftAdapter],
    backbone: Backbone,
    estimator: Estimator,
    *,
    space: str = "delta_w",
    rank: int | str | None = None,
    same_base: bool = True,
) -> Pooled:
    """Estimate the hierarchy of a set of adapters, and shrink each towards Θ.

        >>> import tempfile
        >>> from pathlib import Path
        >>> import bora_pyro as bp
        >>> from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
        >>> backbone, adapters = bp.Backbone.from_pretrained("builtin:nano"), {}
        >>> for seed, task in enumerate(["ada", "bo"]):
        ...     model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed)
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         _ = bp.save_peft(Path(folder), model, {name: value + 0.01 for name, value in model.starts.items()})
        ...         adapters[task] = bp.read_peft(folder)
        >>> pool(adapters, backbone, FixedShrinkage(0.5)).tasks
        ['ada', 'bo']

    Args:
        adapters: two or more, by name of the task.
        backbone: their base, whose target layers are theirs.
        estimator: how far to shrink, from what is known: see :mod:`bora_pyro.exchange.pooling.hierarchy`.
        space: ``delta_w``, in a common frame; ``weights``, entry by entry of A and B, which means something only for adapters of
            a common start.
        rank: of the result; default the largest of the adapters; ``full`` keeps all of it, whose rank is up to Σ_d r_d.
        same_base: as for :meth:`PeftAdapter.on`.

    Raises:
        InputError: fewer than two adapters, one that is not of the base, or options that do not go together.
    """
    if len(adapters) < 2:
        raise InputError(f"{len(adapters)} adapter given; a hierarchy needs 2 or more")
    if space not in SPACES:
        raise InputError(f"space {space!r} is not known; it is one of {', '.join(SPACES)}{nearest(str(space), SPACES)}")
    if rank is not None and rank != FULL and (not isinstance(rank, int) or rank < 1):
        raise InputError(f"rank is {rank!r}; give a whole number from 1 up, or {FULL}")
    given = {task: adapter.on(backbone, same_base=same_base) for task, adapter in adapters.items()}
    if space == "weights":
        return _pool_weights(given, backbone, estimator, rank)
    return _pool_delta_w(given, backbone, estimator, rank)


def frame(a: Sequence[Tensor]) -> Tensor:
    """V: an orthonormal basis of the union of the row spaces of some matrices.

        >>> frame([torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0]])]).shape
        torch.Size([3, 2])

    Args:
        a: A of each task, (r_d, in) float64. A change of gauge, A → G A, leaves the span as it is.

    Returns:
        (in, R), R at most the sum of the ranks and the number of columns.
    """
    # the tasks' own bases first, or the scale of an A would decide whether its directions count
    return _row_basis(torch.cat([_row_basis(one).mT for one in a]))


def _row_basis(rows: Tensor) -> Tensor:
    """(rows, in) -> (in, rank)."""
    if not len(rows):
        return rows.mT
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > _RANK_TOLERANCE * values.max().clamp(min=torch.finfo(values.dtype).tiny)].mT


def in_frame(adapters: Sequence[PeftAdapter], path: str) -> tuple[Tensor, Tensor]:
    """One layer's changes in their common frame: B' (D, out, R) and V (in, R), float64, with ΔW_d = B'_d Vᵀ."""
    pairs = [(one.factors[path]["lora_A"].double(), one.scaling * one.factors[path]["lora_B"].double()) for one in adapters]
    basis = frame([a for a, _ in pairs])
    return torch.stack([b @ (a @ basis) for a, b in pairs]), basis


def _pool_delta_w(adapters: dict[str, PeftAdapter], backbone: Backbone, estimator: Estimator, rank: int | str | None) -> Pooled:
    given = list(adapters.values())
    groups: dict[str, Hierarchy] = {}
    frames: dict[str, list[int]] = {}
    before, after = (torch.zeros(len(given), dtype=torch.float64) for _ in range(2))
    for slot in backbone.slots:
        gram, entries, frames[slot.name] = torch.zeros(len(given), len(given), dtype=torch.float64), 0, []
        for path in slot.paths:
            changes, basis = in_frame(given, path)
            flat = changes.flatten(1)
            gram += flat @ flat.mT
            entries += flat.shape[1]
            frames[slot.name].append(basis.shape[1])
        groups[slot.name] = found = _estimate(estimator, gram, entries)
        squares = _distances(gram, found.weights)
        before += squares
        after += (1 - found.shrinkage).square() * squares
    size = max(one.rank for one in given) if rank is None else rank
    if not isinstance(size, int):
        size = max(1, max(number for numbers in frames.values() for number in numbers))
    scaling = _common_scaling(given)
    factors: list[LayerFactors] = [{} for _ in range(len(given) + 1)]
    squares, cut = (torch.zeros(len(given) + 1, dtype=torch.float64) for _ in range(2))
    for slot in backbone.slots:
        found = groups[slot.name]
        for path in slot.paths:
            changes, basis = in_frame(given, path)
            shrunk = shrink(changes, found)
            left, values, right = torch.linalg.svd(shrunk, full_matrices=False)
            squares += values.square().sum(1)
            for d, of_task in enumerate(factors):
                if d < len(given) and found.shrinkage[d] == 0 and given[d].rank <= size:
                    of_task[path] = _padded(given[d].factors[path], size, given[d].scaling / scaling)
                else:
                    cut[d] += values[d, size:].square().sum()
                    of_task[path] = _cut(left[d], values[d] / scaling, right[d] @ basis.mT, size)
    lost = torch.where(squares > 0, (cut / squares.clamp(min=torch.finfo(squares.dtype).tiny)).sqrt(), 0.0)
    return Pooled(
        backbone, list(adapters), adapters, groups, frames, dict(zip(adapters, factors, strict=False)), factors[-1],
        scaling * size, (before.sqrt(), after.sqrt()), lost[:-1], float(lost[-1]),
    )  # fmt: skip


def _pool_weights(adapters: dict[str, PeftAdapter], backbone: Backbone, estimator: Estimator, rank: int | str | None) -> Pooled:
    given = list(adapters.values())
    first = given[0]
    if rank not in (None, FULL, first.rank) or any((one.rank, one.scaling) != (first.rank, first.scaling) for one in given):
        raise InputError(
            "in the space of the weights all adapters, and the result, have one rank and one alpha; use the space delta_w"
        )
    groups: dict[str, Hierarchy] = {}
    factors: list[LayerFactors] = [{} for _ in range(len(given) + 1)]
    before, after = (torch.zeros(len(given), dtype=torch.float64) for _ in range(2))
    for slot in backbone.slots:
        for factor in ("lora_A", "lora_B"):
            values = torch.stack([torch.stack([one.factors[path][factor] for path in slot.paths]) for one in given]).double()
            flat = values.flatten(1)
            gram = flat @ flat.mT
            groups[f"{slot.name}.{factor}"] = found = _estimate(estimator, gram, flat.shape[1])
            squares = _distances(gram, found.weights)
            before += squares
            after += (1 - found.shrinkage).square() * squares
            for d, value in enumerate(shrink(values, found)):
                for layer, path in enumerate(slot.paths):
                    factors[d].setdefault(path, {})[factor] = value[layer].float()
    nothing = torch.zeros(len(given), dtype=torch.float64)
    return Pooled(
        backbone, list(adapters), adapters, groups, {}, dict(zip(adapters, factors, strict=False)), factors[-1],
        first.alpha, (before.sqrt(), after.sqrt()), nothing, 0.0,
    )  # fmt: skip


def _estimate(estimator: Estimator, gram: Tensor, entries: int) -> Hierarchy:
    return estimator(gram, max(entries, 1))  # matrices of zeros alone span nothing


def shrink(values: Tensor, found: Hierarchy) -> Tensor:
    """θ̂ of all tasks, and Θ̂ behind them: (D, *shape) -> (D + 1, *shape)."""
    weights, shrinkage = (value.view(-1, *[1] * (values.dim() - 1)) for value in (found.weights, found.shrinkage))
    mean = (weights * values).sum(0, keepdim=True)
    # not y + s (Θ − y): at s = 1 this is Θ to the last bit, at s = 0 it is y
    return torch.cat([(1 - shrinkage) * values + shrinkage * mean, mean])


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """‖y_d − Σ_e w_e y_e‖² of each task, (D,)."""
    around = centred(gram)
    return (around.diagonal() - 2 * around @ weights + weights @ around @ weights).clamp(min=0)


def _common_scaling(adapters: Sequence[PeftAdapter]) -> float:
    """α/r of the result: that of the adapters where they have one, so that what is not shrunk stays as it is; else 1."""
    scalings = {one.scaling for one in adapters}
    return scalings.pop() if len(scalings) == 1 else 1.0


def _padded(factors: Mapping[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """The same matrices with rows and columns of zeros up to the rank."""
    a, b = factors["lora_A"], factors["lora_B"] if scale == 1 else factors["lora_B"] * scale
    more = rank - a.shape[0]
    return {"lora_A": torch.nn.functional.pad(a, (0, 0, 0, more)), "lora_B": torch.nn.functional.pad(b, (0, more))}


def _cut(left: Tensor, values: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
    """The best product of that rank, its two factors of one size: B = U √S, A = √S Vᵀ; (out, k), (k,), (k, in)."""
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # which of two opposite directions a decomposition gives is chance
    signs = torch.where(right.gather(1, right.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    a, b = values.sqrt()[:, None] * signs * right, left * values.sqrt() * signs[:, 0]
    return _padded({"lora_A": a.float(), "lora_B": b.float()}, rank, 1.0)
