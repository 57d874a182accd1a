"""Compare every guide with NUTS, the gold standard, on a model that is small enough to sample its posterior.

    python scripts/experiments/gold_standard.py

A causal language model with one layer and random weights generates the documents of three tasks. Their adapters are drawn from
the hierarchical Normal, so the model is well specified. The adapters are ``FrozenALoRA``'s, where only B is learned: LoRA's (B,
A) and (B G⁻¹, G A) are the same model, and no chain would mix over G. Pyro's NUTS samples the same ``BoRA`` object that the
guides are fitted to, with all documents in one batch, in float32. The normalised layers of the language model bound the
likelihood, so under p(Θ) ∝ 1 the posterior is not strictly proper: far from the MAP it is flat. A chain that starts near the MAP
does not get there as long as r-hat is near 1.

Each guide of ``bora_pyro.guides.GUIDES`` that approximates the posterior density starts at the MAP (not ``map``, ``blob`` and
``task_normal``, which have points, nor ``swag`` and ``tfb``, whose spread comes from mini-batches and held-out documents). It
is fitted by :func:`bora_pyro.fit` with all documents in one batch. The two Laplace guides are not fitted: they replace the
Hessian by the empirical Fisher information Σ_n g_n g_nᵀ. At the true weights of a well specified model both have the same
expectation. With few documents the Fisher information has a large variance. At the MAP it is too small, because the fit has
made the gradients small; the fewer documents a task has, the larger this effect.

The script writes two tables. ``--output`` has a row for each guide and each entry of the adapters: ``quantity`` (``mean`` is Θ,
``deviation`` θ_d − Θ, ``theta`` θ_d), ``documents`` (N_d; 0 for Θ), ``entry``, and posterior mean and standard deviation by NUTS
and by the guide. ``--summary`` has a row for each guide:

- ``error_<N>``: root mean square of (guide's − NUTS' posterior mean of θ_d) / NUTS' sd, for the task with N documents;
- ``<quantity>_<N>``: geometric mean of guide's sd / NUTS' sd; below 1 the guide is too narrow;
- ``log_density``: mean log probability of the held-out tokens under the mixture of draws, in nats; ``log_density_<N>`` by task;
- ``probability_difference``: mean absolute difference of the next-token probabilities from those of NUTS;
- ``elbo``, ``elbo_change``: mean ELBO over the last tenth of the steps, and its change from the tenth before, in nats.

The row ``nuts`` compares the first two chains with each other, which shows the noise of the comparison. It also has ``r_hat``
(largest), ``ess`` (smallest bulk or tail effective sample size) and ``divergences``. The row ``truth`` predicts with the adapters
that generated the documents, and ``map`` with the MAP.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from compare_draws import Sites, compare, diagnostics, entries, probabilities
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoGuide, init_to_value
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from bora_pyro import Backbone, BoRA, FrozenALoRA, HierarchicalNormal, InputError, TaskData, fit
from bora_pyro.data import TokenSplit
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.guides import GUIDES
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import Weights
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option

VOCABULARY, START = 16, 0
EVERYTHING = 10**9  # a token budget that makes one batch of all documents

#: The guides that approximate the posterior density.
COMPARED = [name for name in GUIDES if name not in ("map", "blob", "swag", "tfb", "task_normal")]


@dataclass(kw_only=True)
class GoldStandardConfig:
    """Compare every guide with NUTS on a model small enough for it."""

    documents: list[str] = option(["4", "12", "36"], "training documents of each task (default: 4 12 36)")
    held_out: int = option(50, "held-out documents of each task")
    tokens: int = option(24, "predicted tokens of each document")
    width: int = option(16, "hidden size of the language model")
    rank: int = option(2, "rank of the adapters")
    tau: float = option(4.0, "precision of the prior")
    warmup: int = option(300, "warm-up steps of each chain")
    draws: int = option(500, "draws of each chain")
    chains: int = option(2, "chains, one after the other")
    tree_depth: int = option(6, "largest tree depth of NUTS")
    steps: int = option(4000, "steps of each fit")
    learning_rate: float = option(0.03, "peak learning rate of the fits; a cosine takes it to 0")
    guide_draws: int = option(2000, "draws of a guide for its means and standard deviations")
    mixture: int = option(200, "draws of a predictive mixture")
    seed: int = option(0, "seed of everything")
    output: str = option("results/gold_standard.csv", "the table of entries")
    summary: str = option("results/gold_standard_summary.csv", "the table of guides")

    def validate(self) -> None:
        """Check the values."""
        least = {"held_out": 1, "tokens": 1, "width": 4, "rank": 1, "warmup": 1, "draws": 4, "chains": 2, "tree_depth": 1,
                 "steps": 20, "guide_draws": 2, "mixture": 1}  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {lowest} up")
        if self.width % 2:
            raise InputError(f"width is {self.width}; give an even number for the two heads, nearest: {self.width + 1}")
        if len(self.documents) < 2 or not all(text.isdigit() and int(text) > 0 for text in self.documents):
            raise InputError(f"documents is {' '.join(self.documents)}; give two or more whole numbers above 0")
        if len(set(self.documents)) < len(self.documents):
            raise InputError(f"documents is {' '.join(self.documents)}; give different numbers, which identify the tasks")


@dataclass(frozen=True)
class Problem:
    """A model, documents that it generated, and the adapters θ that it used for them."""

    model: BoRA
    data: TaskData
    theta: Weights


def problem(config: GoldStandardConfig) -> Problem:
    """Draw adapters from the prior and documents from the language model under them."""
    width, counts = config.width, [int(count) for count in config.documents]
    base = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=width, word_embed_proj_dim=width, ffn_dim=2 * width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=config.tokens + 1, dropout=0.0, init_std=0.5, bos_token_id=START,
        eos_token_id=START, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = Backbone(OPTForCausalLM(base), targets=["v_proj"])
    adapter, prior = FrozenALoRA(rank=config.rank), HierarchicalNormal(config.tau)
    model = BoRA(backbone, len(counts), adapter=adapter, prior=prior, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    theta = {}
    for name, start in model.starts.items():
        mean = torch.randn(start.shape, generator=generator)
        theta[name] = mean + config.tau**-0.5 * torch.randn((len(counts), *start.shape), generator=generator)
    train = _documents(model, theta, counts, config.tokens, generator)
    held_out = _documents(model, theta, [config.held_out] * len(counts), config.tokens, generator)
    none = TokenSplit.from_documents([], task=[], num_tasks=len(counts))
    return Problem(model, TaskData([f"{count} documents" for count in counts], train, none, held_out), theta)


@torch.no_grad()
def _documents(model: BoRA, theta: Weights, counts: Sequence[int], tokens: int, generator: torch.Generator) -> TokenSplit:
    task = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = torch.full((len(task), 1), START)
    for _ in range(tokens):
        probabilities = model.backbone.logits(ids, model.change(theta, task))[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return TokenSplit.from_documents(ids.tolist(), task=task.tolist(), num_tasks=len(counts))


def sample(config: GoldStandardConfig, model: BoRA, batch: Batch, maximum: Sites) -> tuple[list[list[Sites]], int]:
    """Sample with NUTS. Chains start near the MAP.

    Args:
        config: the options.
        model: the model.
        batch: all documents.
        maximum: values of the sites at the MAP.

    Returns:
        For each chain its draws as values of the sites, and the number of divergences.
    """
    chains, divergences = [], 0
    for chain in range(config.chains):
        with poutine.seed(rng_seed=config.seed + 1 + chain), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
            start = {name: value + 0.3 * torch.randn_like(value) for name, value in maximum.items()}
            kernel = NUTS(
                model, max_tree_depth=config.tree_depth, init_strategy=init_to_value(values=start), jit_compile=True,
                ignore_jit_warnings=True,
            )  # fmt: skip
            mcmc = MCMC(kernel, num_samples=config.draws, warmup_steps=config.warmup, disable_progbar=True)
            mcmc.run(batch)
        drawn = mcmc.get_samples()
        chains.append([{name: drawn[name][k] for name in maximum} for k in range(config.draws)])
        divergences += sum(map(len, mcmc.diagnostics()["divergences"].values()))
    return chains, divergences


def fitted_guide(config: GoldStandardConfig, problem: Problem, name: str, maximum: Sites | None = None) -> Fitted:
    """Make a guide that starts at the MAP, and fit it to the full batch. Laplace guides are not fitted."""
    model, data = problem.model, problem.data
    guide = GUIDES[name](model, maximum, data=data)
    if name.startswith("laplace"):
        return Fitted(model, guide, data.tasks)
    return fit(
        model, data, guide=guide, epochs=config.steps, learning_rate=config.learning_rate, token_budget=EVERYTHING,
        gradient_clip=math.inf, patience=0, seed=config.seed,
    )  # fmt: skip


def draws_of(guide: AutoGuide, number: int, seed: int) -> list[Sites]:
    """Draws of a guide, as values of the sites."""
    with poutine.seed(rng_seed=seed), torch.no_grad():
        return [{name: value.detach() for name, value in guide().items()} for _ in range(number)]


class Predictions:
    """Predictions of the held-out documents, and their columns in the summary."""

    def __init__(self, problem: Problem, counts: Sequence[int]) -> None:
        self.model, self.counts = problem.model, counts
        [self.batch] = problem.data.test.batches(token_budget=EVERYTHING)
        kept = self.batch.labels[:, 1:] != IGNORED
        self.label, self.task = self.batch.labels[:, 1:][kept], self.batch.task[kept.nonzero()[:, 0]]

    def of_draws(self, draws: Sequence[Sites], number: int) -> Tensor:
        """Next-token probabilities of a mixture of ``number`` evenly spaced draws."""
        chosen = [draws[k * len(draws) // number] for k in range(number)] if number < len(draws) else draws
        return probabilities(self.model, self.batch, (self.model.weights_given(sites)[0] for sites in chosen))

    def of_weights(self, weights: Weights | None) -> Tensor:
        """Next-token probabilities under given θ; None: under the base."""
        return probabilities(self.model, self.batch, [weights])

    def columns(self, found: Tensor, reference: Tensor) -> dict[str, float]:
        """Mean log density of the held-out tokens, in all and by task, and the mean difference from other probabilities.

        Args:
            found: (tokens, vocabulary) probabilities.
            reference: (tokens, vocabulary) probabilities of NUTS.
        """
        log_p = found.double().gather(1, self.label[:, None])[:, 0].log()
        by_task = {f"log_density_{count}": float(log_p[self.task == d].mean()) for d, count in enumerate(self.counts)}
        difference = float((found - reference).abs().mean())
        return {"log_density": float(log_p.mean())} | by_task | {"probability_difference": difference}


def end_of_elbo(fitted: Fitted, observations: int) -> dict[str, float]:
    """Mean ELBO over the last tenth of the steps, and its change from the tenth before, in nats."""
    values = [-report["objective"] * observations for report in fitted.history]
    if not values:
        return {}
    tenth = len(values) // 10
    last, before = (sum(part) / tenth for part in (values[-tenth:], values[-2 * tenth : -tenth]))
    return {"elbo": last, "elbo_change": last - before}


def run(config: GoldStandardConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample, fit every guide, and compare. Returns the table of entries and the table of guides."""
    counts = [int(count) for count in config.documents]
    setting = problem(config)
    model, data = setting.model, setting.data
    [batch] = data.train.batches(token_budget=EVERYTHING)
    maximum = fitted_guide(config, setting, "map").sites()
    chains, divergences = sample(config, model, batch, maximum)
    nuts = [sites for chain in chains for sites in chain]
    reference, predictions = entries(model, nuts), Predictions(setting, counts)
    gold = predictions.of_draws(nuts, config.mixture)

    first, second = (entries(model, chain) for chain in chains[:2])
    noise = predictions.columns(gold, gold) | {
        "probability_difference": float(
            (predictions.of_draws(chains[0], config.mixture) - predictions.of_draws(chains[1], config.mixture)).abs().mean()
        )
    }
    rows: list[dict[str, Any]] = [
        {"guide": "truth"} | predictions.columns(predictions.of_weights(setting.theta), gold),
        {"guide": "base"} | predictions.columns(predictions.of_weights(None), gold),
        {"guide": "nuts"} | compare(counts, first, second)[1] | noise | diagnostics(model, chains) | {"divergences": divergences},
        {"guide": "map"} | predictions.columns(predictions.of_weights(model.weights_given(maximum)[0]), gold),
    ]
    tables = []
    for name in COMPARED:
        fitted = fitted_guide(config, setting, name, maximum)
        draws = draws_of(fitted.guide, config.guide_draws, config.seed)
        table, numbers = compare(counts, reference, entries(model, draws))
        tables.append(table.assign(guide=name))
        predicted = predictions.columns(predictions.of_draws(draws, config.mixture), gold)
        rows.append({"guide": name} | numbers | predicted | end_of_elbo(fitted, data.train.num_tokens))
        print(f"{name}: done", file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def markdown(summary: pd.DataFrame, counts: Sequence[int]) -> str:
    """The summary as a Markdown table."""
    last = counts[-1]
    header = ["", *(f"error of θ, N = {n}" for n in counts), "sd of Θ", *(f"of deviation, N = {n}" for n in (counts[0], last)),
              *(f"of θ, N = {n}" for n in counts), "log density", "|Δp|"]  # fmt: skip
    names = [*(f"error_{n}" for n in counts), "mean", *(f"deviation_{n}" for n in (counts[0], last)),
             *(f"theta_{n}" for n in counts)]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for _, row in summary.iterrows():
        cells = ["–" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in names]
        cells += [f"{row['log_density']:.4f}", f"{row['probability_difference']:.4f}"]
        lines.append(f"| {row['guide']} | {' | '.join(cells)} |")
    nuts = summary.set_index("guide").loc["nuts"]
    of_nuts = f"r-hat at most {nuts['r_hat']:.3f}, ESS at least {nuts['ess']:.0f}, {nuts['divergences']:.0f} divergences"
    lines.append(f"\nNUTS: {of_nuts}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the comparison, write both tables and print the summary."""
    try:
        config = parse_config(GoldStandardConfig, argv, prog="gold_standard.py")
        table, summary = run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, content in ((config.output, table), (config.summary, summary)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    print(markdown(summary, [int(count) for count in config.documents]))
    return 0


if __name__ == "__main__":
    run_script(main)
