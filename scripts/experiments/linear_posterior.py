"""The exact posterior of linear-Gaussian hierarchies."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

COUNTS = (1, 1, 2, 3, 4, 6, 10, 16)  # N_d, from few to many


@dataclass(frozen=True)
class Values:
    """θ (D, S, width), Θ (S, width) and τ (S,) of all simulations."""

    theta: Tensor
    mean: Tensor
    tau: Tensor

    def quantities(self) -> dict[str, Tensor]:
        """The ranked quantities by name, each of shape (S,)."""
        found = {"mean": self.mean[:, 0]}
        for d in (0, -1):
            deviation = self.theta[d] - self.mean
            found |= {f"theta_{COUNTS[d]}": self.theta[d, :, 0], f"deviation_{COUNTS[d]}": deviation[:, 0],
                      f"distance_{COUNTS[d]}": deviation.norm(dim=-1)}  # fmt: skip
        return found | {"tau": self.tau}


def posterior_of_tau(y: Tensor, h: Tensor, hyperprior: dist.TorchDistribution, log_tau: Tensor) -> Tensor:
    """The posterior of log τ of each simulation on an even grid, with θ and Θ integrated out: (S, grid), each row sums to 1.

    log p(y | τ) = ½ Σ_entries [Σ_d log w_d − log W − Σ_d w_d (y_d − m)²] + constant, with w_d = (1/τ + 1/h_d)⁻¹, W = Σ_d w_d,
    m = Σ_d w_d y_d / W.
    """
    w = 1 / ((-log_tau).exp() + 1 / h.view(-1, 1))  # (D, grid)
    total = w.sum(0)
    squares = torch.einsum("dse,dg->sg", y.square(), w)
    of_mean = torch.einsum("dse,dg->seg", y, w).square().sum(1) / total
    log_p = 0.5 * (y.shape[-1] * (w.log().sum(0) - total.log()) - squares + of_mean)
    return (log_p + hyperprior.log_prob(log_tau.exp()) + log_tau).softmax(-1)


def given_tau(y: Tensor, h: Tensor, tau: Tensor, noisy: bool) -> Values:
    """The posterior mean of Θ and θ given τ, or a draw from the posterior given τ.

    Args:
        y: (D, S, width) means of the documents.
        h: (D, 1, 1) curvatures N_d/σ².
        tau: (S,) τ.
        noisy: whether to draw.
    """
    t = tau[:, None]
    noise = torch.randn_like if noisy else torch.zeros_like
    w = 1 / (1 / t + 1 / h)
    mean = (w * y).sum(0) / w.sum(0)
    mean = mean + w.sum(0) ** -0.5 * noise(mean)
    theta = (t * mean + h * y) / (t + h)
    return Values(theta + (t + h) ** -0.5 * noise(theta), mean, tau)
