"""Simulation-based calibration (Talts et al., 2018) of the guides on linear-Gaussian hierarchies.

    python scripts/experiments/simulation_based_calibration.py

Each simulation draws θ_d ~ Normal(Θ, I/τ) for 8 tasks with 1 to 16 documents y_dn ~ Normal(θ_d, σ² I). It fits a guide to the
documents and counts how many of 99 draws of a quantity are below its true value. If the guide is the posterior, these ranks have
a uniform distribution over simulations. Under p(Θ) ∝ 1 one cannot draw Θ, but this is not needed: the posterior shifts with Θ
and the documents, so the distribution of the ranks is the same for every Θ. The simulations use Θ = 0.

There are three cases: τ is ``known``, or it is drawn from a hyperprior of ``RandomPrecision`` (``half_cauchy``, ``gamma``) and
sampled by the guide. All simulations of a case are in one plate and are fitted together. They share no parameters and no draws,
and the ELBO is the sum of theirs. Guides start at the exact posterior mean of θ and Θ and at the posterior median of τ.
``exact`` draws from the posterior itself, with τ from a fine grid; it separates errors of the simulation from errors of a guide.
``laplace`` uses the exact curvature of the likelihood and equals the posterior if τ is known. It cannot sample τ, so the other
cases leave it out.

``--output`` has the histograms of the ranks: case, guide, quantity, bin (0 to 19, of 5 ranks each), count. ``--summary`` has a
row for each case, guide and quantity: Pearson's χ² over the bins with its p-value, and the shares of simulations whose true
value is in the central 50 % and 90 % of the draws. The quantities are ``mean`` (an entry of Θ), ``tau``, and for the tasks with
the fewest and the most documents N ``theta_<N>`` and ``deviation_<N>`` (the same entry of θ_d and of θ_d − Θ) and
``distance_<N>`` (‖θ_d − Θ‖).
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
from linear_posterior import COUNTS, Values, given_tau, posterior_of_tau
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from scipy.stats import chi2
from torch import Tensor

from bora_pyro import BoRA, HierarchicalNormal, InputError
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.data.batch import Batch, TaskDraw
from bora_pyro.errors import nearest
from bora_pyro.guides import LaplaceGuide, auto_normal_guide, low_rank_guide, normal_guide, structured_guide
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.model import Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.priors import Prior, RandomPrecision
from bora_pyro.priors.random_precision import HYPERPRIORS

NAME, WIDTH = "x", 5
BINS = 20
KNOWN = "known"
#: Guides by case. All except ``exact`` are guides of ``bora_pyro.guides``.
CASES = {
    KNOWN: ("laplace", "normal", "structured", "low_rank", "auto_normal"),
    **{hyperprior: ("exact", "normal", "structured", "low_rank", "auto_normal") for hyperprior in HYPERPRIORS},
}
GUIDES = tuple(dict.fromkeys(name for names in CASES.values() for name in names))
BUILDERS: dict[str, Callable[..., AutoGuide]] = {
    "normal": normal_guide, "structured": structured_guide, "low_rank": low_rank_guide, "auto_normal": auto_normal_guide,
}  # fmt: skip


@dataclass(kw_only=True)
class CalibrationConfig:
    """Count the ranks of true values among draws of guides, on linear-Gaussian hierarchies."""

    guides: list[str] = option([*GUIDES], f"which guides (default: {' '.join(GUIDES)})")
    simulations: int = option(500, "simulated hierarchies of each case")
    draws: int = option(99, "draws of a guide: 19, 39, 59, ..., so that all bins have the same number of ranks")
    steps: int = option(1000, "steps of each fit")
    learning_rate: float = option(0.03, "peak learning rate of the fits; it falls to 0 along a cosine")
    noise: float = option(1.0, "standard deviation of a document around its task")
    tau: float = option(4.0, "precision of the prior if it is known; the hyperprior's scale is tau^-1/2")
    seed: int = option(0, "seed of everything")
    output: str = option("results/simulation_based_calibration.csv", "the table of histograms")
    summary: str = option("results/simulation_based_calibration_summary.csv", "the table of p-values and coverage")

    def validate(self) -> None:
        """Check the values."""
        for name in self.guides:
            if name not in GUIDES:
                raise InputError(f"guide {name!r} is not known here; known: {', '.join(GUIDES)}{nearest(name, GUIDES)}")
        for name, least in (("simulations", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {least} up")
        if self.draws < BINS - 1 or (self.draws + 1) % BINS:
            best = max(1, round((self.draws + 1) / BINS)) * BINS - 1
            raise InputError(f"draws is {self.draws}; give one less than a multiple of {BINS}, nearest: {best}")
        for name in ("noise", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")


class Hierarchies(BoRA):
    """S independent linear-Gaussian hierarchies with BoRA's sites.

    Args:
        prior: how tasks share.
        y: mean of each task's documents, which is sufficient for the likelihood: (D, S, width).
        noise: σ.
        layers: whether the simulations are the layers of one latent; otherwise they are a plate around all sites.
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
        """Sample θ, of shape (D, S, width) as layers or (S, D, 1, width) in a plate."""
        if self.layers:
            return super().weights(batch)
        with pyro.plate("simulations", self.y.shape[1], dim=-2):
            return super().weights(batch)

    def by_task(self, theta: Tensor) -> Tensor:
        """Bring θ of either form, or Θ with one task, to the shape (D, S, width)."""
        return theta if self.layers else theta[..., 0, :].transpose(0, 1)

    def values(self, sites: dict[str, Tensor], tau: Tensor) -> Values:
        """The values of θ, Θ and τ at the sites.

        Args:
            sites: values of the sites.
            tau: (S,) τ, used if it is not a site.
        """
        theta, mean = self.weights_given(sites)
        of_mean = mean[NAME] if self.layers else self.by_task(mean[NAME])[0]
        return Values(self.by_task(theta[NAME]), of_mean, sites.get(f"precision.{NAME}", tau).flatten())

    def sites_of(self, values: Values) -> dict[str, Tensor]:
        """The inverse of :meth:`values`. The result always has the site of τ, also if the model has none."""
        tau, mean = values.tau[:, None], values.mean
        white = tau**0.5 * (values.theta - mean)
        if not self.layers:
            tau, mean, white = tau[:, None, None], mean[:, None, None], white.transpose(0, 1)[:, :, None]
        return {f"precision.{NAME}": tau, f"prior_mean.{NAME}": mean, f"theta.{NAME}_decentered": white}

    def __repr__(self) -> str:
        return f"Hierarchies({self.y.shape[1]} simulations, {self.prior})"


