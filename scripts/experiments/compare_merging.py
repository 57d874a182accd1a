"""Merge LoRA adapters that were trained apart into one: means with precisions as weights against PEFT's TIES and DARE.

    python scripts/experiments/compare_merging.py --output results/merging.csv

For each seed some tasks of the documentation are left out. Each other task trains an adapter by itself: from an A of its own,
under no prior, in PEFT's form. Every arm then makes one adapter of them:

- ``mean`` and ``mean_rank_r``: the mean of ΔW (task arithmetic), PEFT's ``cat``, and cut to the rank of one adapter, its ``svd``.
- ``linear``, ``ties``, ``dare_linear``: PEFT's combinations of A and of B.
- ``ties_svd``, ``dare_linear_svd``: PEFT's combinations of ΔW, cut to the rank of one adapter.
- ``documents``: Θ with weights ∝ N_d, as if all differences between tasks were noise.
- ``precision`` and ``precision_rank_r``: Θ with weights ∝ 1/(1/τ + 1/(h N_d)), from the marginal likelihood of τ and h, as
  ``bora pool-adapters --documents`` computes it.

Every arm has a scale of its own and, for TIES and DARE, a density. For each seed the validation documents of the merged tasks
choose both. The merged adapter then predicts the test documents of the tasks that it was made of (``merged``), and those of the
tasks that were left out (``new``). Rows of comparison: ``base``, without an adapter; ``apart``, the task's own adapter;
``shrunk``, that moved a share of the way to Θ, chosen on the same validation documents; and ``together``, a fit of all these
tasks with a learned τ (its adapters on ``merged``, its Θ on ``new``).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor

from bora_pyro import Backbone, BoRA, LoRA, fit, load_tasks, read_peft, save_peft
from bora_pyro.data import DataOptions, TokenSplit
from bora_pyro.data.subset import subset, tasks_to_leave_out
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.pooling.fitted import pooled_fit
from bora_pyro.exchange.pooling.held_out import held_out_shrinkage
from bora_pyro.exchange.pooling.hierarchy import Estimator, FixedShrinkage, Hierarchy, MarginalLikelihood
from bora_pyro.exchange.pooling.pool import pool
from bora_pyro.guides import map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.priors import Independent, LearnedPrecision
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options, options_json

COLUMNS = ["seed", "arm", "scale", "density", "split", "tasks", "perplexity", "seconds"]
#: PEFT's combination for each arm, and whether its weights are a sum (each adapter gets scale/D) or TIES' own mean.
PEFT_ARMS = {
    "mean": ("cat", True), "mean_rank_r": ("svd", True), "linear": ("linear", True), "ties": ("ties", False),
    "ties_svd": ("ties_svd", False), "dare_linear": ("dare_linear", True), "dare_linear_svd": ("dare_linear_svd", True),
}  # fmt: skip
OWN_ARMS = ("documents", "precision", "precision_rank_r")
#: Shares of the way to Θ that are tried for ``shrunk``.
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Deltas = dict[str, Tensor]


@dataclass(kw_only=True)
class MergingConfig:
    """Merge adapters that were trained apart, by precisions and by PEFT's combinations, and score the result."""

    data: str = option("builtin:documentation", "the documents")
    base_model: str = option("builtin:nano", "the frozen language model")
    targets: list[str] = option(["q_proj", "v_proj", "fc1", "fc2"], "layers with adapters (default: q_proj v_proj fc1 fc2)")
    rank: int = option(8, "rank of each adapter", least=1)
    max_tokens: int = option(128, "longest document in tokens", least=2)
    max_train_documents: int = option(16, "training documents of a task at most", least=1)
    max_eval_documents: int = option(8, "validation and test documents of a task at most", least=1)
    left_out: int = option(10, "number of tasks that are left out", least=2)
    epochs: int = option(4, "epochs of the fits", least=1)
    learning_rate: float = option(0.01, "learning rate of the fits", positive=True)
    scales: list[str] = option(["0.5", "1", "2", "4"], "scales of the merged adapter (default: 0.5 1 2 4)")
    densities: list[str] = option(["0.3", "0.7"], "densities of TIES and DARE (default: 0.3 0.7)")
    seeds: int = option(3, "number of seeds, from 0", least=1)
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/merging.csv", "the table; seeds that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        for name, most in (("scales", math.inf), ("densities", 1.0)):
            for text in getattr(self, name):
                try:
                    usable = 0 < float(text) <= most and float(text) < math.inf
                except ValueError:
                    usable = False
                if not usable:
                    raise InputError(f"{name} has {text!r}; give numbers above 0{'' if most > 1 else ', of at most 1'}")

    def of_result(self) -> dict[str, Any]:
        """The options that change the rows of a seed."""
        found = dataclasses.asdict(self) | {"data": Path(self.data).name}
        return {name: value for name, value in found.items() if name not in ("seeds", "threads", "output")}


class ByDocuments(Estimator):
    """All variance is noise with the variance 1/(h N_d): the weights are ∝ N_d."""

    def __init__(self, documents: list[int]) -> None:
        self.documents = torch.tensor(documents, dtype=torch.float64)

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        weights = self.documents / self.documents.sum()
        return Hierarchy(entries, 1.0, math.inf, None, torch.ones_like(weights), weights)


