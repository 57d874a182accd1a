"""Pooling of independently trained LoRA adapters without retraining: estimates of Θ and τ, and shrinkage towards Θ.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import bora_pyro as bp
    >>> from bora_pyro.exchange.pooling.hierarchy import MarginalLikelihood
    >>> from bora_pyro.exchange.load import read_peft
    >>> backbone, adapters = bp.Backbone.from_pretrained("builtin:nano"), {}
    >>> for seed, task in enumerate(["ada", "bo", "cleo"]):
    ...     model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed)  # each adapter starts from another A
    ...     with tempfile.TemporaryDirectory() as folder:
    ...         _ = bp.save_peft(Path(folder), model, {name: value + 0.01 for name, value in model.starts.items()})
    ...         adapters[task] = read_peft(folder)
    >>> pooled = pool(adapters, backbone, MarginalLikelihood([10, 40, 160]))
    >>> list(pooled.groups), pooled.frames["q_proj"]
    (['v_proj', 'q_proj'], [6, 6, 6, 6])

The factors of LoRA are not unique: (B, A) and (B G⁻¹, G A) give the same ΔW for every invertible G. If adapters started from
different A, the means of their B and of their A have no meaning. All adapters are therefore first written in one common basis,
the frame. Let V (in, R) be an orthonormal basis of the sum of the row spaces of all A_d in a layer. Then

    ΔW_d = B'_d Vᵀ,  B'_d = (α/r) B_d A_d V  (out, R)

holds exactly for every task, and B'_d does not depend on G. The hierarchical Normal is put on B'_d. This is an isotropic Normal
on ΔW within the subspace, and it does not depend on the choice of V. Shrinkage is then linear in ΔW, and the result is truncated
to a low rank by its singular values. Adapters with a common start, such as those of BoRA, can also be pooled entry by entry of A
and B (``space="weights"``). No truncation is needed then.
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
# Directions with a singular value below this fraction of the largest one are float32 rounding errors.
_RANK_TOLERANCE = 1e-5


@dataclass(eq=False)
class Pooled:
    """The result of :func:`pool`.

    Attributes:
        backbone: the base.
        tasks: names of the tasks, in the order of all tensors here.
        adapters: the given adapters, by task.
        groups: the estimated hierarchy of each group. A group is a kind of layer; in the space ``weights`` it is a kind of layer
            and a factor.
        frames: R of each layer, by kind of layer; empty in the space ``weights``.
        factors: the shrunk adapters by task, all of the same rank.
        mean: Θ, as an adapter of the same rank.
        alpha: α of the shrunk adapters and of Θ. A layer changes by (α/r) B A.
        distances: ‖ΔW_d − ΔW_Θ‖ over all layers before and after shrinkage, without truncation to a lower rank: (D,) each. In
            the space ``weights`` it is ‖θ_d − Θ‖.
        relative_error: (D,) relative Frobenius error of truncating each shrunk adapter to its rank, over all layers.
        mean_relative_error: the same error for Θ.
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
    relative_error: Tensor
    mean_relative_error: float


