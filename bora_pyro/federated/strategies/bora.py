"""BoRA in a federation: each task keeps its θ_d, and only Θ and sums for τ travel."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.federated.strategies.base import Enrolment, Strategy
from bora_pyro.model import BoRA
from bora_pyro.priors import HierarchicalNormal, LearnedPrecision, Prior

# Larger sums could overflow when they are added up in float32.
_LARGEST = 1e30


class FederatedBoRA(Strategy):
    """The MAP of BoRA by turns: clients move their θ_d under the present Θ and τ, the server moves Θ to the mean of the θ_d.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> FederatedBoRA().check(bp.BoRA(backbone, 2, prior=bp.HierarchicalNormal(tau=100)))
        >>> FederatedBoRA().check(bp.BoRA(backbone, 2, prior=bp.Pooled()))
        Traceback (most recent call last):
        bora_pyro.errors.InputError: FederatedBoRA() needs the hierarchical Normal, and the prior is Pooled(); give ...

    The joint density is Π_d p(D_d | θ_d) Normal(θ_d | Θ, I/τ). Given Θ and τ, each θ_d depends on the documents of its own task
    alone, so a client can maximise it alone. Given all θ_d, the density is largest at their precision-weighted mean

        Θ = Σ_d τ θ_d / Σ_d τ,

    which is the plain mean, because all tasks have the same τ (of each entry). A client sends the mean of its own θ_d, and the
    server weighs it with its number of tasks. A task without training documents says nothing about Θ: at the maximum its θ_d is
    Θ, and it is left out. The turns go uphill, and they stand still exactly at the MAP of the whole. Near it, an entry with
    curvature h in each task comes closer by the factor τ/(τ + h) in a round, so a large τ needs many rounds, or a
    ``server_rate`` above 1: with r the factor is 1 − r h/(τ + h).

    The server remembers the last mean of each client, so a client that is absent keeps its part in Θ. A client that was never
    heard has none. A learned τ (:class:`~bora_pyro.priors.LearnedPrecision`) is learned as in a central fit, from three sums of
    each client's validation documents (:func:`slope_sums`).

    Decided here: deviations are taken from Θ, where a central fit takes them from the mean of the θ_d. The two are the same when
    Θ is that mean: with ``server_rate`` 1, before the clients take their steps.
    """

    personal: ClassVar[bool] = True

    def check(self, model: BoRA) -> None:
        prior = model.prior
        if isinstance(prior, LearnedPrecision):
            if prior.per == "task":
                raise InputError(f"{self} has one tau for all tasks, and the prior learns one for each; give per='site'")
            begin(prior, model.starts)
            slope_sums(prior, model.starts)
        elif not isinstance(prior, HierarchicalNormal):
            raise InputError(
                f"{self} needs the hierarchical Normal, and the prior is {prior}; give HierarchicalNormal(tau) or "
                "LearnedPrecision()"
            )

    def weight(self, client: Enrolment, by: str) -> float:
        return float(client.tasks)


def begin(prior: Prior, starts: Mapping[str, Tensor]) -> None:
    """Create τ of each latent of a prior that learns it, before anything asks for it."""
    if isinstance(prior, LearnedPrecision):
        for name, start in starts.items():
            prior.begin(name, start, 0)


def tau_of(prior: Prior) -> dict[str, Tensor]:
    """The learned τ as tensors of a message, by ``tau.<latent>``; empty if the prior learns none."""
    return {name: value for name, value in prior.state().items() if name.startswith("tau.")} if prior.every else {}


def slope_sums(
    prior: LearnedPrecision,
    starts: Mapping[str, Tensor],
    documents: tuple[Mapping[str, Tensor], Mapping[str, Tensor], Tensor] | None = None,
) -> Tensor:
    """What a client sends for τ: by group of τ the sum of its documents' slopes, their number, and the sum of the squares.

        >>> prior, starts = LearnedPrecision(per="model"), {"q.x": torch.zeros(1, 2)}
        >>> begin(prior, starts)
        >>> deviations, gradients = {"q.x": torch.ones(3, 1, 2)}, {"q.x": torch.full((3, 1, 2), -0.5)}
        >>> slope_sums(prior, starts, (deviations, gradients, torch.zeros(3, dtype=torch.int64)))
        tensor([-3.,  3.,  3.])

    They are sums over documents, so those of several clients add up to those of all documents together.

    Args:
        prior: the prior with the present τ; it does not change.
        starts: the start of each latent, (layers, *shape).
        documents: for each validation document the deviation of its task and the gradient of its log-likelihood, (documents,
            layers, *shape) by latent, and its task, (documents,). None: no documents, whose sums are 0.

    Raises:
        InputError: the prior's step needs more than one sum over all documents.
    """
    found: list[Tensor] = []

    def collect(sums: Tensor) -> Tensor:
        found.append(sums.clone())
        return sums

    copy.deepcopy(prior).learn(*(documents or _nothing(starts)), all_reduce=collect)
    if len(found) != 1:
        raise InputError(f"{prior} compares each document with all others, which no client can; leave robust out")
    return found[0]


def are_slope_sums(prior: LearnedPrecision, sums: Tensor) -> bool:
    """Whether some documents can have these sums: numbers of documents, and squares that the slopes leave room for.

        >>> prior = LearnedPrecision(per="model")
        >>> [are_slope_sums(prior, torch.tensor(sums)) for sums in ([-3.0, 3.0, 3.0], [-3.1, 3.0, 3.0], [0.0, -1.0, 1.0])]
        [True, False, False]

    Args:
        prior: the prior.
        sums: what a client has sent, of the right shape and finite.
    """
    sizes = {"model": [1], "site": [1] * len(prior.tau)}.get(prior.per) or [tau.numel() for tau in prior.tau.values()]
    for part in sums.double().split([3 * size for size in sizes]):
        slopes, number, squares = part.view(3, -1)
        # by Cauchy and Schwarz, (Σ s)² is at most n Σ s²; float32 sums are rounded
        room = slopes.square() <= number * squares * (1 + 1e-3) + torch.finfo(torch.float32).tiny
        if not bool(((number >= 0) & (squares >= 0) & (part.abs().max() < _LARGEST) & room).all()):
            return False
    return True


def learn_from(prior: LearnedPrecision, starts: Mapping[str, Tensor], sums: Sequence[Tensor]) -> None:
    """Let the prior learn τ from the sums of several clients, as it would from all their documents together.

    Args:
        prior: the prior, which changes.
        starts: the start of each latent.
        sums: what `slope_sums` returned at each client.
    """
    total = torch.stack([*sums]).sum(0)
    prior.learn(*_nothing(starts), all_reduce=lambda own: own + total.to(own))


def _nothing(starts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    nothing = {name: start.new_zeros((0, *start.shape)) for name, start in starts.items()}
    device = next(iter(starts.values())).device
    return nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device)