class Merging:
    """The adapters of one seed, and what is made of them."""

    def __init__(self, config: MergingConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.backbone = Backbone.from_pretrained(config.base_model, targets=config.targets)
        assert self.backbone.tokenizer is not None
        sizes = {name: getattr(config, name) for name in ("max_tokens", "max_train_documents", "max_eval_documents")}
        data = load_tasks(config.data, self.backbone.tokenizer, DataOptions(seed=seed, **sizes))
        left_out = tasks_to_leave_out(data, config.left_out, seed=seed)
        self.new = subset(data, left_out)
        self.old = subset(data, [task for task in data.tasks if task not in left_out])
        self.rows: list[dict[str, Any]] = []

    def run(self) -> pd.DataFrame:
        """Train, merge, choose and score; returns the rows of this seed."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            adapters = self.train_apart(Path(folder))
            self.record("apart", self.own_scores(adapters), start)
            self.score_shrunk(adapters)
            self.score_together()
            peft = self.loaded(Path(folder))
            self.score("base", {}, [(1.0, None)])
            scales, densities = map(float, self.config.scales), [float(density) for density in self.config.densities]
            grid = [(scale, density) for scale in scales for density in densities]
            whole = [(scale, None) for scale in dict.fromkeys(scale for scale, _ in grid)]
            for arm, (kind, _) in PEFT_ARMS.items():
                self.score(arm, peft, grid if "ties" in kind or "dare" in kind else whole)
        for arm in OWN_ARMS:
            self.score(arm, self.theta(arm, adapters), whole)
        return pd.DataFrame(self.rows)[COLUMNS]

    def train_apart(self, folder: Path) -> dict[str, PeftAdapter]:
        """Train one adapter for each task, from a start of its own; write PEFT folders and read them back."""
        config, tasks = self.config, self.old.tasks
        model = BoRA(self.backbone, len(tasks), adapter=LoRA(config.rank), prior=Independent())
        starts = [BoRA(self.backbone, 2, adapter=LoRA(config.rank), seed=1000 * self.seed + d).starts for d in range(len(tasks))]
        theta = {name: torch.stack([start[name] for start in starts]) for name in model.starts}
        guide = map_guide(model, model.sites_given(theta, model.starts))
        fitted = fit(
            model, self.old, guide=guide, epochs=config.epochs, learning_rate=config.learning_rate, seed=self.seed, patience=0
        )
        for d, weights, _ in fitted.each_task():
            save_peft(folder / str(d), model, weights)
        return {task: read_peft(folder / str(d)) for d, task in enumerate(tasks)}

    def loaded(self, folder: Path) -> Any:
        """All adapters in one model of PEFT, on a base of its own."""
        from peft import PeftModel

        base = Backbone.from_pretrained(self.config.base_model).model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = PeftModel.from_pretrained(base, str(folder / "0"), adapter_name="0")
            for d in range(1, len(self.old.tasks)):
                peft.load_adapter(str(folder / str(d)), adapter_name=str(d))
        return peft

    def merged_by_peft(self, peft: Any, arm: str, scale: float, density: float | None) -> Deltas:
        """ΔW of each layer of PEFT's weighted adapter."""
        kind, is_sum = PEFT_ARMS[arm]
        names = [str(d) for d in range(len(self.old.tasks))]
        weights = [scale / len(names) if is_sum else scale] * len(names)
        torch.manual_seed(self.seed)  # DARE drops entries at random
        peft.add_weighted_adapter(names, weights, "merged", combination_type=kind, density=density, svd_full_matrices=False)
        modules = dict(peft.base_model.model.named_modules())
        deltas = {path: modules[path].get_delta_weight("merged").detach().clone() for path in self.paths}
        peft.delete_adapter("merged")
        return deltas

    def theta(self, arm: str, adapters: Mapping[str, PeftAdapter]) -> Deltas:
        """ΔW of Θ, the mean with precisions as weights."""
        documents = self.old.train.documents_per_task
        estimator = ByDocuments(documents) if arm == "documents" else MarginalLikelihood(documents)
        rank = self.config.rank if arm.endswith("rank_r") else "full"
        pooled = pool(adapters, self.backbone, estimator, rank=rank, same_base=False)
        scaling = pooled.alpha / next(iter(pooled.mean.values()))["lora_A"].shape[0]
        return {path: scaling * (factors["lora_B"] @ factors["lora_A"]) for path, factors in pooled.mean.items()}

    @property
    def paths(self) -> list[str]:
        """The adapted layers."""
        return [path for slot in self.backbone.slots for path in slot.paths]

    def score(self, arm: str, made: Any, grid: Sequence[tuple[float, float | None]]) -> None:
        """Choose scale and density of an arm on the validation documents, and score the test documents."""
        start, found = time.perf_counter(), {}
        for scale, density in grid:
            if arm in PEFT_ARMS:
                deltas = self.merged_by_peft(made, arm, scale, density)
            else:
                deltas = {path: scale * delta for path, delta in made.items()}
            perplexity = self.perplexity(self.old.validation, deltas)
            self.add(arm, scale, density, "validation", "merged", perplexity, start)
            found[perplexity] = (scale, density, deltas)
        scale, density, deltas = found[min(found)]
        for tasks, data in (("merged", self.old), ("new", self.new)):
            self.add(arm, scale, density, "test", tasks, self.perplexity(data.test, deltas), start)

    def perplexity(self, split: TokenSplit, deltas: Deltas) -> float:
        """Perplexity of a split under the base with ΔW added to its weights."""
        model = BoRA(self.backbone, split.num_tasks, adapter=LoRA(1))
        with _added(self.backbone.model, deltas):
            [scores] = evaluate(model, split, None)
        perplexity = scores.perplexity()
        assert perplexity is not None
        return perplexity

    def own_scores(self, adapters: Mapping[str, PeftAdapter], share: float = 0.0) -> dict[str, float]:
        """Test perplexity of the merged tasks, each with its own adapter moved a share of the way to Θ."""
        fitted = pooled_fit(pool(adapters, self.backbone, FixedShrinkage(share), rank="full", same_base=False))
        return {"merged": fitted.evaluate(self.old.test)["test_perplexity"]}

    def score_shrunk(self, adapters: Mapping[str, PeftAdapter]) -> None:
        """Score the tasks' own adapters after shrinkage towards Θ."""
        start = time.perf_counter()
        held_out = held_out_shrinkage(adapters, self.backbone, self.old.validation, shares=SHARES, same_base=False)
        self.record("shrunk", self.own_scores(adapters, held_out.share), start, scale=held_out.share)

    def score_together(self) -> None:
        """Fit all tasks together with a learned τ, and score its adapters and its Θ."""
        config, start = self.config, time.perf_counter()
        model = BoRA(self.backbone, len(self.old.tasks), adapter=LoRA(config.rank), prior=LearnedPrecision(), seed=self.seed)
        fitted = fit(model, self.old, epochs=config.epochs, learning_rate=config.learning_rate, seed=self.seed, patience=0)
        mean = {name: value[None].expand(len(self.new.tasks), *value.shape) for name, value in fitted.weights()[1].items()}
        new = BoRA(self.backbone, len(self.new.tasks), adapter=LoRA(config.rank))
        [scores] = evaluate(new, self.new.test, mean)
        self.record("together", {"merged": fitted.evaluate(self.old.test)["test_perplexity"], "new": scores.perplexity()}, start)

    def record(self, arm: str, scores: Mapping[str, float | None], start: float, scale: float | None = None) -> None:
        """Add rows of test perplexities."""
        for tasks, perplexity in scores.items():
            self.add(arm, scale, None, "test", tasks, perplexity, start)

    def add(self, *values: Any) -> None:
        """Add one row: the columns from ``arm`` to ``perplexity``, and when its work began."""
        *of_row, start = values
        row = [self.seed, *of_row, round(time.perf_counter() - start, 1)]
        self.rows.append(dict(zip(COLUMNS, row, strict=True)))
        print(*row, flush=True, file=sys.stderr)


@contextmanager
def _added(model: Any, deltas: Deltas) -> Iterator[None]:
    """Add ΔW to the weights of linear layers, and put the old weights back afterwards."""
    before = {}
    try:
        for path, delta in deltas.items():
            layer = model.get_submodule(path)
            before[layer] = layer.weight.data
            layer.weight.data = layer.weight.data + delta
        yield
    finally:
        for layer, weight in before.items():
            layer.weight.data = weight


def summary(table: pd.DataFrame) -> str:
    """A Markdown table of the test perplexities, mean and standard deviation over seeds."""
    test = table[table.split == "test"]
    found = test.groupby(["arm", "tasks"]).perplexity.agg(["mean", "std", "count"])
    lines = ["| arm | merged tasks | new tasks |", "|---|---|---|"]
    for arm in sorted(test.arm.unique(), key=lambda arm: found.loc[(arm, "merged"), "mean"]):
        cells = []
        for tasks in ("merged", "new"):
            if (arm, tasks) not in found.index:
                cells.append("")
                continue
            mean, spread, count = found.loc[(arm, tasks)]
            cells.append(f"{mean:.2f}" + (f" ± {spread:.2f}" if count > 1 else ""))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_all(config: MergingConfig) -> pd.DataFrame:
    """Run the seeds that the table does not have; returns the table."""
    table, options = read_results(config.output, COLUMNS), config.of_result()
    check_options(table, options, output=config.output)
    for seed in range(config.seeds):
        if (table.seed == seed).any():
            continue
        rows = Merging(config, seed).run().assign(options=options_json(options))
        table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
        write_results(table, config.output)
    return table


def main(argv: list[str]) -> int:
    """Run all seeds and print the summary."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(MergingConfig, argv, prog="compare_merging.py")
        torch.set_num_threads(config.threads)
        table = run_all(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(table))
    return 0


if __name__ == "__main__":
    run_script(main)
