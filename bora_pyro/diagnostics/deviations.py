"""Deviations of the tasks' adapters from Θ, and how far the data determine them: the tensor mathematics of shrinkage.

>>> import torch
>>> deviation = torch.tensor([[[1.0]], [[-1.0]]])  # (D, layers, *shape): two tasks, one layer, one entry
>>> fisher, tau = torch.full((2, 1, 1), 30.0), torch.tensor(10.0)
>>> effective_parameters(fisher, tau)  # h/(h + τ) each
tensor([0.7500, 0.7500], dtype=torch.float64)
>>> pooling_factor(deviation, fisher, tau)  # 1 − 2/(2 + 1/40)
tensor([0.0123], dtype=torch.float64)

Notation: δ_d = θ_d − Θ is the deviation of task d. τ is the prior precision of each entry, and h is the diagonal of the Fisher
information. In the Laplace approximation 1/(h + τ) is then the posterior variance of an entry. τ may be 0 (independent tasks)
or ∞ (pooled tasks); neither limit needs a special case.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bora_pyro.adapters.gives_change import gives_change
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights

SPACES = ("delta_w", "weights")


def deviations(fitted: Fitted, weights: tuple[Weights, Weights] | None = None) -> Weights:
    """δ_d = θ_d − Θ for each latent, by name: (D, layers, *shape); 0 at entries that the adapter masks.

    Args:
        fitted: the fitted model.
        weights: θ and Θ; default: those of the fit. For draw k of a posterior give
            ``model.weights_given(posterior.sites(k))``.
    """
    theta, mean = weights or fitted.weights()
    found = {}
    for name, value in theta.items():
        active = active_entries(fitted.model, name)
        found[name] = value - mean[name] if active is None else torch.where(active, value - mean[name], 0.0)
    return found


def active_entries(model: BoRA, name: str) -> Tensor | None:
    """Which entries of a latent are active, bool, broadcast to (1, layers, *shape) or (D, layers, *shape); None: all are."""
    mask, start = model.tensors.masks.get(name), model.starts[name]
    if mask is None:
        return None
    by_task = mask if mask.dim() > start.dim() else mask[None]
    return by_task.expand(len(by_task), *start.shape)


def distances(deviation: Weights) -> Tensor:
    """‖θ_d − Θ‖ over all latents of a task: (D,), from deviations (D, layers, *shape) by name."""
    return torch.stack([value.flatten(1).square().sum(1) for value in deviation.values()]).sum(0).sqrt()


def displacements(deviation: Weights, centre: Weights) -> Tensor:
    """Component of a draw's deviation δ_d along the deviation c_d of the posterior's centre: ⟨δ_d, c_d⟩ / ‖c_d‖, (D,).

    The component is 0 for a task with c_d = 0.

    The distance ‖δ_d‖ of a draw tells little: the data determine few of the entries, so the others dominate it, and it is nearly
    the same in all tasks and draws. The component along c_d is informative: its mean over draws is ‖c_d‖, the distance of the
    centre, and its spread is the posterior standard deviation in that one direction.

    Args:
        deviation: δ of a draw, (D, layers, *shape) by name of the latent.
        centre: c, the deviation at the posterior's centre, with the same names and shapes.
    """
    product = torch.stack([(value * centre[name]).flatten(1).sum(1) for name, value in deviation.items()]).sum(0)
    length = distances(centre)
    return torch.where(length > 0, product / length, 0.0)


def root_mean_square(deviation: Tensor, active: Tensor | None = None) -> Tensor:
    """Root mean square of the active entries of each task and layer: (D, layers), from (D, layers, *shape).

    It is 0 in a layer without an active entry, where a task does not deviate.

    Args:
        deviation: δ, which is 0 at inactive entries.
        active: as `active_entries` returns it.
    """
    squares = deviation.flatten(2).square()
    if active is None:
        return squares.mean(2, dtype=torch.float64).sqrt()
    return (squares.sum(2, dtype=torch.float64) / active.flatten(2).sum(2).clamp(min=1)).sqrt()


def effective_parameters(fisher: Tensor, tau: Tensor) -> Tensor:
    """Effective number of parameters γ_d = Σ_i h_i/(h_i + τ_i) (MacKay, 1992, "Bayesian interpolation").

    γ_d is the number of entries that the task's data determine. An entry with h = 0, on which the data have no information,
    counts 0. An entry with τ = 0 and h > 0, on which there is no prior, counts 1. An entry with h = 0 and τ = 0 counts 0.

    Args:
        fisher: h, (D, layers, *shape).
        tau: τ, which broadcasts against h.

    Returns:
        (D,) float64, from 0 to the number of entries.
    """
    share = torch.where(fisher > 0, fisher / (fisher + tau), 0.0)
    return share.flatten(1).sum(1, dtype=torch.float64)


def pooling_factor(deviation: Tensor, fisher: Tensor, tau: Tensor, active: Tensor | None = None) -> Tensor:
    """Pooling factor λ = 1 − V_d(E[δ_d]) / E[V_d(δ_d)] of a point estimate, in the Laplace approximation.

    The source is Gelman & Pardoe (2006), "Bayesian measures of explained variance and pooling". V_d is the variance over the
    tasks (divisor D − 1), and E is the expectation over the posterior. In the Laplace approximation E[δ_d] is the estimate.
    The entries of different tasks are independent given Θ, so E[V_d(δ_d)] = V_d(E[δ_d]) + mean_d 1/(h_d + τ). λ is computed for
    each entry and averaged over the entries of a layer.

    λ near 1 means that the tasks' estimates differ by little compared with their uncertainty: they are pooled. λ near 0 means
    that they differ by far more than their uncertainty. An adapter has many more entries than its task's data can determine, so
    values near 1 are normal. Compare λ between layers and between priors. With draws of a posterior, use
    :class:`PosteriorPooling`, which computes λ from them.

    The limits: pooled tasks (τ = ∞) have λ = 1. Independent tasks (τ = 0) have the posterior variance 1/h. If h = 0 as well, the
    variance of the entry is unknown, and the task is left out for that entry; so is a task of which the entry is masked. An entry
    with fewer than two tasks left is left out of the average. Independent tasks need not have λ = 0: with few data 1/h is large.

    Args:
        deviation: δ of the point estimate, (D, layers, *shape).
        fisher: h, (D, layers, *shape).
        tau: τ, which broadcasts against h.
        active: as `active_entries` returns it.

    Returns:
        (layers,) float64; NaN for a layer without any entry left.
    """
    variance = 1 / (fisher + tau)
    known = variance.isfinite() if active is None else variance.isfinite() & active
    number = known.sum(0)
    within = torch.where(known, variance, 0.0).sum(0) / number
    centred = torch.where(known, deviation - torch.where(known, deviation, 0.0).sum(0) / number, 0.0)
    between = centred.square().sum(0) / (number - 1)
    # 0/0 means equal estimates without uncertainty: complete pooling
    factor = torch.where((within == 0) & (between == 0), 1.0, within / (between + within))
    factor = torch.where(number > 1, factor, torch.nan)
    return factor.double().flatten(1).nanmean(1)


class PosteriorPooling:
    """The pooling factor λ = 1 − V_d(E[δ_d]) / E[V_d(δ_d)], computed from draws of a posterior that are added one at a time.

        >>> pooling = PosteriorPooling()
        >>> for draw in (1.0, 3.0):  # two tasks, one layer, one entry; the tasks differ in both draws
        ...     pooling.add({"x": torch.tensor([[[draw]], [[-draw]]])})
        >>> pooling.factors()  # V_d(E[δ]) is 8 and E[V_d(δ)] is 10; 2/1 (1 − 8/10)
        {'x': tensor([0.4000], dtype=torch.float64)}

    This is the quantity of :func:`pooling_factor`, without the Laplace approximation. The mean of K draws still has 1/K of their
    variance, so the plain estimate of λ is too small by the factor (K − 1)/K. :meth:`factors` multiplies by K/(K − 1) to correct
    this. The corrected λ of a single entry may then exceed 1 by chance; the average over a layer rarely does.

    Only a running mean and a running variance of every entry are kept, so the memory does not grow with K.
    """

    def __init__(self) -> None:
        self.draws = 0
        self._mean: Weights = {}
        self._variance: Weights = {}

    def add(self, deviation: Weights) -> None:
        """Add one draw.

        Args:
            deviation: δ of the draw, (D, layers, *shape) by name of the latent.
        """
        self.draws += 1
        for name, value in deviation.items():
            value = value.double()
            mean = self._mean.setdefault(name, torch.zeros_like(value))
            mean += (value - mean) / self.draws
            variance = self._variance.setdefault(name, torch.zeros_like(value[0]))
            variance += (value.var(0) - variance) / self.draws

    def factors(self, active: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """λ of each latent, averaged over the entries of a layer: (layers,) float64 by name.

        Args:
            active: which entries are active, by name of a latent, as `active_entries` returns them. Entries that are masked in
                any task are left out. λ is NaN in a layer without any entry left.

        Raises:
            InputError: if fewer than two draws were added.
        """
        if self.draws < 2:
            raise InputError(f"{self.draws} draws were added; a pooling factor needs 2 or more")
        factors = {}
        for name, whole in self._variance.items():
            share = (whole - self._mean[name].var(0)).clamp(min=0) * (self.draws / (self.draws - 1)) / whole
            # 0/0 means that the deviation is the same in all tasks and draws: complete pooling
            factor = torch.where(whole == 0, 1.0, share)
            if active is not None and name in active:
                factor = torch.where(active[name].all(0), factor, torch.nan)
            factors[name] = factor.flatten(1).nanmean(1)
        return factors


def adapter_matrix(fitted: Fitted) -> Tensor:
    """The deviations θ_d − Θ as a matrix with one row per task: (D, entries), latents in the order of ``fitted.weights()``."""
    return torch.cat([value.flatten(1) for value in deviations(fitted).values()], 1)


def usual_space(fitted: Fitted) -> str:
    """The space in which tasks are compared: ``delta_w``, or ``weights`` if the change of a layer depends on its input."""
    return SPACES[0] if gives_change(fitted.model.adapter, fitted.model.backbone) else SPACES[1]


def task_gram(fitted: Fitted, *, space: str = "delta_w") -> Tensor:
    """Gram matrix of the tasks' deviations, K_de = ⟨x_d, x_e⟩. A PCA and a dendrogram need no more than this.

    Args:
        fitted: the fitted model.
        space: ``delta_w`` means x_d = ΔW_d − ΔW_Θ over all layers, which the change of basis (B, A) → (BG⁻¹, GA) leaves as it
            is. ``weights`` means x_d = θ_d − Θ, the entries on which the prior is defined.

    Returns:
        (D, D) float64 on the CPU. Its diagonal has the squared distances from Θ.

    Raises:
        InputError: if the space is unknown, or if it is ``delta_w`` and the adapter is not a product of two low-rank matrices.
    """
    if space not in SPACES:
        raise InputError(f"space {space!r} is not known; it is one of {', '.join(SPACES)}{nearest(str(space), SPACES)}")
    model, (theta, mean) = fitted.model, fitted.weights()
    gram = torch.zeros(model.num_tasks, model.num_tasks, dtype=torch.float64)
    if space == "weights":
        for value in deviations(fitted, (theta, mean)).values():
            flat = value.flatten(1).double()
            gram += (flat @ flat.mT).cpu()
        return gram
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            left, right = _difference(model, slot, layer, theta, mean)
            # one row at a time, so that only D products (2r, 2r) are in memory, not D²
            rows = [((u.mT @ left) * (v @ right.mT)).sum((1, 2)) for u, v in zip(left, right, strict=True)]
            gram += torch.stack(rows).cpu()
    return gram


def delta_w_deviations(fitted: Fitted, weights: tuple[Weights, Weights] | None = None) -> dict[str, Tensor]:
    """‖ΔW_d − ΔW_Θ‖_F by name of the slot: (D, layers) float64.

    The matrices ΔW are never formed. Both are products of low-rank matrices, so the norm needs only products of size 2r x 2r.

    Args:
        fitted: the fitted model.
        weights: as for :func:`deviations`.

    Raises:
        InputError: if the adapter is not a product of two low-rank matrices.
    """
    model, (theta, mean) = fitted.model, weights or fitted.weights()
    return {
        slot.name: torch.stack([_norm(*_difference(model, slot, layer, theta, mean)) for layer in range(slot.layers)], 1)
        for slot in model.backbone.slots
    }


def delta_w_norms(fitted: Fitted, weights: tuple[Weights, Weights] | None = None) -> dict[str, Tensor]:
    """‖ΔW_d‖_F by name of the slot: (D, layers) float64.

    Args:
        fitted: the fitted model.
        weights: as for :func:`deviations`.

    Raises:
        InputError: if the adapter is not a product of two low-rank matrices.
    """
    model, (theta, _) = fitted.model, weights or fitted.weights()
    return {
        slot.name: torch.stack([_norm(*_factors(model, slot, layer, theta, 1)) for layer in range(slot.layers)], 1)
        for slot in model.backbone.slots
    }


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """‖U V‖_F for U (D, out, k) and V (D, k, in), from the k x k matrices UᵀU and VVᵀ: (D,)."""
    # rounding can make the square of a zero norm negative
    return ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp(min=0).sqrt()


def _difference(model: BoRA, slot: Slot, layer: int, theta: Weights, mean: Weights) -> tuple[Tensor, Tensor]:
    """U (D, out, 2r) and V (D, 2r, in) with U_d V_d = ΔW_d − ΔW_Θ in one layer."""
    b, a = _factors(model, slot, layer, theta, 1)
    b_mean, a_mean = _factors(model, slot, layer, mean, 0)
    b_mean, a_mean = b_mean.expand_as(b), a_mean.expand_as(a)
    # B_d A_d − B A = (B_d − B) A_d + B (A_d − A): both terms are small if the deviation is, so no large numbers cancel
    return torch.cat([b - b_mean, b_mean], -1), torch.cat([a, a - a_mean], -2)


def _factors(model: BoRA, slot: Slot, layer: int, weights: Weights, layer_dim: int) -> tuple[Tensor, Tensor]:
    """(α/r) B (..., out, r) and A (..., r, in) of one layer in float64; the leading dimensions are those of the weights."""
    latents = {name: weights[f"{slot.name}.{name}"].select(layer_dim, layer) for name in model.tensors.names(slot)}
    task = torch.arange(model.num_tasks) if layer_dim else None
    tensors = model.tensors.at_layer(slot, layer, latents, task)
    if (factors := model.adapter.factors(tensors)) is not None:
        scaling, a, b = factors.scaling, factors.lora_A.double(), factors.lora_B.double()
    elif (delta := model.adapter.delta(tensors)) is not None:
        # ΔW = ΔW I
        scaling, a, b = 1.0, torch.eye(delta.shape[-1], dtype=torch.float64, device=delta.device), delta.double()
    else:
        raise InputError(f"{model.adapter} cannot be written as LoRA matrices: it gives no ΔW of a layer")
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # a fixed factor has none
    return scaling * b.expand(*leading, *b.shape[-2:]), a.expand(*leading, *a.shape[-2:])
