"""Inference in a subspace: a Normal with full covariance in a few directions of each layer (after Izmailov et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_at_least
from bora_pyro.guides.around_map import start_sites
from bora_pyro.guides.base import check_no_masks, tensor_key
from bora_pyro.guides.directions import leading_gradients, orthonormal
from bora_pyro.guides.normal import NormalGuide
from bora_pyro.guides.subspace_normal import SubspaceNormal
from bora_pyro.model import BoRA

_MEAN, _THETA, _WHITENED, _TAU = "prior_mean.", "theta.", "_decentered", "precision."


class SubspaceGuide(NormalGuide):
    """x = m + P L ε in each layer of a site, with fixed P, and m and L of its own for Θ and for each task.

    P (n, k) is an orthonormal basis of a few directions, and L Lᵀ the full covariance in them. In all other directions x is a
    point, as in MAP. The ELBO then has the entropy of the k coordinates and E[−log p] of all entries (``SubspaceNormal``). In
    contrast to Izmailov et al. (arXiv 1907.07504), m moves in all directions, so that the mean can become better than the MAP
    that the fit starts from. If the posterior is Normal, the optimum is its mean and (L Lᵀ)⁻¹ = Pᵀ H P, where H is the layer's
    block of its precision.

    :func:`directions` chooses P: the leading eigenvectors of the Fisher information F of the documents. In a direction with the
    information h and the prior's precision τ, the posterior's variance is 1/(h + τ). The variance that it gives to predictions is
    about h/(h + τ), which grows with h. The paper takes the principal components of the steps of SGD. AdamW's steps have about
    the same size in all entries, whatever the documents say of them.

    Sites that have no layers, such as a random τ, have a Normal of each entry.

    Args:
        model: the BoRA model, or any other Pyro model. The first event dimension of a site counts its layers.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        dimensions: k, the number of directions of each layer; for layers with fewer entries, their number.
        bases: P by name of the site, (layers, n, k), with one more dimension for tasks in front at the sites of tasks. Default:
            random directions, the same ones for all tasks.
        scale: the initial standard deviations, in units of the prior's.
        seed: seed of the random directions.

    Raises:
        InputError: ``dimensions`` is below 1, the scale is not positive, or the adapter masks entries.
    """

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        dimensions: int = 5,
        bases: Mapping[str, Tensor] | None = None,
        scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_at_least("dimensions", dimensions, 1)
        check_no_masks(model, "subspace")
        super().__init__(model, sites, scale=scale)
        self.dimensions, self._bases, self._seed = dimensions, dict(bases or {}), seed

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        if event_dim < 2 or name.startswith(_TAU):
            super().begin(name, centre, deviation, event_dim)
            return
        self.put("loc", name, centre, event_dim)
        basis = self._bases.pop(name, None)
        if basis is None:
            basis = self._random(centre.flatten(centre.dim() - event_dim + 1)[(0,) * (centre.dim() - event_dim)])
            if name.startswith(_THETA):
                basis = basis.expand(self.model.num_tasks, *basis.shape)
        self.register_buffer(tensor_key("basis", name), basis.to(centre).clone(memory_format=torch.contiguous_format))
        logs = deviation.log().expand(centre.shape).flatten(centre.dim() - event_dim + 1).mean(-1)
        k = basis.shape[-1]
        self.put("log_scale", name, logs[..., None].expand(*logs.shape, k), 2)
        self.put("coupling", name, logs.new_zeros((*logs.shape, k, k)), 3)

    def _random(self, like: Tensor) -> Tensor:
        """The same random basis for layers with as many entries as those of ``like``, (layers, n)."""
        return orthonormal([torch.zeros_like(like)[:, None]], dimensions=min(self.dimensions, like.shape[-1]), seed=self._seed)

    def given(
        self, name: str, event_dim: int, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]
    ) -> dist.TorchDistribution:
        basis = getattr(self, tensor_key("basis", name), None)
        if basis is None:
            return self.unconstrained(name, event_dim)
        if name.startswith(_THETA) and "tasks" in plates:
            drawn = plates["tasks"].indices
            basis = basis if len(drawn) == len(basis) else basis[drawn.to(basis.device)]
        coupling = self.get("coupling", name).tril(-1)
        # L = diag(s) (1 + C): the diagonal of L sets the scale of each row
        factor = self.get("log_scale", name).exp()[..., None] * (coupling + torch.eye(coupling.shape[-1]).to(coupling))
        return SubspaceNormal(self.get("loc", name), basis, factor, event_dim=event_dim)


def directions(
    model: BoRA, sites: Mapping[str, Tensor], split: TokenSplit, *, dimensions: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """The bases of :class:`SubspaceGuide`: the directions of each layer in which the documents say most about a site.

        >>> import bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> bases = directions(model, start_sites(model), split, dimensions=3)
        >>> bases["prior_mean.q_proj.lora_A"].shape, bases["theta.q_proj.lora_A_decentered"].shape
        (torch.Size([4, 256, 3]), torch.Size([2, 4, 256, 3]))

    At a site of the tasks they are the leading eigenvectors of the empirical Fisher information of each task's own documents. If
    a task has too few documents, those of all tasks fill up its basis, and then random directions. Θ has those of all documents.

    Args:
        model: the BoRA model.
        sites: the MAP, as ``model.sites_given(theta, mean)`` returns it.
        split: the documents.
        dimensions: k, as for :class:`SubspaceGuide`.
        seed: seed of the random directions.

    Raises:
        InputError: the prior does not treat each latent separately, or the router lets the adapters of all tasks read a document.
    """
    if not model.prior.per_latent:
        raise InputError(
            f"guide subspace needs a prior that treats each latent separately, not {model.prior}; use the guide normal"
        )
    theta, mean = model.weights_given(sites)
    # twice as many rows as directions: what a batch cuts off cannot come back
    of_tasks, of_all = leading_gradients(model, theta, split, number=2 * dimensions)
    shifted = model.sites_given({name: value + 1 for name, value in theta.items()}, mean)
    bases = {}
    for latent, rows in of_all.items():
        k = min(dimensions, rows.shape[-1])
        if _MEAN + latent in sites:
            bases[_MEAN + latent] = orthonormal([rows], dimensions=k, seed=seed)
        for site in (_THETA + latent, _THETA + latent + _WHITENED):
            if site in sites:
                # the site is an affine function of θ; a gradient with respect to it is that of θ divided by the slope
                slope = (shifted[site] - sites[site]).flatten(2)[:, :, None]
                parts = zip(of_tasks[latent] / slope, rows / slope, strict=True)
                bases[site] = torch.stack([orthonormal(part, dimensions=k, seed=seed) for part in parts])
    return bases


def subspace_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    dimensions: int = 5,
    seed: int = 0,
) -> SubspaceGuide:
    """:class:`SubspaceGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``temperature`` is not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> subspace_guide(model, dimensions=3).dimensions
    3

    Args:
        model: the BoRA model.
        sites: the MAP; default: the start of the adapters.
        data: the documents of the fit, whose training split gives the directions; None: random directions.
        scale: the initial standard deviations, in units of the prior's.
        temperature: not used.
        dimensions: as for :class:`SubspaceGuide`.
        seed: seed of the random directions.

    Raises:
        InputError: as for :class:`SubspaceGuide` and :func:`directions`.
    """
    check_at_least("dimensions", dimensions, 1)
    centre = start_sites(model) if sites is None else sites
    bases = None if data is None else directions(model, centre, data.train, dimensions=dimensions, seed=seed)
    return SubspaceGuide(model, sites, dimensions=dimensions, bases=bases, scale=scale, seed=seed)
