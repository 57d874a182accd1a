"""The objective of a fit: Pyro's ELBO with exact KL terms, at a temperature."""

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


class TemperedELBO(TraceMeanField_ELBO):
    """E_q[log p(w | θ)] − T · KL(q ‖ p): ``TraceMeanField_ELBO`` for T = 1, where the KL terms are known.

    Where the guide is a point mass the KL term is −log p(θ), and T = 1 is MAP. A guide whose site depends on earlier ones is
    allowed: its KL terms are then exact given those, and unbiased over their draws.

    Args:
        temperature: T. Below 1 the posterior is narrower and fits the documents more closely: its optimum is prior times
            likelihood to the power 1/T.
    """

    #: Both parts of the last value, detached: log-likelihood and KL divergence (T left out), in nats.
    log_likelihood: Tensor
    kl: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        if is_validation_enabled():
            return super()._get_trace(model, guide, args, kwargs)
        # Pyro takes the densities of all sites; needed are those of the observed ones only, for the rest there are KL terms.
        # With millions of latents that is most of a step's overhead.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(model_trace)
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        return model_trace, prune_subsample_sites(guide_trace)

    def differentiable_loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss, to be differentiated; its value stays on its device, where Pyro's own asks for it three times a step."""
        losses = [self._loss(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        return torch.stack(losses).mean()

    def _differentiable_loss_particle(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> tuple[float, Tensor]:
        loss = self._loss(model_trace, guide_trace)
        return loss.item(), loss

    def _loss(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
        log_likelihood: Any = sum(model_trace.nodes[name]["log_prob_sum"] for name in model_trace.observation_nodes)
        divergence: Any = sum(
            _divergence(site, model_trace.nodes.get(name))
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        )
        self.log_likelihood, self.kl = log_likelihood.detach(), torch.as_tensor(divergence).detach()
        return self.temperature * divergence - log_likelihood


def _divergence(guide_site: dict[str, Any], model_site: dict[str, Any] | None) -> Tensor:
    """KL(q ‖ p) of one site; log q of an auxiliary one, which the model lacks."""
    q, value, mask = guide_site["fn"], guide_site["value"], guide_site["mask"]
    if model_site is None:
        return scale_and_mask(q.log_prob(value), scale=guide_site["scale"], mask=mask).sum()
    if isinstance(q, Delta):
        # Pyro's KL from a point leaves out its log-density, the Jacobian where a guide carries a draw to a bounded support
        divergence = q.log_density - model_site["fn"].log_prob(value)
        return scale_and_mask(divergence, scale=guide_site["scale"], mask=mask).sum()
    try:
        divergence = kl_divergence(q, model_site["fn"])
    except NotImplementedError:  # torch knows no closed form of this pair: estimate it from the draw
        divergence = q.log_prob(value) - model_site["fn"].log_prob(value)
    return scale_and_mask(divergence, scale=guide_site["scale"], mask=mask).sum()
