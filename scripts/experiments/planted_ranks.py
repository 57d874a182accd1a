"""Plant changes of different rank in the layers of a base, and see whether TriAdaptLoRA's ranks find them.

    python scripts/experiments/planted_ranks.py --output results/planted_ranks.csv

A teacher is the base plus ΔW in some of its layers, each a sum of ``--planted_rank`` random directions of one strength. It writes
documents. The base is fitted to them with one adapter for all (τ = ∞) by TriAdaptLoRA with linear and exponential growth, and by
LoRA of the same total rank. Each arm has its best learning rate on validation documents, chosen with the first seed. The ranks
that a layer got are compared with the planted ones: Spearman's ρ over the layers, and the share of the ranks that lie in planted
layers, beside the share that a random layout would have.

The teacher's own loss is the least that can be reached: ``gap`` is the test loss above it, in nats per token.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from bora_pyro import Backbone, BoRA, InputError, LoRA, Pooled, fit
from bora_pyro.adapters import Adapter, TriAdaptLoRA
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.exchange.merge import merge_into_base
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.results_table import read_results, write_results

ARMS = ("lora", "triadapt_linear", "triadapt_exponential")
KEYS = ["arm", "learning_rate", "seed"]


@dataclass(kw_only=True)
class PlantedConfig:
    """Plant changes of different rank, and see whether TriAdaptLoRA's ranks find them."""

    base_model: str = option("builtin:nano", "the base")
    targets: list[str] = option(["q_proj", "v_proj", "fc1", "fc2"], "the layers that can change")
    planted_layers: int = option(4, "how many layers change", least=1)
    planted_rank: int = option(6, "the rank of each of these changes", least=1)
    strength: float = option(1.0, "norm of a change, as a fraction of that of its weight", positive=True)
    rank: int = option(2, "the average rank of the fitted adapters", least=1)
    documents: int = option(400, "training documents; validation and test have a quarter each", least=4)
    tokens: int = option(64, "tokens of a document", least=4)
    epochs: int = option(8, "epochs of a fit", least=1)
    token_budget: int = option(1024, "tokens of a step", least=4)
    rates: list[str] = option(["0.003", "0.01", "0.03", "0.1"], "learning rates (default: 0.003 0.01 0.03 0.1)", positive=True)
    seeds: int = option(3, "number of seeds, from 0: other layers, directions and documents", least=1)
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/planted_ranks.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)

    def adapter(self, arm: str) -> Adapter:
        """The adapter of an arm."""
        if arm == "lora":
            return LoRA(rank=self.rank)
        most = max(2 * self.rank, self.planted_rank)
        return TriAdaptLoRA(rank=self.rank, max_rank=most, block=1, growth=arm.removeprefix("triadapt_"))


@dataclass(frozen=True)
class Planted:
    """The documents of a teacher.

    Attributes:
        data: two tasks with the documents of one teacher.
        ranks: the planted rank of each layer, in the order of the slots.
        loss: the teacher's own test loss.
    """

    data: TaskData
    ranks: list[int]
    loss: float


