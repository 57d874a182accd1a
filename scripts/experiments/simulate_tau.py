"""Compare the learned τ with the true τ on simulated linear-Gaussian hierarchies.

    python scripts/experiments/simulate_tau.py --output results/simulated_tau.csv

Each simulation has 25 tasks with θ_d ~ Normal(Θ, I/τ), and y_dn ~ Normal(θ_d, σ² I) for 4 to 40 training documents a task and 8
validation documents. The noise is chosen so that the documents of an average task have as much information about θ_d as the
prior (N σ⁻² = τ). The MAP is fitted by ``AutoDelta`` and AdamW as in a fit, and τ is learned by
:class:`~bora_pyro.LearnedPrecision` from the same start for every true τ. The table has the average of τ over the second half of
the fit, because each update of τ uses only few documents.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro import InputError, LearnedPrecision
from bora_pyro.guides import init_to_start
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option

NAME, LAYERS, WIDTH = "x", 2, 50
LEARNING_RATE = 0.05


@dataclass(kw_only=True)
class SimulateConfig:
    """Simulate linear-Gaussian hierarchies and learn their tau."""

    taus: list[str] = option(["1", "100", "10000"], "the true precisions (default: 1 100 10000)")
    draws: int = option(50, "simulated hierarchies for each tau")
    tasks: int = option(25, "tasks of each hierarchy")
    per: str = option("model", "what has a tau of its own", choices=("site", "layer", "task", "model"))
    start: float = option(100.0, "initial tau")
    steps: int = option(600, "steps of each fit")
    output: str = option("results/simulated_tau.csv", "the table, one row for each simulation")

    def validate(self) -> None:
        """Check the values."""
        for name, least in (("draws", 1), ("tasks", 2), ("steps", 8)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {least} up")
        for tau in self.taus:
            try:
                good = 0 < float(tau) < math.inf
            except ValueError:
                good = False
            if not good:
                raise InputError(f"taus has {tau!r}; give finite numbers above 0")


@dataclass(frozen=True)
class Hierarchy:
    """Documents of tasks that were drawn with a known τ.

    Attributes:
        y: (documents, layers, width) training documents.
        task: (documents,) their tasks.
        held_out: (documents, layers, width) validation documents.
        held_out_task: (documents,) their tasks.
        noise: σ.
        tasks: number of tasks.
    """

    y: Tensor
    task: Tensor
    held_out: Tensor
    held_out_task: Tensor
    noise: float
    tasks: int


def draw(tau: float, *, tasks: int, seed: int) -> Hierarchy:
    """Simulate a hierarchy."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(4, 41, (tasks,), generator=generator)
    noise = math.sqrt(22 / tau)
    centre = torch.randn((LAYERS, WIDTH), generator=generator)
    theta = centre + tau**-0.5 * torch.randn((tasks, LAYERS, WIDTH), generator=generator)
    task = torch.arange(tasks).repeat_interleave(counts)
    held_out_task = torch.arange(tasks).repeat(8)

    def documents(of: Tensor) -> Tensor:
        return theta[of] + noise * torch.randn((len(of), LAYERS, WIDTH), generator=generator)

    return Hierarchy(documents(task), task, documents(held_out_task), held_out_task, noise, tasks)


def learn(hierarchy: Hierarchy, prior: LearnedPrecision, *, steps: int) -> float:
    """Fit the hierarchy by MAP while the prior learns τ. Returns the geometric mean of τ over the second half of the steps."""
    start = hierarchy.y.mean(0)

    def theta() -> Tensor:
        return prior.sample_latent(NAME, start, pyro.plate("tasks", hierarchy.tasks, dim=-1))

    def model() -> None:
        value = theta()
        with pyro.plate("documents", len(hierarchy.y), dim=-1):
            pyro.sample("y", dist.Normal(value[hierarchy.task], hierarchy.noise).to_event(2), obs=hierarchy.y)

    guide, elbo = AutoDelta(model, init_loc_fn=init_to_start), TraceMeanField_ELBO()
    guide()
    optimizer = torch.optim.AdamW(guide.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    order = torch.randperm(len(hierarchy.held_out), generator=torch.Generator().manual_seed(0)).split(16)
    path = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        with pyro.validation_enabled(False):
            elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % prior.every == 0:
            chosen = order[(step // prior.every) % len(order)]
            sites = guide.median()
            with torch.no_grad():
                values = poutine.condition(theta, data=sites)()
                task = hierarchy.held_out_task[chosen]
                gradients = (hierarchy.held_out[chosen] - values[task]) / hierarchy.noise**2
                prior.learn({NAME: (values - values.mean(0))[task]}, {NAME: gradients}, task)
            path.append(float(prior.precision(NAME, start).log().mean()))
    return math.exp(statistics.fmean(path[len(path) // 2 :]))


def main(argv: list[str]) -> int:
    """Simulate, learn, write the table, and print how far the learned τ is from the true τ."""
    try:
        config = parse_config(SimulateConfig, argv, prog="simulate_tau.py")
        LearnedPrecision(config.per, config.start)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    print("| true τ | learned / true, geometric mean | mean absolute error of log τ | draws within 10 % |\n|---|---|---|---|")
    for tau in map(float, config.taus):
        for seed in range(config.draws):
            hierarchy = draw(tau, tasks=config.tasks, seed=seed)
            prior = LearnedPrecision(config.per, config.start)
            rows.append({"tau": tau, "seed": seed, "learned": learn(hierarchy, prior, steps=config.steps)})
        ratio = pd.Series([math.log(row["learned"] / tau) for row in rows if row["tau"] == tau])
        within = (ratio.abs() < math.log(1.1)).mean()
        print(f"| {tau:g} | {math.exp(ratio.mean()):.3f} | {ratio.abs().mean():.3f} | {within:.0%} |", flush=True)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(config.output, index=False, float_format="%.6g")
    return 0


if __name__ == "__main__":
    run_script(main)
