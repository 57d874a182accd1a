"""Compare the learned τ with the true τ on simulated linear-Gaussian hierarchies.

    python scripts/experiments/simulate_tau.py --output results/simulated_tau.csv

Each simulation has tasks with θ_d ~ Normal(Θ, I/τ) of 100 entries, training documents y_dn ~ Normal(θ_d, σ² I) and some
validation documents. The noise is chosen so that the documents of an average task have as much information about θ_d as the prior
(N σ⁻² = τ). The MAP is fitted as ``fit`` does it: the whitened form, AdamW with its warm-up and cosine, the deviations' own rate,
and :class:`~bora_pyro.LearnedPrecision` with a look at 16 validation documents every 4 steps. The learned τ is the mean over the
steps that ``fit`` keeps (:class:`~bora_pyro.inference.averaging.TrajectoryMean`).

The grid crosses learning rates, numbers of steps, true τ and starts of τ. Further cases have unequal N_d, two or three tasks, or
one validation document a task. In the cases with outliers, the standard deviation of a task is τ^-1/2 times a scale of
its own: in "t" the deviations of a task have a multivariate t distribution with 3 degrees of freedom, in "one outlier" the scale
of one task is 5. The τ of a typical task, whose scale is the median one, is then the true one.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro import InputError, LearnedPrecision
from bora_pyro.errors import check_at_least, check_one_of
from bora_pyro.guides import init_to_start
from bora_pyro.inference.averaging import TrajectoryMean
from bora_pyro.inference.optimizer import (
    LEAST_REACH,
    Rates,
    adamw,
    deviation_parameters,
    deviation_rate,
    gradient_factors,
    rescale,
    take_step,
)
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.schedule import schedule
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option

NAME, LAYERS, WIDTH = "x", 2, 50
LOOK = 16  # validation documents of one look
TRUTH = "truth"
#: (tasks, least and most training documents a task, validation documents a task) by name of the case
CASES = {
    "grid": (25, (8, 8), 8),
    "unequal": (25, (4, 40), 8),
    "two tasks": (2, (8, 8), 8),
    "three tasks": (3, (8, 8), 8),
    "one validation document": (25, (8, 8), 1),
    "t": (25, (8, 8), 8),
    "one outlier": (25, (8, 8), 8),
}
WITHOUT_OUTLIERS = [case for case in CASES if case not in ("t", "one outlier")]
#: Arguments of the prior by name of the form; with a τ for each task, the learned τ is the median one.
FORMS: dict[str, dict[str, Any]] = {
    "usual": {"per": "model"},
    "robust": {"per": "model", "robust": True},
    "task": {"per": "task"},
}


@dataclass(kw_only=True)
class SimulateConfig:
    """Simulate linear-Gaussian hierarchies and learn their tau."""

    taus: list[str] = option(["1", "100", "10000"], "the true precisions (default: 1 100 10000)")
    starts: list[str] = option([TRUTH, "1", "100", "10000"], "where tau starts (default: truth 1 100 10000)")
    rates: list[str] = option(["0.003", "0.01", "0.03"], "learning rates (default: 0.003 0.01 0.03)")
    steps: list[str] = option(["60", "200", "600", "2000"], "steps of a fit (default: 60 200 600 2000)")
    draws: int = option(2, "simulated hierarchies for each cell of the grid")
    case_draws: int = option(20, "the same for the small and unequal designs: rate 0.01, 60 and 200 steps, tau starts at 100")
    reach: float = option(FitOptions().deviation_reach, "deviation_reach of the fits; 0: one rate for all")
    cases: list[str] = option([*WITHOUT_OUTLIERS], f"of {', '.join(CASES)} (default: those without outliers)")
    forms: list[str] = option(["usual"], f"how tau is learned: {', '.join(FORMS)} (default: usual)")
    output: str = option("results/simulated_tau.csv", "the table, one row for each simulation")

    def validate(self) -> None:
        """Check the values."""
        check_at_least("draws", self.draws, 1)
        check_at_least("case_draws", self.case_draws, 1)
        for case in self.cases:
            check_one_of("case", case, CASES)
        for form in self.forms:
            check_one_of("form", form, FORMS)
        starts = [start for start in self.starts if start != TRUTH]
        for name, values in (("taus", self.taus), ("starts", starts), ("rates", self.rates), ("steps", self.steps)):
            for value in values:
                if not is_positive(value, whole=name == "steps"):
                    kind = "a whole number" if name == "steps" else "a finite number"
                    raise InputError(f"{name} has {value!r}; give {kind} above 0")


def is_positive(text: str, *, whole: bool) -> bool:
    """Whether a text is a finite number above 0, or a whole one.

    >>> is_positive("0.5", whole=False), is_positive("0.5", whole=True), is_positive("x", whole=False)
    (True, False, False)
    """
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        return False
    return 0 < value < math.inf


@dataclass(frozen=True)
class Hierarchy:
    """Documents of tasks that were drawn with a known τ.

    Attributes:
        y: (tasks, layers, width) mean of each task's training documents.
        count: (tasks,) their numbers, N_d.
        held_out: (documents, layers, width) validation documents.
        held_out_task: (documents,) their tasks.
        noise: σ.
    """

    y: Tensor
    count: Tensor
    held_out: Tensor
    held_out_task: Tensor
    noise: float


def scales(case: str, tasks: int, generator: torch.Generator) -> Tensor:
    """The scale of each task's deviations, divided by the median of their distribution: (tasks, 1, 1)."""
    scale = torch.ones(tasks, 1, 1)
    if case == "t":  # a Normal over the root of χ²/3; the median of χ² with 3 degrees of freedom is 2.366
        scale = (torch.randn((tasks, 1, 1, 3), generator=generator).square().sum(-1) / 2.366) ** -0.5
    if case == "one outlier":
        scale[0] = 5.0
    return scale


