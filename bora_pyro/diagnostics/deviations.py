"""How far each task's adapter lies from Θ, and how much of that the data speak for: the tensor mathematics of shrinkage.

>>> import torch
>>> deviation = torch.tensor([[[1.0]], [[-1.0]]])  # (D, layers, *shape): two tasks, one layer, one entry
>>> fisher, tau = torch.full((2, 1, 1), 30.0), torch.tensor(10.0)
>>> effective_parameters(fisher, tau)  # h/(h + τ) each
tensor([0.7500, 0.7500], dtype=torch.float64)
>>> pooling_factor(deviation, fisher, tau)  # 1 − 2/(2 + 1/40)
tensor([0.0123], dtype=torch.float64)

Throughout, δ_d = θ_d − Θ is a task's deviation, τ the prior's precision of each of its entries and h the diagonal of the
Fisher information, so that 1/(h + τ) is the posterior variance of an entry in the Laplace approximation. The two limits need
no case of their own: τ = 0 (independent tasks) and τ = ∞ (pooled) are numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights

SPACES = ("delta_w", "weights")


def deviations(fitted: Fitted, weights: tuple[Weights, Weights] | None = None) -> Weights:
    """δ_d = θ_d − Θ by name of the latent: (D, layers, *shape).

    Args:
        fitted: the fitted model.
        weights: θ and Θ to look at instead of the fit's own: a draw, as ``model.weights_given(posterior.sites(k))`` gives it.
    """
    theta, mean = weights or fitted.weights()
    return {name: value - mean[name] for name, value in theta.items()}


def distances(deviation: Weights) -> Tensor:
    """‖θ_d − Θ‖ over all latents of a task: (D, layers, *shape) by name -> (D,)."""
    return torch.stack([value.flatten(1).square().sum(1) for value in deviation.values()]).sum(0).sqrt()


def displacements(deviation: Weights, centre: Weights) -> Tensor:
    """How far a draw of θ_d lies from Θ in the direction of the posterior's centre: ⟨δ_d, c_d⟩ / ‖c_d‖, (D,); 0 where c_d is 0.

    The distance ‖δ_d‖ of a draw is made of the many entries of which the data say nothing, and is nearly the same in all tasks
    and draws. This component is not: it is ‖c_d‖ on average, the distance of the centre, and its spread is that
    of one direction.

    Args:
        deviation: δ of a draw, (D, layers, *shape) by name.
        centre: c, the deviations at the posterior's centre, of the same shapes.
    """
    product = torch.stack([(value * centre[name]).flatten(1).sum(1) for name, value in deviation.items()]).sum(0)
    length = distances(centre)
    return torch.where(length > 0, product / length, 0.0)


def root_mean_square(deviation: Tensor) -> Tensor:
    """Of the entries of each task and layer: (D, layers, *shape) -> (D, layers)."""
    return deviation.flatten(2).square().mean(2, dtype=torch.float64).sqrt()


def effective_parameters(fisher: Tensor, tau: Tensor) -> Tensor:
    """γ_d = Σ_i h_i/(h_i + τ_i), the number of entries that a task's data determine (MacKay, 1992, "Bayesian interpolation").

    An entry of which the data say nothing (h = 0) counts 0 and one that is free (τ = 0) counts 1, the former before the latter.

    Args:
        fisher: h, (D, layers, *shape).
        tau: τ, broadcast against h.

    Returns:
        (D,) float64, from 0 to the number of entries.
    """
    share = torch.where(fisher > 0, fisher / (fisher + tau), 0.0)
    return share.flatten(1).sum(1, dtype=torch.float64)


def pooling_factor(deviation: Tensor, fisher: Tensor, tau: Tensor) -> Tensor:
    """λ = 1 − V_d(E[δ_d]) / E[V_d(δ_d)] (Gelman & Pardoe, 2006, "Bayesian measures of explained variance and pooling").

    The variance V_d runs over the tasks (divisor D − 1), the expectation E over the posterior. With a point estimate the
    posterior is its Laplace approximation: E[δ_d] is the estimate, and since the entries of different tasks are independent
    given Θ, E[V_d(δ_d)] = V_d(E[δ_d]) + mean_d 1/(h_d + τ). λ is taken for each entry and averaged over the entries of a
    layer. Near 1, what is known of the tasks' differences is little beside what is not: the estimates are pooled.
    Near 0, the estimates differ by far more than they are uncertain. An adapter has many times more entries than its task's data
    can determine, so that values near 1 are the rule; what tells is where, and under which prior, they are lower. Where there
    are draws of a posterior, :class:`PosteriorPooling` takes λ from them.

    The limits: pooled tasks (τ = ∞) have λ = 1. Independent ones (τ = 0) have the variance 1/h; where h = 0 as well, neither
    data nor prior say anything, and that task is left out of that entry. An entry with fewer than two tasks left is left out
    of the average. Independent does not mean λ = 0: where the data are few, 1/h is large.

    Args:
        deviation: δ, (D, layers, *shape), the point estimate.
        fisher: h of the same shape.
        tau: τ, broadcast against h.

    Returns:
        (layers,) float64; NaN where no entry is left.
    """
    variance = 1 / (fisher + tau)
    known = variance.isfinite()
    number = known.sum(0)
    within = torch.where(known, variance, 0.0).sum(0) / number
    centred = torch.where(known, deviation - torch.where(known, deviation, 0.0).sum(0) / number, 0.0)
    between = centred.square().sum(0) / (number - 1)
    # 0/0: estimates that do not differ and of which nothing is uncertain are one
    factor = torch.where((within == 0) & (between == 0), 1.0, within / (between + within))
    factor = torch.where(number > 1, factor, torch.nan)
    return factor.double().flatten(1).nanmean(1)


class PosteriorPooling:
    """The pooling factor λ = 1 − V_d(E[δ_d]) / E[V_d(δ_d)] of a posterior, from its draws, one at a time.

        >>> pooling = PosteriorPooling()
        >>> for draw in (1.0, 3.0):  # two tasks, one layer, one entry: far apart in both draws
        ...     pooling.add({"x": torch.tensor([[[draw]], [[-draw]]])})
        >>> pooling.factors()  # V_d(E[δ]) is 8 and E[V_d(δ)] is 10; 2/1 (1 − 8/10)
        {'x': tensor([0.4000], dtype=torch.float64)}

    The quantity is that of :func:`pooling_factor`, with the posterior itself in place of its Laplace approximation. Of K draws
    the variance of the mean has more than its share of their spread, (K − 1)/K of λ is seen, and K/(K − 1) makes up for it; an
    entry may then lie above 1 by as much as chance allows, and the average over a layer hardly does. Memory does not grow with K:
    a mean and a variance are kept of every entry.
    """

    def __init__(self) -> None:
        self.draws = 0
        self._mean: Weights = {}
        self._variance: Weights = {}

    def add(self, deviation: Weights) -> None:
        """Take in one draw: δ, (D, layers, *shape) by name of the latent."""
        self.draws += 1
        for name, value in deviation.items():
            value = value.double()
            mean = self._mean.setdefault(name, torch.zeros_like(value))
            mean += (value - mean) / self.draws
            variance = self._variance.setdefault(name, torch.zeros_like(value[0]))
            variance += (value.var(0) - variance) / self.draws

    def factors(self) -> dict[str, Tensor]:
        """λ of each latent, averaged over the entries of a layer: (layers,) float64 by name.

        Raises:
            InputError: fewer than two draws.
        """
        if self.draws < 2:
            raise InputError(f"{self.draws} draws were added; a pooling factor needs 2 or more")
        factors = {}
        for name, whole in self._variance.items():
            share = (whole - self._mean[name].var(0)).clamp(min=0) * (self.draws / (self.draws - 1)) / whole
            # 0/0, as above: deviations that are the same in all tasks and draws
            factors[name] = torch.where(whole == 0, 1.0, share).flatten(1).mean(1)
        return factors


def adapter_matrix(fitted: Fitted) -> Tensor:
    """The deviations θ_d − Θ as one row a task: (D, entries), latents in the order of ``fitted.weights()``."""
    return torch.cat([value.flatten(1) for value in deviations(fitted).values()], 1)


def task_gram(fitted: Fitted, *, space: str = "delta_w") -> Tensor:
    """Inner products of the tasks' deviations: K_de = ⟨x_d, x_e⟩, which is all that a PCA or a dendrogram needs.

    Args:
        fitted: the fitted model.
        space: ``delta_w``: x_d = ΔW_d − ΔW_Θ over all layers, where (B, A) → (BG⁻¹, GA) changes nothing;
            ``weights``: x_d = θ_d − Θ, the entries on which the prior is.

    Returns:
        (D, D) float64 on the CPU; its diagonal is the squared distances from Θ.

    Raises:
        InputError: an unknown space; or ``delta_w`` of an adapter that is no product of two low-rank matrices.
    """
    if space not in SPACES:
        raise InputError(f"space {space!r} is not known; it is one of {', '.join(SPACES)}{nearest(str(space), SPACES)}")
    model, (theta, mean) = fitted.model, fitted.weights()
    gram = torch.zeros(model.num_tasks, model.num_tasks, dtype=torch.float64)
    if space == "weights":
        for name, value in theta.items():
            flat = (value - mean[name]).flatten(1).double()
            gram += (flat @ flat.mT).cpu()
        return gram
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            left, right = _difference(model, slot, layer, theta, mean)
            # a row at a time: (D, 2r, 2r) products, not D² of them at once
            rows = [((u.mT @ left) * (v @ right.mT)).sum((1, 2)) for u, v in zip(left, right, strict=True)]
            gram += torch.stack(rows).cpu()
    return gram


def delta_w_deviations(fitted: Fitted, weights: tuple[Weights, Weights] | None = None) -> dict[str, Tensor]:
    """‖ΔW_d − ΔW_Θ‖_F by name of the slot: (D, layers) float64.

    The matrices themselves are never formed: with both written as products of low rank, the norm needs r x r products only.

    Args:
        fitted: the fitted model.
        weights: as for :func:`deviations`.

    Raises:
        InputError: the adapter is no product of two low-rank matrices.
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
        InputError: the adapter is no product of two low-rank matrices.
    """
    model, (theta, _) = fitted.model, weights or fitted.weights()
    return {
        slot.name: torch.stack([_norm(*_factors(model, slot, layer, theta, 1)) for layer in range(slot.layers)], 1)
        for slot in model.backbone.slots
    }


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """‖U V‖_F for U (D, out, k) and V (D, k, in), from the k x k matrices UᵀU and VVᵀ: (D,)."""
    # rounding can take the square of a zero below 0
    return ((left.mT @ left) * (right @ right.mT)).sum((1, 2)).clamp(min=0).sqrt()


def _difference(model: BoRA, slot: Slot, layer: int, theta: Weights, mean: Weights) -> tuple[Tensor, Tensor]:
    """U (D, out, 2r) and V (D, 2r, in) with U_d V_d = ΔW_d − ΔW_Θ in one layer."""
    b, a = _factors(model, slot, layer, theta, 1)
    b_mean, a_mean = _factors(model, slot, layer, mean, 0)
    b_mean, a_mean = b_mean.expand_as(b), a_mean.expand_as(a)
    # B_d A_d − B A = (B_d − B) A_d + B (A_d − A): both terms vanish with the deviation, so that nothing large cancels
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
