"""Is the posterior of a guide calibrated? Simulation-based calibration (Talts et al., 2018) on linear-Gaussian hierarchies.

    python scripts/experiments/simulation_based_calibration.py

Each simulation draws θ_d ~ Normal(Θ, I/τ) for 8 tasks with 1 to 16 documents y_dn ~ Normal(θ_d, σ² I), fits a guide to the
documents, and counts how many of 99 draws of a quantity lie below its true value. Over simulations these ranks are uniform if
the guide is the posterior. Under p(Θ) ∝ 1 there is no Θ to draw, and none is needed: the posterior moves with Θ and the
documents, so that the law of the ranks is the same for every Θ, and Θ = 0 stands for all.

Three cases: τ ``known``, and τ drawn from the hyperprior of ``RandomPrecision`` (``half_cauchy``, ``gamma``) and sampled by the
guide. All simulations of a case stand in one plate and are fitted together: none shares a parameter or a draw with another, and
the ELBO is the sum of theirs. Guides begin at the exact posterior's mean of θ and Θ, at its median of τ. ``exact`` draws from
the posterior itself, τ from a fine grid: it tells an error of the simulation from one of a guide. ``laplace`` has the
likelihood's own curvature and is the posterior where τ is known; where τ is not it holds it, and is left out.

``--output`` has the histograms of the ranks: case, guide, quantity, bin (0 to 19, of 5 ranks each), count. ``--summary`` has a
row a case, guide and quantity: Pearson's χ² over the bins with its p-value, and the shares of simulations whose true value lies
in the central 50 % and 90 % of the draws. Quantities: ``mean`` (an entry of Θ), and for the tasks with the fewest and the most
documents N ``theta_<N>`` and ``deviation_<N>`` (the same entry of θ_d and of θ_d − Θ) and ``distance_<N>`` (‖θ_d − Θ‖); ``tau``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from scipy.stats import chi2
from torch import Tensor

from bora_pyro import BoRA, HierarchicalNormal, InputError
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.data.batch import Batch, TaskDraw
from bora_pyro.guides import LaplaceGuide, auto_normal_guide, low_rank_guide, normal_guide
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.model import Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.priors import Prior, RandomPrecision
from bora_pyro.priors.random_precision import HYPERPRIORS

COUNTS = (1, 1, 2, 3, 4, 6, 10, 16)  # N_d, from few to many
NAME, WIDTH = "x", 5
BINS = 20
KNOWN = "known"
#: Guides by case; all but exact are of ``bora_pyro.guides``.
CASES = {
    KNOWN: ("laplace", "normal", "low_rank", "auto_normal"),
    **{hyperprior: ("exact", "normal", "low_rank", "auto_normal") for hyperprior in HYPERPRIORS},
}
BUILDERS: dict[str, Callable[..., AutoGuide]] = {
    "normal": normal_guide, "low_rank": low_rank_guide, "auto_normal": auto_normal_guide,
}  # fmt: skip


@dataclass(kw_only=True)
class CalibrationConfig:
    """Count ranks of true values among draws of guides, on linear-Gaussian hierarchies."""

    simulations: int = option(500, "simulated hierarchies of each case")
    draws: int = option(99, "draws of a guide; 19, 39, 59, ...: all bins have as many ranks")
    steps: int = option(1000, "steps of each fit")
    learning_rate: float = option(0.03, "peak learning rate of the fits; a cosine takes it to 0")
    noise: float = option(1.0, "standard deviation of a document about its task")
    tau: float = option(4.0, "precision of the prior where it is known; the hyperprior's scale is tau^-1/2")
    seed: int = option(0, "seed of everything")
    output: str = option("results/simulation_based_calibration.csv", "the table of histograms")
    summary: str = option("results/simulation_based_calibration_summary.csv", "the table of p-values and coverage")

    def validate(self) -> None:
        """Check the values."""
        for name, least in (("simulations", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {least} up")
        if self.draws < BINS - 1 or (self.draws + 1) % BINS:
            nearest = max(1, round((self.draws + 1) / BINS)) * BINS - 1
            raise InputError(f"draws is {self.draws}; give one less than a multiple of {BINS}, nearest: {nearest}")
        for name in ("noise", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")


@dataclass(frozen=True)
class Values:
    """θ (D, S, width), Θ (S, width) and τ (S,) of all simulations."""

    theta: Tensor
    mean: Tensor
    tau: Tensor

    def quantities(self) -> dict[str, Tensor]:
        """What is ranked, (S,) by name."""
        found = {"mean": self.mean[:, 0]}
        for d in (0, -1):
            deviation = self.theta[d] - self.mean
            found |= {f"theta_{COUNTS[d]}": self.theta[d, :, 0], f"deviation_{COUNTS[d]}": deviation[:, 0],
                      f"distance_{COUNTS[d]}": deviation.norm(dim=-1)}  # fmt: skip
        return found | {"tau": self.tau}


class Hierarchies(BoRA):
    """S independent linear-Gaussian hierarchies with BoRA's sites.

    Args:
        prior: how tasks share.
        y: the mean of each task's documents, all that the likelihood needs of them: (D, S, width).
        noise: σ.
        layers: whether the simulations are the layers of one latent, and not a plate about all sites.
    """

    def __init__(self, prior: Prior, y: Tensor, noise: float, *, layers: bool = False) -> None:
        self.num_tasks, self.prior, self.y, self.layers = len(y), prior, y, layers
        self.curvature = (torch.tensor(COUNTS, dtype=y.dtype) / noise**2).view(-1, 1, 1)  # h_d = N_d/σ²
        self.starts, self.fixed = {NAME: torch.zeros_like(y[0] if layers else y[0, :1])}, {}
        self.tensors = LayerTensors(self.starts)

    def __call__(self, *args: object) -> None:
        """Run the model."""
        theta = self.by_task(self.weights()[NAME])
        with pyro.plate("tasks_of_documents", self.num_tasks, dim=-1):
            pyro.sample("y", dist.Normal(theta, self.curvature**-0.5).to_event(2), obs=self.y)

    def weights(self, batch: Batch | TaskDraw | None = None) -> Weights:
        """Sample θ: (D, S, width) as layers, (S, D, 1, width) in a plate."""
        if self.layers:
            return super().weights(batch)
        with pyro.plate("simulations", self.y.shape[1], dim=-2):
            return super().weights(batch)

    def by_task(self, theta: Tensor) -> Tensor:
        """θ of either form, or Θ with one task, as (D, S, width)."""
        return theta if self.layers else theta[..., 0, :].transpose(0, 1)

    def values(self, sites: dict[str, Tensor], tau: Tensor) -> Values:
        """The values that the sites stand for; tau: (S,), where it is no site."""
        theta, mean = self.weights_given(sites)
        of_mean = mean[NAME] if self.layers else self.by_task(mean[NAME])[0]
        return Values(self.by_task(theta[NAME]), of_mean, sites.get(f"precision.{NAME}", tau).flatten())

    def sites_of(self, values: Values) -> dict[str, Tensor]:
        """``values`` undone, with the site of τ whether there is one or not."""
        tau, mean = values.tau[:, None], values.mean
        white = tau**0.5 * (values.theta - mean)
        if not self.layers:
            tau, mean, white = tau[:, None, None], mean[:, None, None], white.transpose(0, 1)[:, :, None]
        return {f"precision.{NAME}": tau, f"prior_mean.{NAME}": mean, f"theta.{NAME}_decentered": white}

    def __repr__(self) -> str:
        return f"Hierarchies({self.y.shape[1]} simulations, {self.prior})"


def simulate(config: CalibrationConfig, case: str) -> tuple[Values, Tensor]:
    """True values around Θ = 0, and the mean of each task's documents, (D, S, width)."""
    s, shape = config.simulations, (len(COUNTS), config.simulations, WIDTH)
    with poutine.seed(rng_seed=config.seed):
        tau = torch.full((s,), config.tau, dtype=torch.float64)
        if case != KNOWN:
            tau = HYPERPRIORS[case](torch.full_like(tau, config.tau**-0.5), tau).sample()
        theta = tau[:, None] ** -0.5 * torch.randn(shape, dtype=torch.float64)
        spread = config.noise * torch.tensor(COUNTS, dtype=torch.float64).view(-1, 1, 1) ** -0.5
        return Values(theta, torch.zeros_like(theta[0]), tau), theta + spread * torch.randn(shape, dtype=torch.float64)


