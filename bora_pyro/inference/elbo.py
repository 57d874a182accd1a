"""The objective of a fit: Pyro's ELBO with exact KL terms and a temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from bora_pyro.adapters.factor import PRIOR_FACTOR


class TemperedELBO(TraceMeanField_ELBO):
    """E_q[log p(w | θ)] − T · KL(q ‖ p). For T = 1 it is ``TraceMeanField_ELBO``, if the KL terms have closed forms.

    A factor that an adapter adds to the prior (:meth:`~bora_pyro.adapters.Adapter.log_factor`) is a part of the KL term.
    For a point mass as guide the KL term is −log p(θ), and T = 1 is MAP. A guide's site may depend on earlier sites. Its KL term
    is then exact given the draws of those sites, and unbiased over their draws.

    Args:
        temperature: T. Below 1 the posterior is narrower and fits the documents more closely. The optimum is proportional to the
            prior times the likelihood to the power 1/T.
        shared_temperature: the factor of the KL terms of sites outside the plate of tasks, if it is not T.
    """

    #: Both parts of the last value, detached: the log-likelihood and the KL divergence (without T), in nats.
    log_likelihood: Tensor
    kl: Tensor
    #: The part of the KL divergence that belongs to sites inside the plate of tasks.
    kl_of_tasks: Tensor

    def __init__(self, temperature: float = 1.0, *, shared_temperature: float | None = None) -> None:
        super().__init__()
        self.temperature, self.shared_temperature = temperature, shared_temperature

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        if is_validation_enabled():
            return super()._get_trace(model, guide, args, kwargs)
        # Pyro computes the densities of all sites. Only those of the observed sites are needed; the others have KL terms.
        # With millions of latents, the rest is most of a step's overhead.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(model_trace)
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        return model_trace, prune_subsample_sites(guide_trace)

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor on its device. Pyro's own method reads the value three times per step, which synchronises."""
        losses = [self._loss(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.stack(losses).mean()

    def _differentiable_loss_particle(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[float, Tensor]:
        loss = self._loss(model_trace, guide_trace)
        return loss.item(), loss

    def _loss(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
        observed = {name: model_trace.nodes[name]["log_prob_sum"] for name in model_trace.observation_nodes}
        log_likelihood: Any = sum(value for name, value in observed.items() if not name.startswith(PRIOR_FACTOR))
        factor: Any = -sum(value for name, value in observed.items() if name.startswith(PRIOR_FACTOR))
        sites = [site for site in guide_trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]
        terms = [_divergence(site, model_trace.nodes.get(site["name"])) for site in sites]
        divergence = factor + sum(terms)
        inside = [any(frame.name == "tasks" for frame in site["cond_indep_stack"]) for site in sites]
        # an adapter's factor is of the tasks' latents
        of_tasks = factor + sum(term for term, own in zip(terms, inside, strict=True) if own)
        self.log_likelihood, self.kl = log_likelihood.detach(), torch.as_tensor(divergence).detach()
        self.kl_of_tasks = torch.as_tensor(of_tasks).detach()
        if self.shared_temperature is None:
            return self.temperature * divergence - log_likelihood
        shared: Any = sum(term for term, own in zip(terms, inside, strict=True) if not own)
        return self.temperature * of_tasks + self.shared_temperature * shared - log_likelihood


def _divergence(guide_site: dict[str, Any], model_site: dict[str, Any] | None) -> Tensor:
    """KL(q ‖ p) of one site; log q for an auxiliary site, which the model does not have."""
    q, value, mask = guide_site["fn"], guide_site["value"], guide_site["mask"]
    if model_site is None:
        return scale_and_mask(q.log_prob(value), scale=guide_site["scale"], mask=mask).sum()
    if isinstance(q, Delta):
        # Pyro's KL from a point mass leaves out its log-density, which is the Jacobian if a guide transforms a draw
        divergence = q.log_density - model_site["fn"].log_prob(value)
        return scale_and_mask(divergence, scale=guide_site["scale"], mask=mask).sum()
    try:
        divergence = kl_divergence(q, model_site["fn"])
    except NotImplementedError:  # torch has no closed form for this pair: estimate the divergence from the draw
        divergence = q.log_prob(value) - model_site["fn"].log_prob(value)
    return scale_and_mask(divergence, scale=guide_site["scale"], mask=mask).sum()
