"""The evidence of a prior, log p(documents | τ), in Laplace's approximation.

    >>> import bora_pyro as bp
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
    >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
    >>> guide = bp.laplace_guide(model, bp.fit(model, data, epochs=1).sites(), data=data)
    >>> found = log_evidence(guide, data.train)
    >>> found.log_likelihood < 0, sorted(found.by_latent)[0]
    (True, 'q_proj.lora_A')
    >>> 0 <= best_tau(guide)["q_proj.lora_A"].gain
    True

Around the MAP (θ̂, Θ̂) the log-likelihood of a task is taken as quadratic, with the curvature h_d. Each entry, or each direction
along which the curvature is diagonal, then adds

    Σ_d ½ [log τ/(τ + h_d) − τ (θ̂_d − Θ̂)²] + ½ log 2π/W,  W = Σ_d (1/τ + 1/h_d)⁻¹,

to the log-likelihood at the MAP. The last term integrates Θ over its flat prior. A flat prior has no scale, so an evidence means
nothing by itself. Only differences count, between priors of the same documents, tasks and adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from scipy.optimize import minimize_scalar
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import KroneckerLaplaceGuide, LaplaceGuide
from bora_pyro.inference.fitted import mean_tau
from bora_pyro.model import BoRA, Weights

# The search for the best τ: factors of the guide's own τ, and how finely they are first looked through.
_FACTORS, _GRID = 1e6, 61


@dataclass(frozen=True)
class Evidence:
    """The evidence of one prior, in nats.

    Attributes:
        log_likelihood: log-likelihood of the documents at the MAP, divided by the temperature.
        by_latent: what each latent adds, by its name.
    """

    log_likelihood: float
    by_latent: dict[str, float]

    @property
    def nats(self) -> float:
        """log p(documents | τ), up to a constant that the tasks and the adapter determine."""
        return self.log_likelihood + sum(self.by_latent.values())


@dataclass(frozen=True)
class BestTau:
    """The τ of one latent with the highest evidence.

    Attributes:
        tau: the best τ, of the shape of the prior's own τ.
        gain: its evidence minus that of the prior's own τ, in nats.
        at_limit: whether the evidence is still rising at the end of the search, so that the best τ is a limit, 0 or infinite.
    """

    tau: Tensor
    gain: float
    at_limit: bool


def log_evidence(
    guide: LaplaceGuide,
    split: TokenSplit | None = None,
    tau: float | Mapping[str, float | Tensor] | None = None,
    *,
    temperature: float = 1.0,
    refit: bool = False,
    token_budget: int = 4096,
) -> Evidence:
    """The evidence of a precision τ, log ∫ p(w | θ)^(1/T) p(θ | Θ, τ) dθ dΘ.

    Args:
        guide: the guide ``laplace`` or ``laplace_kfac`` around the MAP, with the curvature of ``split``.
        split: the training documents. None leaves out their log-likelihood, which is the same for every τ.
        tau: τ of all latents, or by latent; default: the prior's own. Latents without a finite τ, and those that are not named,
            keep theirs.
        temperature: T, by which the guide's curvature has been divided. Evidences of different T are not comparable: only at
            T = 1 is p(w | θ)^(1/T) a density of documents. Choose a temperature by held-out documents.
        refit: whether the estimate follows τ, as one Newton step takes it from the MAP of the prior's own τ. This is exact for a
            linear-Gaussian likelihood. For language models the step is much too long, and the default, a fixed estimate, is
            better. Both agree at the prior's own τ, in value and slope.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: a τ is 0 or negative; a name is unknown; the guide's tasks have no common axes (``laplace_kronecker``).
    """
    model, terms = guide.model, {}
    taus = tau if isinstance(tau, Mapping) else {} if tau is None else dict.fromkeys(_free(guide), tau)
    for name in taus:
        if name not in model.starts:
            raise InputError(f"there is no latent {name!r}{nearest(name, model.starts)}")
    for name in model.starts:
        value = torch.as_tensor(taus.get(name, guide.tau(name)), dtype=torch.float64)
        if not bool((value > 0).all()):
            raise InputError(f"tau of {name!r} is {value.min():g}; only a tau above 0 has an evidence")
        terms[name] = _of_latent(guide, name, value, refit=refit)
    log_likelihood = 0.0 if split is None else _log_likelihood(model, guide.estimate(), split, token_budget)
    return Evidence(log_likelihood / temperature, terms)


def best_tau(guide: LaplaceGuide, *, refit: bool = False) -> dict[str, BestTau]:
    """The τ of each latent that has the highest evidence. The curvature stays as it is.

    If τ of a latent differs between layers or tasks, all of them are multiplied by one factor.

    Args:
        guide: as for :func:`log_evidence`.
        refit: as for :func:`log_evidence`.

    Returns:
        By name of the latent, without those whose τ is 0 or infinite.
    """
    found = {}
    for name in _free(guide):
        own = guide.tau(name)

        def loss(log_factor: float, name: str = name, own: Tensor = own) -> float:
            return -_of_latent(guide, name, own * math.exp(log_factor), refit=refit)

        grid = np.linspace(-math.log(_FACTORS), math.log(_FACTORS), _GRID)
        place = int(np.argmin([loss(point) for point in grid]))
        low, high = grid[max(place - 1, 0)], grid[min(place + 1, _GRID - 1)]
        best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x
        found[name] = BestTau(own * math.exp(best), loss(0.0) - loss(best), at_limit=place in (0, _GRID - 1))
    return found


def evidence_summary(guide: Any, split: TokenSplit) -> dict[str, Any]:
    """The evidence of a guide's own τ and the best τ, JSON-able, as ``metrics.json`` has them.

    Args:
        guide: a guide whose temperature is 1.
        split: the training documents.

    Returns:
        ``nats``, ``log_likelihood``, ``best_tau`` (the harmonic mean over the entries of an adapter, or None if all tasks are
        pooled), ``best_tau_by_group``, its ``gain`` in nats, and ``at_limit``, the latents whose best τ is a limit. Empty if the
        guide has no evidence: it does not come from a curvature with common axes, or a τ is 0.
    """
    if not isinstance(guide, LaplaceGuide) or isinstance(guide, KroneckerLaplaceGuide):
        return {}
    starts = guide.model.starts
    if not all(bool((guide.tau(name) > 0).all()) for name in starts):
        return {}
    found, best = log_evidence(guide, split), best_tau(guide)
    numbers = {name: each.tau if each.tau.dim() == 0 else each.tau.flatten() for name, each in best.items()}
    taus = {name: best[name].tau if name in best else guide.tau(name) for name in starts}
    tau = mean_tau(taus, {name: start.numel() for name, start in starts.items()})
    return {
        "nats": found.nats,
        "log_likelihood": found.log_likelihood,
        "best_tau": tau if math.isfinite(tau) else None,
        "best_tau_by_group": {name: value.tolist() for name, value in numbers.items()},
        "gain": sum(each.gain for each in best.values()),
        "at_limit": [name for name, each in best.items() if each.at_limit],
    }


def _free(guide: LaplaceGuide) -> list[str]:
    """The latents whose τ is a positive number."""
    taus = {name: guide.tau(name) for name in guide.model.starts}
    return [name for name, tau in taus.items() if bool(((tau > 0) & tau.isfinite()).all())]


def _of_latent(guide: LaplaceGuide, name: str, tau: Tensor, *, refit: bool) -> float:
    """What a latent adds to the evidence."""
    tau, of_fit, total = tau.double(), guide.tau(name).double(), 0.0
    for part in guide.coordinates(name, guide.deviation(name)):
        h, deviation = part.curvature.double(), part.values.double()
        # at the MAP the log-likelihood has the slope τ₀ δ, with τ₀ the τ of the fit; the Newton step from there is exact if it is
        # quadratic
        factor = (of_fit.square() / tau - 2 * of_fit - h) / (1 + h / tau) if refit else -tau
        total += 0.5 * float(torch.where(deviation != 0, factor * deviation.square(), 0.0).sum())
        total -= 0.5 * part.share * float(torch.log1p(h / tau).expand_as(h).sum())
        if not guide.integrates_mean(name):
            continue
        precision = (1 / (1 / tau + 1 / h)).sum(0)
        informed = precision > 0  # the others add a constant that does not depend on τ, and is infinite
        total += 0.5 * part.share * float(torch.where(informed, (2 * math.pi / precision).log(), 0.0).sum())
        if refit:
            slope = ((of_fit + h) * deviation / (1 + h / tau)).sum(0)
            total += 0.5 * float(torch.where(informed.expand_as(slope), slope.square() / precision, 0.0).sum())
    return total


@torch.no_grad()
def _log_likelihood(model: BoRA, theta: Weights, split: TokenSplit, token_budget: int) -> float:
    """Log-likelihood of all documents under their tasks' weights."""
    total = 0.0
    for batch in split.batches(token_budget=token_budget):
        batch = batch.to(model.backbone.device)
        observed = poutine.trace(model.likelihood).get_trace(model, theta, batch)
        total += float(observed.log_prob_sum()) / batch.scale
    return total