def simulate(config: CalibrationConfig, case: str) -> tuple[Values, Tensor]:
    """Draw true values around Θ = 0, and the mean of each task's documents, (D, S, width)."""
    s, shape = config.simulations, (len(COUNTS), config.simulations, WIDTH)
    with poutine.seed(rng_seed=config.seed):
        tau = torch.full((s,), config.tau, dtype=torch.float64)
        if case != KNOWN:
            tau = HYPERPRIORS[case](torch.full_like(tau, config.tau**-0.5), tau).sample()
        theta = tau[:, None] ** -0.5 * torch.randn(shape, dtype=torch.float64)
        spread = config.noise * torch.tensor(COUNTS, dtype=torch.float64).view(-1, 1, 1) ** -0.5
        return Values(theta, torch.zeros_like(theta[0]), tau), theta + spread * torch.randn(shape, dtype=torch.float64)


class Exact:
    """The exact posterior, with τ on a grid."""

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
        """The quantile of τ at a level, (S,). The density is constant within a cell of the grid."""
        if self.tau is not None:
            return self.tau
        cell = torch.searchsorted(self.cumulative, level[:, None]).clamp(max=len(self.log_tau) - 1)
        upper = self.cumulative.gather(1, cell)
        lower = torch.where(cell > 0, self.cumulative.gather(1, (cell - 1).clamp(min=0)), 0.0)
        share = ((level[:, None] - lower) / (upper - lower)).clamp(0, 1)
        return (self.log_tau[cell] + (share - 0.5) * (self.log_tau[1] - self.log_tau[0])).exp()[:, 0]

    def centre(self) -> Values:
        """The median of τ, and the mean of Θ and θ given this τ."""
        return given_tau(self.y, self.h, self.quantile(self.y.new_full(self.y.shape[1:2], 0.5)), noisy=False)

    def draw(self) -> Values:
        """Draw from the posteriors of all simulations."""
        return given_tau(self.y, self.h, self.quantile(torch.rand(self.y.shape[1], dtype=self.y.dtype)), noisy=True)


def fitted_guide(config: CalibrationConfig, case: str, name: str, y: Tensor) -> tuple[Hierarchies, AutoGuide]:
    """Make a model of the documents y and a guide, and fit the guide. A Laplace guide is not fitted."""
    scale = config.tau**-0.5
    prior = HierarchicalNormal(config.tau) if case == KNOWN else RandomPrecision(case, "layer", scale=scale, start=config.tau)
    # a Laplace guide supports tasks and layers, but no other plate
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
    """Yield draws of a guide without end.

    Args:
        model: the model.
        guide: the guide.
        tau: (S,) τ, used if it is known.
    """
    while True:
        with torch.no_grad():
            values = model.values(guide(), tau)
        yield values


def exact_draws(exact: Exact) -> Iterator[Values]:
    """Yield draws of the exact posterior without end."""
    while True:
        yield exact.draw()


def ranks(config: CalibrationConfig, case: str, name: str) -> dict[str, Tensor]:
    """Count the draws of a guide that are below the true value: (S,) by quantity."""
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
    """Count the ranks 0 to ``draws`` in ``BINS`` bins with equal numbers of ranks."""
    return torch.bincount(rank * BINS // (draws + 1), minlength=BINS)


def assess(rank: Tensor, draws: int) -> dict[str, float]:
    """χ² of the ranks' histogram, its p-value, and the coverage of the central intervals."""
    counts, share = histogram(rank, draws).double(), (rank + 0.5) / (draws + 1)
    expected = len(rank) / BINS
    statistic = float((counts - expected).square().sum() / expected)
    coverage = {f"coverage_{level}": float(((share - 0.5).abs() < level / 200).double().mean()) for level in (50, 90)}
    return {"simulations": len(rank), "chi_square": statistic, "p_value": float(chi2.sf(statistic, BINS - 1))} | coverage


def run(config: CalibrationConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run every guide in every case. Returns the table of histograms and the table of p-values and coverage."""
    histograms, rows = [], []
    for case, names in CASES.items():
        for name in [name for name in names if name in config.guides]:
            for quantity, rank in ranks(config, case, name).items():
                of = {"case": case, "guide": name, "quantity": quantity}
                histograms += [of | {"bin": n, "count": count} for n, count in enumerate(histogram(rank, config.draws).tolist())]
                rows.append(of | assess(rank, config.draws))
            print(f"{case}, {name}: done", file=sys.stderr, flush=True)
    return pd.DataFrame(histograms), pd.DataFrame(rows)


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table: coverage of 50 % and 90 %, and a star if the ranks are not uniform (p < 0.001)."""
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
    """Run the calibration, write both tables, and print the coverage."""
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