def pool(
    adapters: Mapping[str, PeftAdapter],
    backbone: Backbone,
    estimator: Estimator,
    *,
    space: str = "delta_w",
    rank: int | str | None = None,
    same_base: bool = True,
) -> Pooled:
    """Estimate the hierarchy of a set of adapters, and shrink each adapter towards Θ.

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
        adapters: two or more adapters, by name of the task.
        backbone: the base of the adapters, with the same target layers.
        estimator: the method that estimates the shrinkage; see :mod:`bora_pyro.exchange.pooling.hierarchy`.
        space: ``delta_w`` pools ΔW in a common frame. ``weights`` pools the entries of A and B, which is only meaningful for
            adapters with a common start.
        rank: rank of the result. The default is the largest rank of the adapters. ``full`` truncates nothing; the rank is then
            Σ_d r_d or less.
        same_base: as for :meth:`PeftAdapter.on`.

    Raises:
        InputError: if there are fewer than two adapters, an adapter does not fit the base, or options exclude each other.
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
    """V, an orthonormal basis of the sum of the row spaces of several matrices.

        >>> frame([torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0]])]).shape
        torch.Size([3, 2])

    Args:
        a: A of each task, (r_d, in) float64. Replacing A by G A with an invertible G does not change the result's span.

    Returns:
        (in, R), where R is at most the sum of the ranks, and at most ``in``.
    """
    # orthonormalise each A first, so that an A with small entries is not taken for rounding errors of the others
    return _row_basis(torch.cat([_row_basis(one).mT for one in a]))


def _row_basis(rows: Tensor) -> Tensor:
    """An orthonormal basis (in, rank) of the row space of a matrix (rows, in)."""
    if not len(rows):
        return rows.mT
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > _RANK_TOLERANCE * values.max().clamp(min=torch.finfo(values.dtype).tiny)].mT


def in_frame(adapters: Sequence[PeftAdapter], path: str) -> tuple[Tensor, Tensor]:
    """The ΔW_d of one layer in their common frame: B' (D, out, R) and V (in, R), float64, with ΔW_d = B'_d Vᵀ."""
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
                    of_task[path] = _truncate(left[d], values[d] / scaling, right[d] @ basis.mT, size)
    relative_error = torch.where(squares > 0, (cut / squares.clamp(min=torch.finfo(squares.dtype).tiny)).sqrt(), 0.0)
    return Pooled(
        backbone, list(adapters), adapters, groups, frames, dict(zip(adapters, factors, strict=False)), factors[-1],
        scaling * size, (before.sqrt(), after.sqrt()), relative_error[:-1], float(relative_error[-1]),
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
    return estimator(gram, max(entries, 1))  # entries is 0 if all matrices are 0


def shrink(values: Tensor, found: Hierarchy) -> Tensor:
    """θ̂ of all tasks followed by Θ̂: (D + 1, *shape), from the estimates (D, *shape)."""
    weights, shrinkage = (value.view(-1, *[1] * (values.dim() - 1)) for value in (found.weights, found.shrinkage))
    mean = (weights * values).sum(0, keepdim=True)
    # unlike y + s (Θ − y), this is exactly Θ at s = 1 and exactly y at s = 0
    return torch.cat([(1 - shrinkage) * values + shrinkage * mean, mean])


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """‖y_d − Σ_e w_e y_e‖² of each task, (D,)."""
    around = centred(gram)
    return (around.diagonal() - 2 * around @ weights + weights @ around @ weights).clamp(min=0)


def _common_scaling(adapters: Sequence[PeftAdapter]) -> float:
    """α/r of the result: that of the adapters if they agree, so that adapters without shrinkage stay unchanged; else 1."""
    scalings = {one.scaling for one in adapters}
    return scalings.pop() if len(scalings) == 1 else 1.0


def _padded(factors: Mapping[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """The matrices of a layer, padded with zeros to a larger rank, with B multiplied by a scale."""
    a, b = factors["lora_A"], factors["lora_B"] if scale == 1 else factors["lora_B"] * scale
    more = rank - a.shape[0]
    return {"lora_A": torch.nn.functional.pad(a, (0, 0, 0, more)), "lora_B": torch.nn.functional.pad(b, (0, more))}


def _truncate(left: Tensor, values: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
    """The best approximation of a given rank as B = U √S and A = √S Vᵀ, from U (out, k), S (k,) and Vᵀ (k, in)."""
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    # the signs of singular vectors are arbitrary: make the largest entry of each positive
    signs = torch.where(right.gather(1, right.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    a, b = values.sqrt()[:, None] * signs * right, left * values.sqrt() * signs[:, 0]
    return _padded({"lora_A": a.float(), "lora_B": b.float()}, rank, 1.0)