def posterior_of_tau(y: Tensor, h: Tensor, hyperprior: dist.TorchDistribution, log_tau: Tensor) -> Tensor:
    """The posterior of log τ of each simulation on an even grid, with θ and Θ integrated out: (S, grid), sums are 1.

    log p(y | τ) = ½ Σ_entries [Σ_d log w_d − log W − Σ_d w_d (y_d − m)²] and a constant, w_d = (1/τ + 1/h_d)⁻¹, W = Σ_d w_d,
    m = Σ_d w_d y_d / W.
    """
    w = 1 / ((-log_tau).exp() + 1 / h.view(-1, 1))  # (D, grid)
    total = w.sum(0)
    squares = torch.einsum("dse,dg->sg", y.square(), w)
    of_mean = torch.einsum("dse,dg->seg", y, w).square().sum(1) / total
    log_p = 0.5 * (y.shape[-1] * (w.log().sum(0) - total.log()) - squares + of_mean)
    return (log_p + hyperprior.log_prob(log_tau.exp()) + log_tau).softmax(-1)


def given_tau(y: Tensor, h: Tensor, tau: Tensor, noisy: bool) -> Values:
    """The posterior's mean of Θ and θ given τ (S,), or a draw from it."""
    t = tau[:, None]
    noise = torch.randn_like if noisy else torch.zeros_like
    w = 1 / (1 / t + 1 / h)
    mean = (w * y).sum(0) / w.sum(0)
    mean = mean + w.sum(0) ** -0.5 * noise(mean)
    theta = (t * mean + h * y) / (t + h)
    return Values(theta + (t + h) ** -0.5 * noise(theta), mean, tau)


