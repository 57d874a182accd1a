"""Ask whether tasks with similar documents should have similar adapters: a prior whose mean for a task depends on its vector.

    python scripts/experiments/similar_tasks.py --output results/similar_documentation.csv

The vector of a task is the mean of the base's last hidden states over its training documents (``task_vector.py``), so it is known
before the fit. Its first principal components over the tasks, each with variance 1, are predictors v_dk of the task's mean:

    θ_d ~ Normal(Θ + Σ_k v_dk C_k, I/τ),    C_k ~ Normal(0, I/τ_C),

a regression at the level of the tasks (Gelman and Hill, 2007, section 12.6). Both τ are learned. With τ_C → ∞ it is BoRA's prior.
The deviations of two tasks have the prior covariance v_d·v_d'/τ_C, so tasks with similar vectors have similar adapters.

The arms are ``none`` (BoRA), ``similar``, and the control ``shuffled``, in which each task has the vector of another one. The
first seed chooses each arm's learning rate on validation documents. Rows that the output has are not computed again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from fit_options import OF_PRIOR, check_usual
from paired_ratios import by_seed, mean_sd
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.fit import fit
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option, part_of
from bora_pyro.predict.task_vector import task_vectors
from bora_pyro.priors import GroupedNormal, LearnedPrecision, Prior, with_shared
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options, fit_options, with_options

ARMS = ("none", "similar", "shuffled")
KEYS = ["arm", "learning_rate", "seed"]


@dataclass(kw_only=True)
class SimilarConfig:
    """Compare a prior whose means follow the tasks' vectors with BoRA's."""

    fit_config: str = option("results/averaged_documentation.yaml", "YAML file of the options that all fits share")
    data: str | None = option(None, "the documents (default: as in fit_config)")
    arms: list[str] = option([*ARMS], f"which arms (default: {' '.join(ARMS)})")
    components: int = option(4, "principal components of the vectors", least=2)
    rates: list[str] = option(["0.01", "0.03"], "grid of learning rates (default: 0.01 0.03)", positive=True)
    seeds: int = option(3, "number of seeds, from 0", least=1)
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/similar_documentation.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        for name in self.arms:
            if name not in ARMS:
                raise InputError(f"arm {name!r} is not known; known: {', '.join(ARMS)}{nearest(name, ARMS)}")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")


class SimilarNormal(GroupedNormal):
    """A prior whose mean for a task is Θ + Σ_k v_dk C_k; the C_k take the place of the groups.

    Args:
        predictors: v, (D, K).
        per: what has its own τ and τ_C.
        start: where both start.
    """

    def __init__(self, predictors: Tensor, per: str, start: float) -> None:
        tasks, components = predictors.shape
        # as many names as components; which task has which is not used
        super().__init__([f"{d % components}" for d in range(tasks)], per=per, start=start, start_group=start)
        self.predictors = predictors.float()

    def of_tasks(self, of_groups: Tensor, tasks: Tensor | None = None) -> Tensor:
        rows = self.predictors if tasks is None else self.predictors[tasks.to(self.predictors.device)]
        return torch.tensordot(rows.to(of_groups), of_groups, dims=1)

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """The deviations are those of the tasks alone; at the start of a fit there are none."""
        return {
            f"prior_mean.{name}": mean,
            f"group.{name}_decentered": torch.zeros((len(self.groups), *mean.shape)).to(mean),
            f"theta.{name}_decentered": self.precision(name, mean) ** 0.5 * (theta - mean),
        }


def principal_components(vectors: Tensor, number: int) -> Tensor:
    """The first principal components of some vectors, each with mean 0 and variance 1 over the tasks: (D, number).

    >>> found = principal_components(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 1.0, 4.0], [1.0, 3.0, 1.0]]), 2)
    >>> found.shape, bool((found.square().mean(0) - 1).abs().max() < 1e-5)
    (torch.Size([4, 2]), True)
    """
    centred = vectors.double() - vectors.double().mean(0)
    left, _, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left[:, :number] * len(vectors) ** 0.5).float()


class Comparison:
    """The table, and the fits that fill it."""

    def __init__(self, config: SimilarConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.table: Any = read_results(self.output, KEYS)
        check_usual(self.asked(0), OF_PRIOR, file=config.fit_config, why="the arms have their own")
        self.options = fit_options(self.asked(0), without=("learning_rate",)) | {"components": config.components}
        check_options(self.table, self.options, output=self.output)

    def asked(self, seed: int) -> MapFitConfig:
        """The options of the fits of a seed."""
        words = ["--config", self.config.fit_config, "--seed", str(seed), "--threads", str(self.config.threads)]
        return parse_config(MapFitConfig, words + (["--data", self.config.data] if self.config.data else []))

    def run_all(self) -> None:
        """Do the fits that the table lacks."""
        for seed in range(self.config.seeds):
            missing = [(arm, rate) for arm in self.config.arms for rate in self.rates(arm, seed) if not self.has(arm, rate, seed)]
            if not missing:
                continue
            asked = self.asked(seed)
            model, data = build_run(asked, quiet=True)
            if len(data.tasks) < 2 * self.config.components:
                raise InputError(
                    f"components is {self.config.components}, with {len(data.tasks)} tasks; give at most half as many"
                )
            vectors = task_vectors(model.backbone, data.train, seed=seed).vectors
            predictors = principal_components(vectors, self.config.components)
            for arm in self.config.arms:
                for rate in self.rates(arm, seed):
                    if not self.has(arm, rate, seed):
                        self.run(arm, rate, seed, asked, model, data, predictors)

    def rates(self, arm: str, seed: int) -> list[float]:
        """The learning rates of an arm: all with the first seed, the best of these with the others."""
        rates = [float(rate) for rate in self.config.rates]
        if not seed:
            return rates
        rows = self.table[(self.table.arm == arm) & (self.table.seed == 0)] if len(self.table) else self.table
        return [float(rows.loc[rows.validation_perplexity.astype(float).idxmin(), "learning_rate"])] if len(rows) else rates[:1]

    def has(self, arm: str, rate: float, seed: int) -> bool:
        """Whether the table has a fit."""
        if not len(self.table):
            return False
        rows = self.table[(self.table.arm == arm) & (self.table.seed == seed)]
        return bool((rows.learning_rate.astype(float) == rate).any())

    def run(
        self, arm: str, rate: float, seed: int, asked: MapFitConfig, template: BoRA, data: TaskData, predictors: Tensor
    ) -> None:
        """Do one fit, and add its row."""
        prior: Prior = LearnedPrecision(asked.tau_per, asked.tau_start)
        if arm != "none":
            order = torch.randperm(len(predictors), generator=torch.Generator().manual_seed(seed))
            used = predictors if arm == "similar" else predictors[order]
            prior = SimilarNormal(used, asked.tau_per, asked.tau_start)
        parts: dict[str, Any] = {"adapter": template.adapter, "likelihood": template.likelihood}
        prior = with_shared(prior, template.adapter.shared)
        model = BoRA(template.backbone, template.num_tasks, prior=prior, seed=seed, **parts)
        start = time.perf_counter()
        fitted = fit(model, data, part_of(asked, FitOptions), learning_rate=rate, seed=seed)
        seconds, test = time.perf_counter() - start, fitted.evaluate(data.test)
        row: dict[str, Any] = {"arm": arm, "learning_rate": rate, "seed": seed, "validation_perplexity": fitted.validation_score}
        row |= {"test_perplexity": test["test_perplexity"], "best_epoch": fitted.best_epoch, "tau": fitted.tau()}
        row |= {"tau_of_predictors": mean_tau(prior, model.starts), "seconds": seconds, "documents_digest": data.digest}
        new = pd.DataFrame(with_options([row], self.options))
        self.table = pd.concat([self.table, new.astype(object)], ignore_index=True) if len(self.table) else new
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_results(self.table, self.output)
        scores = f"validation {fitted.validation_score:.3f}, test {row['test_perplexity']:.3f}"
        print(f"{arm:<10} rate {rate:g}  seed {seed}: {scores}  ({seconds:.0f} s)", flush=True)

    def summary(self) -> str:
        """The table in Markdown."""
        header = ["prior mean", "rate", "validation", "test", "to none (95 %)", "τ", "τ of predictors", "fits"]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        chosen = {arm: self.chosen(arm) for arm in self.config.arms}
        for arm, rows in chosen.items():
            if not len(rows):
                continue
            cells = [arm, f"{float(rows.learning_rate.iloc[0]):g}"]
            cells += [mean_sd(rows[f"{name}_perplexity"]) for name in ("validation", "test")]
            cells += ["" if arm == "none" or "none" not in chosen else by_seed(rows, chosen["none"])]
            taus = (rows[name].dropna().astype(float) for name in ("tau", "tau_of_predictors"))
            cells += [", ".join(f"{value:.3g}" for value in values) for values in taus]
            lines.append(f"| {' | '.join([*cells, str(len(rows))])} |")
        return "\n".join(lines)

    def chosen(self, arm: str) -> pd.DataFrame:
        """The rows of an arm at its best rate, one a seed."""
        rows = self.table[self.table.arm == arm]
        if not len(rows):
            return rows
        rate = float(rows.loc[rows[rows.seed == 0].validation_perplexity.astype(float).idxmin(), "learning_rate"])
        return rows[rows.learning_rate.astype(float) == rate].set_index("seed").sort_index()


def mean_tau(prior: Prior, starts: Mapping[str, Tensor]) -> float | None:
    """The harmonic mean of τ_C over the latents; None without predictors."""
    if not isinstance(prior, SimilarNormal):
        return None
    variances = [float(1 / prior.group_precision(name, start).mean()) for name, start in starts.items()]
    return len(variances) / sum(variances)


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(SimilarConfig, argv, prog="similar_tasks.py")
        comparison = Comparison(config)
        comparison.run_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison.summary())
    return 0


if __name__ == "__main__":
    run_script(main)
