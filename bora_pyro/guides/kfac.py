"""K-FAC: the Fisher information of each task, layer and matrix as a Kronecker product, along axes that all tasks share.

A latent is the matrix M of a linear map u ↦ M u. For each token the gradient with respect to M is g uᵀ, where g is the gradient
with respect to M u. K-FAC (Martens & Grosse, 2015; for LoRA: Yang et al., 2024) takes u and g as independent. The information of
a task is then

    F_d ≈ (Σ g gᵀ) ⊗ (Σ u uᵀ) / T_d,

with sums over the T_d tokens from which something is predicted. These matrices are statistics of one base model, and those of
different tasks have nearly the same eigenvectors. So all tasks share the eigenvectors of the sums over all tasks, and a task has
its own values along these axes: they are (Σ (q_i·g)²) (Σ (p_j·u)²) / T_d. With shared axes the joint posterior of Θ and all θ_d
is known exactly.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> curvature = kfac(model, theta, split, axes=16)["q_proj.lora_A"]
>>> curvature.long.shape, curvature.short.shape, curvature.along.shape
(torch.Size([4, 256, 16]), torch.Size([4, 2, 2]), torch.Size([2, 4, 17, 2]))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_at_least
from bora_pyro.guides.matrix_sides import matrix_sides
from bora_pyro.model import BoRA, Weights

# How many more random directions than axes are used to find the axes of a long side (Halko et al., 2011).
_OVERSAMPLING = 8


@dataclass(frozen=True)
class KroneckerCurvature:
    """The curvature of one latent, a matrix with n rows or columns on its longer side and r on its shorter side.

    Attributes:
        long: (layers, n, k), axes of the longer side as orthonormal columns: those with the largest eigenvalues.
        short: (layers, r, r), axes of the shorter side.
        along: (D, layers, k, r), the curvature along each pair of axes. If k < n, it has one row more: the mean curvature in the
            directions of the longer side that have no axis.
    """

    long: Tensor
    short: Tensor
    along: Tensor


def kfac(
    model: BoRA,
    theta: Weights,
    split: TokenSplit,
    *,
    axes: int,
    temperature: float = 1.0,
    token_budget: int = 4096,
    seed: int = 0,
) -> dict[str, KroneckerCurvature]:
    """The Kronecker-factored empirical Fisher information of all tasks, in two passes over the documents.

    The first pass finds the axes, the second one measures the tasks along them. The axes of a side longer than ``axes`` come from
    its product with random vectors (the Nyström approximation), so that no matrix of size n x n is needed.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        split: the documents.
        axes: k, the largest number of axes on the longer side of a matrix.
        temperature: the information is divided by it.
        token_budget: tokens of a batch, padding included.
        seed: seed of the random vectors.

    Returns:
        The curvature by name of the latent; 0 along all axes for a task without documents.

    Raises:
        InputError: ``axes`` is below 1; the latents are not matrices of linear maps; the adapter masks entries; or the router
            lets the adapters of all tasks read a document.
    """
    check_at_least("axes", axes, 1)
    long, short = _find_axes(model, theta, split, axes, token_budget, seed)
    of_long, of_short, tokens = _along_axes(model, theta, split, long, short, token_budget)
    found = {}
    for name, values in of_long.items():
        product = values[..., None] * of_short[name][..., None, :] / (temperature * tokens[name].clamp(min=1)[..., None, None])
        found[name] = KroneckerCurvature(long[name], short[name], product.to(theta[name].dtype))
    return found


def no_curvature(model: BoRA, *, axes: int) -> dict[str, KroneckerCurvature]:
    """A curvature of 0, with the shapes of :func:`kfac`."""
    check_at_least("axes", axes, 1)
    found = {}
    for name, start in model.starts.items():
        r, n = _sizes(name, start)
        k = min(axes, n)
        eye = torch.eye(n, dtype=start.dtype, device=start.device)
        along = start.new_zeros(model.num_tasks, len(start), k + (k < n), r)
        found[name] = KroneckerCurvature(eye[:, :k].expand(len(start), n, k), eye[:r, :r].expand(len(start), r, r), along)
    return found


def _sizes(name: str, start: Tensor) -> tuple[int, int]:
    """The sizes of the shorter and the longer side of a latent."""
    if start.dim() != 3:
        raise InputError(f"latent {name!r} is not a matrix, (layers, rows, columns); use the guide laplace, which is diagonal")
    r, n = sorted(start.shape[1:])
    return r, n


def _find_axes(
    model: BoRA, theta: Weights, split: TokenSplit, axes: int, token_budget: int, seed: int
) -> tuple[Weights, Weights]:
    """The axes of the longer and the shorter side of each latent, (layers, n, k) and (layers, r, r)."""
    generator, device = torch.Generator().manual_seed(seed), model.backbone.device
    probes, products, moments = {}, {}, {}
    for name, start in model.starts.items():
        r, n = _sizes(name, start)
        p = axes + _OVERSAMPLING
        probe = torch.eye(n) if n <= p else torch.randn((n, p), generator=generator)
        probes[name] = probe.to(device)
        products[name] = torch.zeros(len(start), *probe.shape, dtype=torch.float64, device=device)
        moments[name] = torch.zeros(len(start), r, r, dtype=torch.float64, device=device)
    for each in matrix_sides(model, theta, split, token_budget=token_budget):
        long, short = each.long.flatten(0, 1), each.short.flatten(0, 1)
        products[each.name][each.layer] += long.mT @ (long @ probes[each.name])
        moments[each.name][each.layer] += short.mT @ short
    found = {
        name: torch.stack([_largest_axes(of_layer, probes[name].double(), axes) for of_layer in product])
        for name, product in products.items()
    }
    dtypes = {name: start.dtype for name, start in model.starts.items()}
    return (
        {name: value.to(dtypes[name]) for name, value in found.items()},
        {name: torch.linalg.eigh(moment).eigenvectors.to(dtypes[name]) for name, moment in moments.items()},
    )


def _along_axes(
    model: BoRA, theta: Weights, split: TokenSplit, long: Weights, short: Weights, token_budget: int
) -> tuple[Weights, Weights, Weights]:
    """The sums of squares of each task along the axes, and its number of tokens.

    Returns:
        The sums of the longer sides, (D, layers, k or k + 1), those of the shorter sides, (D, layers, r), and the tokens,
        (D, layers).
    """

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(model.num_tasks, *sizes, dtype=torch.float64, device=model.backbone.device)

    of_long, of_short = ({name: zeros(*value.shape[::2]) for name, value in axes.items()} for axes in (long, short))
    of_all, tokens = ({name: zeros(len(value)) for name, value in long.items()} for _ in range(2))
    for each in matrix_sides(model, theta, split, token_budget=token_budget):
        name, layer = each.name, each.layer
        found = (
            (of_long, (each.long @ long[name][layer]).square().sum(1)),
            (of_short, (each.short @ short[name][layer]).square().sum(1)),
            (of_all, each.long.square().sum((1, 2))),
            (tokens, each.tokens),
        )
        for sums, value in found:
            sums[name][:, layer].index_add_(0, each.task, value.double())
    for name, along in of_long.items():
        n, k = long[name].shape[-2:]
        if k < n:
            rest = (of_all[name] - along.sum(-1)).clamp(min=0) / (n - k)
            of_long[name] = torch.cat([along, rest[..., None]], -1)
    return of_long, of_short, tokens


def _largest_axes(product: Tensor, probe: Tensor, axes: int) -> Tensor:
    """Eigenvectors of a matrix X for its largest eigenvalues, (n, k), from X times the probe vectors, (n, p).

    They are those of the Nyström approximation (X Ω) (Ωᵀ X Ω)⁻¹ (X Ω)ᵀ, which is X itself if Ω is square.
    """
    core = probe.mT @ product
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > 1e-10 * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    root = product @ (vectors * torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny) ** -0.5, 0.0))
    return torch.linalg.svd(root, full_matrices=False).U[:, : min(axes, len(probe))]