class Exact:
    """The posterior itself, of τ on a grid."""

    def __init__(self, config: CalibrationConfig, case: str, y: Tensor) -> None:
        self.y, self.h = y, (torch.tensor(COUNTS, dtype=y.dtype) / config.noise**2).view(-1, 1, 1)
        self.tau = None
        if case == KNOWN:
            self.tau = torch.full(y.shape[1:2], config.tau, dtype=y.dtype)
            return
        scale = torch.tensor(config.tau**-0.5, dtype=y.dtype)
        self.log_tau = math.log(config.tau) + torch.linspace(-20, 20, 1601, dtype=y.dtype)
        self.cumulative = posterior_of_tau(y, self.h, HYPERPRIORS[case](scale, scale), self.log_tau).cumsum(-1)

    def quantile(self, level: Tensor) -> Tensor:
        """τ at a level of its posterior, (S,); the grid's cells are filled evenly."""
        if self.tau is not None:
            return self.tau
        cell = torch.searchsorted(self.cumulative, level[:, None]).clamp(max=len(self.log_tau) - 1)
        upper = self.cumulative.gather(1, cell)
        lower = torch.where(cell > 0, self.cumulative.gather(1, (cell - 1).clamp(min=0)), 0.0)
        share = ((level[:, None] - lower) / (upper - lower)).clamp(0, 1)
        return (self.log_tau[cell] + (share - 0.5) * (self.log_tau[1] - self.log_tau[0])).exp()[:, 0]

    def centre(self) -> Values:
        """The median of τ, and the mean of Θ and θ given that."""
        return given_tau(self.y, self.h, self.quantile(self.y.new_full(self.y.shape[1:2], 0.5)), noisy=False)

    def draw(self) -> Values:
        """A draw of all simulations."""
        return given_tau(self.y, self.h, self.quantile(torch.rand(self.y.shape[1], dtype=self.y.dtype)), noisy=True)


def fitted_guide(config: CalibrationConfig, case: str, name: str, y: Tensor) -> tuple[Hierarchies, AutoGuide]:
    """A guide of the hierarchies of the documents y, fitted where it is to be fitted."""
    scale = config.tau**-0.5
    prior = HierarchicalNormal(config.tau) if case == KNOWN else RandomPrecision(case, "layer", scale=scale, start=config.tau)
    # Laplace's guide knows tasks and layers, and no other plate
    model = Hierarchies(prior, y, config.noise, layers=name == "laplace")
    sites = model.sites_of(Exact(config, case, y).centre())
    if name == "laplace":
        del sites[f"precision.{NAME}"]
        return model, LaplaceGuide(model, sites, {NAME: model.curvature.expand_as(y)})
    guide, elbo = BUILDERS[name](model, sites), TemperedELBO()
    with poutine.seed(rng_seed=config.seed), pyro.validation_enabled(False):
        guide()
        optimizer = torch.optim.Adam(guide.parameters(), lr=config.learning_rate)
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            elbo.differentiable_loss(model, guide).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, guide