def draw(case: str, tau: float, *, tasks: int, documents: tuple[int, int], held_out: int, seed: int) -> Hierarchy:
    """Simulate a hierarchy."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(documents[0], documents[1] + 1, (tasks,), generator=generator)
    noise = math.sqrt(sum(documents) / 2 / tau)
    centre = torch.randn((LAYERS, WIDTH), generator=generator)
    deviations = torch.randn((tasks, LAYERS, WIDTH), generator=generator)
    theta = centre + tau**-0.5 * scales(case, tasks, generator) * deviations
    of_mean = noise / count.sqrt().view(-1, 1, 1)
    y = theta + of_mean * torch.randn((tasks, LAYERS, WIDTH), generator=generator)
    task = torch.arange(tasks).repeat_interleave(held_out)
    return Hierarchy(y, count, theta[task] + noise * torch.randn((len(task), LAYERS, WIDTH), generator=generator), task, noise)


def learn(hierarchy: Hierarchy, prior: LearnedPrecision, *, steps: int, rate: float, reach: float) -> tuple[float, float]:
    """Fit the hierarchy by MAP while the prior learns τ. Returns the mean of τ over the steps, and the last τ."""
    tasks, warmup = len(hierarchy.count), FitOptions().warmup
    start = (hierarchy.y * hierarchy.count.view(-1, 1, 1)).sum(0) / hierarchy.count.sum()

    def theta() -> Tensor:
        return prior.sample_latent(NAME, start, pyro.plate("tasks", tasks, dim=-1))

    def model() -> None:
        value = theta()
        with pyro.plate("means", tasks, dim=-1):
            scale = (hierarchy.noise / hierarchy.count.sqrt()).view(-1, 1, 1)
            pyro.sample("y", dist.Normal(value, scale).to_event(2), obs=hierarchy.y)

    guide, elbo = AutoDelta(model, init_loc_fn=init_to_start), TraceMeanField_ELBO()
    guide()
    parameters = dict(guide.named_parameters())
    own = [parameters[name] for name in deviation_parameters(guide)]
    optimizer, of_deviations = adamw(parameters.values(), own), deviation_rate(rate, reach, steps, warmup)
    least = deviation_rate(rate, min(reach, LEAST_REACH), steps, warmup)
    looks = torch.randperm(len(hierarchy.held_out), generator=torch.Generator().manual_seed(0)).split(LOOK)
    mean = TrajectoryMean({NAME: prior.precision(NAME, start).log()})
    for step in range(steps):
        part = schedule(step, steps, warmup)
        with pyro.validation_enabled(False):
            (elbo.differentiable_loss(model, guide) / hierarchy.count.sum()).backward()
        tau = dict.fromkeys(own, prior.precision(NAME, start))
        per_square = hierarchy.count.sum().square().float()
        take_step(optimizer, Rates(part, rate, of_deviations, per_square=per_square, least=least), tau)
        if (step + 1) % prior.every == 0:
            before = prior.precision(NAME, start)
            look(hierarchy, prior, theta, guide, looks[(step // prior.every) % len(looks)])
            factor = gradient_factors({NAME: before}, {NAME: prior.precision(NAME, start)})[NAME]
            rescale(optimizer, ((parameter, factor) for parameter in own))
        mean.add({NAME: prior.precision(NAME, start).log()})
    return float(mean.values[NAME].exp().median()), float(prior.precision(NAME, start).median())


@torch.no_grad()
def look(hierarchy: Hierarchy, prior: LearnedPrecision, theta: Any, guide: AutoDelta, chosen: Tensor) -> None:
    """Show the prior some validation documents."""
    values = poutine.condition(theta, data=guide.median())()
    task = hierarchy.held_out_task[chosen]
    gradients = (hierarchy.held_out[chosen] - values[task]) / hierarchy.noise**2
    prior.learn({NAME: (values - values.mean(0))[task]}, {NAME: gradients}, task)


def simulations(config: SimulateConfig) -> Iterator[dict[str, Any]]:
    """The settings of all simulations."""
    for form, case in itertools.product(config.forms, config.cases):
        grid = case == "grid"
        rates, steps, starts = (config.rates, config.steps, config.starts) if grid else (["0.01"], ["60", "200"], ["100"])
        draws = config.draws if grid else config.case_draws
        for tau, rate, number, start in itertools.product(config.taus, rates, steps, starts):
            for seed in range(draws):
                cell = {"form": form, "case": case, "tau": float(tau), "rate": float(rate), "steps": int(number), "start": start}
                yield cell | {"seed": seed}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """learned / true by case, rate and steps: the lowest and highest cell, each the geometric mean of its draws."""
    rows = rows.assign(log_ratio=(rows["learned"] / rows["tau"]).map(math.log))
    cells = rows.groupby(["form", "case", "rate", "steps", "tau", "start"], sort=False)["log_ratio"].mean().map(math.exp)
    return cells.groupby(["form", "case", "rate", "steps"], sort=False).agg(["min", "median", "max"])


def main(argv: list[str]) -> int:
    """Simulate, learn, write the table, and print how far the learned τ is from the true τ."""
    try:
        config = parse_config(SimulateConfig, argv, prog="simulate_tau.py")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for cell in simulations(config):
        tasks, documents, held_out = CASES[cell["case"]]
        hierarchy = draw(cell["case"], cell["tau"], tasks=tasks, documents=documents, held_out=held_out, seed=cell["seed"])
        start = cell["tau"] if cell["start"] == TRUTH else float(cell["start"])
        prior = LearnedPrecision(start=start, **FORMS[cell["form"]])
        learned, last = learn(hierarchy, prior, steps=cell["steps"], rate=cell["rate"], reach=config.reach)
        rows.append(cell | {"learned": learned, "last": last})
    table = pd.DataFrame(rows)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.output, index=False, float_format="%.6g")
    print("learned / true; the lowest, middle and highest cell (true tau x start), each a geometric mean over draws")
    print(summary(table).to_string(float_format="{:.2f}".format))
    return 0


if __name__ == "__main__":
    run_script(main)