@torch.no_grad()
def plant(config: PlantedConfig, seed: int) -> Planted:
    """Make a teacher and let it write the documents."""
    generator = torch.Generator().manual_seed(seed)
    backbone = Backbone.from_pretrained(config.base_model, targets=config.targets)
    layers = [(slot, layer) for slot in backbone.slots for layer in range(slot.layers)]
    if config.planted_layers > len(layers):
        raise InputError(f"planted_layers is {config.planted_layers}; the base has {len(layers)} such layers")
    chosen = set(torch.randperm(len(layers), generator=generator)[: config.planted_layers].tolist())
    model = BoRA(backbone, 2, adapter=LoRA(rank=config.planted_rank), prior=Pooled(), seed=seed)
    weights = {name: torch.zeros_like(value) for name, value in model.starts.items()}
    for place, (slot, layer) in enumerate(layers):
        if place in chosen:
            a, b = (
                torch.linalg.qr(torch.randn((size, config.planted_rank), generator=generator))[0]
                for size in (slot.in_features, slot.out_features)
            )
            norm = config.strength * float(backbone.weight(slot, layer).norm())
            weights[f"{slot.name}.lora_A"][layer] = a.mT
            weights[f"{slot.name}.lora_B"][layer] = b * norm / math.sqrt(config.planted_rank)
    merge_into_base(model, weights)
    number = config.documents + 2 * (config.documents // 4)
    torch.manual_seed(seed)
    first = torch.zeros((number, 1), dtype=torch.int64) + int(backbone.model.config.bos_token_id or 0)
    more = config.tokens - 1
    texts = backbone.model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, max_new_tokens=more, min_new_tokens=more
    )
    ends = (0, config.documents, config.documents + config.documents // 4, number)
    train, validation, test = (_split(texts[low:high]) for low, high in itertools.pairwise(ends))
    (scores,) = evaluate(model, test, None)
    data = TaskData(["a", "b"], train, validation, test)
    ranks = [config.planted_rank if place in chosen else 0 for place in range(len(layers))]
    return Planted(data, ranks, math.log(scores.perplexity() or math.nan))


def _split(texts: Tensor) -> TokenSplit:
    return TokenSplit.from_documents(texts.tolist(), task=[n % 2 for n in range(len(texts))], num_tasks=2)


def fit_arm(config: PlantedConfig, planted: Planted, arm: str, rate: str, seed: int) -> dict[str, Any]:
    """Fit an arm; its row."""
    backbone = Backbone.from_pretrained(config.base_model, targets=config.targets)
    model = BoRA(backbone, 2, adapter=config.adapter(arm), prior=Pooled(), seed=seed)
    options: dict[str, Any] = {"epochs": config.epochs, "token_budget": config.token_budget, "patience": 0}
    fitted = fit(model, planted.data, learning_rate=float(rate), seed=seed, gradient_norm=False, **options)
    base, adapted = evaluate(model, planted.data.test, None, fitted.weights()[0])
    loss, of_base = (math.log(scores.perplexity() or math.nan) for scores in (adapted, base))
    ranks = active_ranks(model)
    row = {"arm": arm, "learning_rate": float(rate), "seed": seed, "validation_perplexity": fitted.validation_perplexity}
    row |= {"base_gap": of_base - planted.loss, "gap": loss - planted.loss, "total_rank": sum(ranks), "seconds": fitted.seconds}
    if len(set(ranks)) > 1:
        inside = sum(rank for rank, of in zip(ranks, planted.ranks, strict=True) if of)
        row |= {"spearman": float(stats.spearmanr(ranks, planted.ranks).statistic), "inside": inside / sum(ranks)}
    row |= {"chance": config.planted_layers / len(ranks), "ranks": " ".join(map(str, ranks))}
    return row | {"planted": " ".join(map(str, planted.ranks))}


def active_ranks(model: BoRA) -> list[int]:
    """The number of active rows of A by layer, in the order of the slots."""
    found = []
    for slot in model.backbone.slots:
        name = f"{slot.name}.lora_A"
        rows = model.starts[name].shape[1]
        mask = model.tensors.masks.get(name)
        found += [rows] * slot.layers if mask is None else [int(row.sum()) for row in mask.flatten(2).any(-1)]
    return found


def missing(config: PlantedConfig, table: pd.DataFrame) -> Iterator[tuple[str, str, int]]:
    """The fits to do: all rates with the first seed, then the best one with the others."""
    records = table.to_dict("records")
    done = {(row["arm"], number_text(row["learning_rate"]), row["seed"]): row["validation_perplexity"] for row in records}
    rates = [number_text(rate) for rate in config.rates]
    for arm in ARMS:
        wanted = [(arm, rate, 0) for rate in rates if (arm, rate, 0) not in done]
        if not wanted:
            scores = {rate: done[arm, rate, 0] for rate in rates}
            best = min(scores, key=scores.__getitem__)
            wanted = [(arm, best, seed) for seed in range(1, config.seeds) if (arm, best, seed) not in done]
        yield from wanted


def summary(config: PlantedConfig, table: pd.DataFrame) -> str:
    """The arms at their best rates, in Markdown."""
    names = ["arm", "rate", "gap to the teacher", "of the base's", "Spearman's ρ", "ranks in planted layers", "fits"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for arm, rows in table.groupby("arm", sort=False):
        first = rows[rows.seed == 0].sort_values("validation_perplexity")
        rate = float(first.learning_rate.iloc[0])
        at = rows[rows.learning_rate == rate]
        cells = [f"{at.gap.mean():.3f}", f"{(at.gap / at.base_gap).mean():.2f}"]
        uneven = at.spearman.notna().any()
        cells += [f"{at.spearman.mean():.2f}" if uneven else "–"]
        cells += [f"{at.inside.mean():.2f} (by chance {at.chance.mean():.2f})" if uneven else "–"]
        lines.append(f"| {arm} | {rate:g} | {' | '.join(cells)} | {len(at)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Plant, fit, and print the table."""
    try:
        config = parse_config(PlantedConfig, argv, prog="planted_ranks.py")
        torch.set_num_threads(config.threads)
        table, made = read_results(config.output, KEYS), dict[int, Planted]()
        while runs := list(missing(config, table)):
            for arm, rate, seed in runs:
                if seed not in made:
                    made[seed] = plant(config, seed)
                row = fit_arm(config, made[seed], arm, rate, seed)
                table = pd.DataFrame([*table.to_dict("records"), row])
                write_results(table, config.output)
                print(f"{arm:<22} rate {rate:>6}  seed {seed}: gap {row['gap']:.3f} of {row['base_gap']:.3f}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(config, table))
    return 0


if __name__ == "__main__":
    run_script(main)
