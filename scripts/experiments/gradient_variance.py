"""Measure the variance of the gradient of the ELBO under several estimators.

    python scripts/experiments/gradient_variance.py runs/demo --output results/gradient_variance.csv

The guide is the mean-field Normal around a finished MAP fit, with its initial scales. For a fixed batch of training documents
the gradient of −ELBO with respect to the guide's means and log-scales is drawn many times. The table has its total variance (the
trace of the covariance), averaged over some batches. The estimators:

- ``sampled_kl``: one draw for all tasks; the KL divergence uses the same draw, as ``AutoNormal`` under ``Trace_ELBO`` does.
- ``exact_kl``: one draw for all tasks, and the exact KL divergence, as in ``bora_pyro.inference.fit``.
- ``per_document``: one draw for each document (local reparametrisation by document, Kingma et al., 2015). Tokens of the same
  document must have the same weights, because otherwise the model would be a different one.
- ``mirrored``: one draw, and its mirror image about the mean for every second document of the batch; no additional cost.
- ``antithetic``: the mean over one draw and its mirror image; it needs two passes, so its variance counts twice.
- ``batches``: for comparison, the variance of ``exact_kl`` over random batches, which two passes on two batches would halve.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.likelihoods import NextTokens
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.runs.saved import SavedRun, load_run

PARTS = ("mean of Θ", "log-scale of Θ", "mean of deviations", "log-scale of deviations")
#: Passes over a batch that one gradient needs.
PASSES = {"sampled_kl": 1, "exact_kl": 1, "per_document": 1, "mirrored": 1, "antithetic": 2}
Noise = dict[str, tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class VarianceConfig:
    """Measure the variance of the gradient of the ELBO under several estimators."""

    run: str = option("", "folder of a MAP fit in the non-centred form", positional=True)
    scale: float = option(0.5, "standard deviation of the deviations, in units of the prior's; that of Θ is 0.01 times this")
    draws: int = option(12, "gradients of each estimator and batch")
    batches: int = option(2, "batches on which each estimator is measured")
    seed: int = option(0, "seed of the draws")
    trust_remote_code: bool = option(
        False, "allow the base model to run its own code on this machine; only on the command line", line_only=True
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    output: str = option("results/gradient_variance.csv", "the table, one row for each estimator and part of the guide")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a MAP fit, as in gradient_variance.py runs/demo")
        if not 0 < self.scale < float("inf"):
            raise InputError(f"scale is {self.scale}; give a finite number above 0")
        for name, least in (("draws", 2), ("batches", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {least} up")


class Estimators:
    """The mean-field Normal around a MAP fit, and several unbiased estimators of the gradient of its negative ELBO."""

    def __init__(self, run: SavedRun, scale: float) -> None:
        self.model, sites = run.fitted.model, run.fitted.sites()
        self.scale_of_prior = {name: self.model.prior.precision(name, start) ** -0.5 for name, start in self.model.starts.items()}
        self.parameters: dict[str, tuple[Tensor, ...]] = {}
        for name in self.model.starts:
            if f"theta.{name}_decentered" not in sites or f"prior_mean.{name}" not in sites:
                raise InputError(f"the run in {run.folder.path} is not in the non-centred form; give a fit with a learned tau")
            mean, white = sites[f"prior_mean.{name}"], sites[f"theta.{name}_decentered"]
            values = (mean, torch.full_like(mean, 0.01 * scale).log(), white, torch.full_like(white, scale).log())
            self.parameters[name] = tuple(value.clone().requires_grad_() for value in values)

    def noise(self, rows: int | None = None) -> Noise:
        """Draw standard Normal noise for Θ and for the deviations, by latent.

        Args:
            rows: number of rows that each get noise of their own; None: all rows share one draw.
        """
        shapes = {
            name: (mean.shape, white.shape) if rows is None else ((rows, *mean.shape), (rows, *white.shape[1:]))
            for name, (mean, _, white, _) in self.parameters.items()
        }
        return {name: (torch.randn(one), torch.randn(other)) for name, (one, other) in shapes.items()}

    def log_likelihood(self, batch: Batch, noise: Noise, sign: Tensor, *, by_row: bool = False) -> Tensor:
        """Log-likelihood of a batch, scaled to all documents.

        Args:
            batch: the batch.
            noise: noise of the draw, from :meth:`noise`.
            sign: (rows,), −1 for rows that use the mirror image of the draw, otherwise 1.
            by_row: whether each row has noise of its own.
        """
        weights = {}
        for name, (mean, log_s, white, log_t) in self.parameters.items():
            of_mean, of_white = noise[name]
            of_row = of_white if by_row else of_white[batch.task]
            flip = sign.view(-1, *[1] * mean.dim())
            deviation = white[batch.task] + flip * log_t[batch.task].exp() * of_row
            tau = self.scale_of_prior[name]
            tau = tau[batch.task] if tau.dim() > mean.dim() else tau
            weights[name] = mean + flip * log_s.exp() * of_mean + tau * deviation
        logits = self.model.backbone.logits(batch.input_ids, self.model.change(weights, torch.arange(len(batch.task))))
        return batch.scale * NextTokens(logits).log_prob(batch.labels).sum()

    def exact_kl(self) -> Tensor:
        """KL(q ‖ p), up to a constant."""
        total = torch.zeros(())
        for _, log_s, white, log_t in self.parameters.values():
            total = total + (0.5 * ((2 * log_t).exp() + white.square()) - log_t).sum() - log_s.sum()
        return total

    def sampled_kl(self, noise: Noise) -> Tensor:
        """log q − log p at a draw, up to a constant."""
        total = torch.zeros(())
        for name, (_, log_s, white, log_t) in self.parameters.items():
            total = total + 0.5 * (white + log_t.exp() * noise[name][1]).square().sum() - log_t.sum() - log_s.sum()
        return total

    def loss(self, kind: str, batch: Batch) -> Tensor:
        """Draw an estimate of the negative ELBO, up to a constant."""
        plus = torch.ones(len(batch.task))
        if kind == "per_document":
            return self.exact_kl() - self.log_likelihood(batch, self.noise(len(plus)), plus, by_row=True)
        noise = self.noise()
        if kind == "antithetic":
            both = self.log_likelihood(batch, noise, plus) + self.log_likelihood(batch, noise, -plus)
            return self.exact_kl() - 0.5 * both
        if kind == "mirrored":
            plus[1::2] = -1
        divergence = self.sampled_kl(noise) if kind == "sampled_kl" else self.exact_kl()
        return divergence - self.log_likelihood(batch, noise, plus)

    def gradient(self, kind: str, batch: Batch) -> dict[str, Tensor]:
        """Draw a gradient, by part of the guide."""
        every = [value for values in self.parameters.values() for value in values]
        gradients = torch.autograd.grad(self.loss(kind, batch), every)
        return {part: torch.cat([gradient.flatten() for gradient in gradients[place::4]]) for place, part in enumerate(PARTS)}


def total_variance(draw: Callable[[], dict[str, Tensor]], number: int) -> dict[str, float]:
    """The trace of the covariance of some draws, by part.

    Args:
        draw: function that returns a draw by part.
        number: number of draws.
    """
    sums: dict[str, list[Tensor]] = {}
    for _ in range(number):
        for part, value in draw().items():
            total = sums.setdefault(part, [torch.zeros_like(value, dtype=torch.float64) for _ in range(2)])
            total[0] += value
            total[1] += value.double().square()
    return {part: float((square - plain.square() / number).sum()) / (number - 1) for part, (plain, square) in sums.items()}


def measure(config: VarianceConfig) -> pd.DataFrame:
    """The variance of every estimator, and its ratio to ``exact_kl`` at equal cost."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device="cpu", trust_remote_code=config.trust_remote_code)
    estimators = Estimators(run, config.scale)
    batches = run.data.train.batches(token_budget=run.config.token_budget, seed=config.seed)
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for kind, passes in PASSES.items():
            variances = []
            for batch in batches[: config.batches]:
                number = max(2, config.draws // passes)
                variances.append(total_variance(partial(estimators.gradient, kind, batch), number))
            for part in PARTS:
                rows.append({"estimator": kind, "part": part, "variance": sum(v[part] for v in variances) / len(variances)})
            print(
                f"{kind}: " + ", ".join(f"{part} {rows[place - 4]['variance']:.3g}" for place, part in enumerate(PARTS)),
                flush=True,
            )
        every, of_batches = iter(batches), {}
        if len(batches) > 1:
            of_batches = total_variance(lambda: estimators.gradient("exact_kl", next(every)), len(batches))
    rows += [{"estimator": "batches", "part": part, "variance": value} for part, value in of_batches.items()]
    table = pd.DataFrame(rows)
    table["passes"] = table.estimator.map(PASSES).fillna(1).astype(int)
    reference = table[table.estimator == "exact_kl"].set_index("part").variance
    table["at_equal_cost"] = table.variance * table.passes / table.part.map(reference)
    return table


def main(argv: list[str]) -> int:
    """Measure, write the table, and print it."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(VarianceConfig, argv, prog="gradient_variance.py")
        table = measure(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.output, index=False, float_format="%.6g", lineterminator="\n")
    wide = table.pivot_table(index="estimator", columns="part", values="at_equal_cost", sort=False)[list(PARTS)]
    print("| variance at equal cost, exact_kl = 1 | " + " | ".join(PARTS) + " |\n|" + "---|" * 5)
    for name, row in wide.iterrows():
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row) + " |")
    return 0


if __name__ == "__main__":
    run_script(main)