def draws_of(model: Hierarchies, guide: AutoGuide, tau: Tensor) -> Iterator[Values]:
    """Draws of a guide without end; tau: (S,), where it is known."""
    while True:
        with torch.no_grad():
            values = model.values(guide(), tau)
        yield values


def exact_draws(exact: Exact) -> Iterator[Values]:
    """Draws of the posterior itself without end."""
    while True:
        yield exact.draw()


def ranks(config: CalibrationConfig, case: str, name: str) -> dict[str, Tensor]:
    """How many of a guide's draws lie below the true value, (S,) by quantity."""
    truth, y = simulate(config, case)
    if name == "exact":
        draws: Iterator[Values] = exact_draws(Exact(config, case, y))
    else:
        draws = draws_of(*fitted_guide(config, case, name, y), truth.tau)
    true = truth.quantities()
    if case == KNOWN:
        del true["tau"]
    counts = {quantity: torch.zeros(len(value), dtype=torch.int64) for quantity, value in true.items()}
    with poutine.seed(rng_seed=config.seed + 1):
        for _ in range(config.draws):
            found = next(draws).quantities()
            for quantity, value in true.items():
                counts[quantity] += found[quantity] < value
    return counts


def histogram(rank: Tensor, draws: int) -> Tensor:
    """Counts of the ranks 0 to ``draws`` in ``BINS`` bins of as many ranks."""
    return torch.bincount(rank * BINS // (draws + 1), minlength=BINS)


def assess(rank: Tensor, draws: int) -> dict[str, float]:
    """χ² of the ranks' histogram, its p-value, and the coverage of the central intervals."""
    counts, share = histogram(rank, draws).double(), (rank + 0.5) / (draws + 1)
    expected = len(rank) / BINS
    statistic = float((counts - expected).square().sum() / expected)
    coverage = {f"coverage_{level}": float(((share - 0.5).abs() < level / 200).double().mean()) for level in (50, 90)}
    return {"simulations": len(rank), "chi_square": statistic, "p_value": float(chi2.sf(statistic, BINS - 1))} | coverage


def run(config: CalibrationConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every guide in every case: the table of histograms and that of p-values and coverage."""
    histograms, rows = [], []
    for case, names in CASES.items():
        for name in names:
            for quantity, rank in ranks(config, case, name).items():
                of = {"case": case, "guide": name, "quantity": quantity}
                histograms += [of | {"bin": n, "count": count} for n, count in enumerate(histogram(rank, config.draws).tolist())]
                rows.append(of | assess(rank, config.draws))
            print(f"{case}, {name}: done", file=sys.stderr, flush=True)
    return pd.DataFrame(histograms), pd.DataFrame(rows)


def markdown(summary: pd.DataFrame) -> str:
    """The summary for people: coverage of 50 % and 90 %, and a star where the ranks are not uniform (p < 0.001)."""
    quantities = list(dict.fromkeys(summary["quantity"]))
    header = ["τ", "guide", "simulations", *quantities]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (case, guide), rows in summary.groupby(["case", "guide"], sort=False):
        by_quantity: dict[Any, Any] = dict(zip(rows["quantity"], rows.itertuples(), strict=True))
        cells = [
            f"{row.coverage_50:.2f} {row.coverage_90:.2f}{'*' if row.p_value < 0.001 else ''}" if row else "–"
            for row in map(by_quantity.get, quantities)
        ]
        lines.append(f"| {case} | {guide} | {rows['simulations'].iloc[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the calibration, write both tables and print the coverage."""
    try:
        config = parse_config(CalibrationConfig, argv, prog="simulation_based_calibration.py")
        histograms, summary = run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, table in ((config.output, histograms), (config.summary, summary)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    print(markdown(summary))
    return 0


if __name__ == "__main__":
    run_script(main)
