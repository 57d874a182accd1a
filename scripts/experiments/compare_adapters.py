"""Compare the kinds of adapters at equal numbers of latents a task, under a learned τ.

    python scripts/experiments/compare_adapters.py --output results/adapters_documentation.csv

An arm is an adapter at a budget, as ``sara@8`` (``adapter_arms.py``). The budgets are the latents of LoRA with rank 8 and rank 1,
and half of rank 1, which LoRA cannot have. NOLA is in the lower ones alone: at rank 8 its bases would span all of A and B.
Every fit is a process of ``bora map-fit`` with the options of ``--fit_config``, except ``adapter``, ``rank``, ``learning_rate``,
``seed`` and ``threads``. Each arm has its own best learning rate (``arm_table.py``).

With ``--kept_data`` each fit is also asked what its base has forgotten: ``kept_base`` is the perplexity of some test documents of
these data under the base, and ``kept_adapted`` that under the adapters, each document read by the adapter of every task.

The columns: ``latents`` are those of a task that are active at the end; ``stored_bytes`` are 4 for each of them; ``step_seconds``
is the time of the fit divided by its steps, validation included; ``tau`` is the harmonic mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_arms import BUDGETS, Arm, arms_of
from arm_table import KEYS, ArmTable, GridOptions, Run, run_table
from paired_ratios import by_seed, mean_sd

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import load_tasks
from bora_pyro.data.tables import check_source
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import SavedRun, load_run
from bora_pyro.runs.stored_options import fit_options
from bora_pyro.runs.sweep import MAP_FIT

COLUMNS = [
    *KEYS, "budget", "validation_perplexity", "test_perplexity", "base_test_perplexity", "best_epoch", "latents", "stored_bytes",
    "kept_base", "kept_adapted", "tau", "seconds", "step_seconds", "peak_memory_bytes", "documents_digest", "options",
]  # fmt: skip
#: Options of a fit that an arm sets itself.
NOT_SHARED = ("adapter", "adapter_option", "rank", "alpha", "learning_rate")
REFERENCE = "lora"


@dataclass(kw_only=True)
class AdaptersConfig(GridOptions):
    """Compare the kinds of adapters at equal numbers of latents a task."""

    fit_config: str = option("results/averaged_documentation.yaml", "YAML file of the options that all fits share")
    data: str | None = option(None, "the documents (default: as in fit_config)")
    kept_data: str | None = option(
        None, "documents of the base's own kind, whose test documents say what is forgotten (default: none)"
    )
    kept_documents: int = option(24, "at most so many of them", least=1)
    arms: list[str] | None = option(None, "which arms, as sara@8 (default: all that the base has)")
    rates: list[str] = option(["0.003", "0.01", "0.03"], "the grid of learning rates (default: 0.003 0.01 0.03)")
    threads: int = option(1, "CPU threads of a fit", least=1)
    runs_dir: str = option("runs/adapters", "folder of the runs; they go into its subfolder with the name of the output")
    output: str = option("results/adapters_documentation.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        usual = MapFitConfig()
        for name in NOT_SHARED:
            if (value := getattr(self.fit(), name)) != getattr(usual, name):
                raise InputError(f"{self.fit_config} has {name} {value}, which is that of an arm; leave it out")

    def words(self) -> list[str]:
        """The command line of ``map_fit.py`` for what is shared."""
        return ["--config", self.fit_config, *([] if self.data is None else ["--data", self.data])]

    def fit(self) -> MapFitConfig:
        """What the fits share."""
        return parse_config(MapFitConfig, self.words())


class Comparison(ArmTable):
    """The table of the adapters."""

    program = MAP_FIT

    def __init__(self, config: AdaptersConfig, known: dict[str, Arm]) -> None:
        for name in config.arms or ():
            if name not in known:
                raise InputError(f"arm {name!r} is not known; known: {', '.join(known)}{nearest(name, known)}")
        self.config, self.known = config, known
        options = fit_options(config.fit(), without=NOT_SHARED)
        if config.kept_data is not None:
            options |= {"kept_data": Path(config.kept_data).name, "kept_documents": config.kept_documents}
        super().__init__(config, config.arms or list(known), config.output, columns=COLUMNS, options=options)

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return Path(self.config.runs_dir) / Path(self.output).stem / "{}-lr{}-seed{}".format(*run)

    def words(self, run: Run, result: Path) -> list[str]:
        own = {"learning_rate": run.rate, "seed": run.seed, "threads": self.config.threads, "output_dir": self.folder(run)}
        own |= {"resume": "auto", "export_adapters": "false"}
        words = [
            *self.config.words(),
            *self.known[run.arm].words(),
            *(w for name, v in own.items() for w in (f"--{name}", str(v))),
        ]
        parse_config(MapFitConfig, words)
        return words

    def rows(self, run: Run, result: Path) -> list[dict[str, Any]]:
        folder = self.folder(run)
        metrics, saved = RunFolder.open(folder).read_metrics(), load_run(folder, device="cpu")
        latents = active_latents(saved.fitted.model.starts, saved.fitted.model.tensors.masks)
        shared = ("validation_perplexity", "test_perplexity", "base_test_perplexity", "best_epoch", "tau", "peak_memory_bytes")
        steps = len(saved.data.train.batches(token_budget=saved.config.token_budget)) * metrics["epochs"]
        row = {name: metrics[name] for name in shared} | {"arm": run.arm, "budget": self.known[run.arm].budget}
        row |= kept_perplexities(saved, self.config)
        row |= {"latents": latents, "stored_bytes": 4 * latents, "seconds": metrics["fit_seconds"]}
        return [row | {"step_seconds": metrics["fit_seconds"] / steps, "documents_digest": saved.data.digest}]

    def summary(self) -> str:
        """The table in Markdown, by budget."""
        header = ["arm", "rate", "latents a task", "validation", "test", "to lora of the budget (95 %)", "kept", "τ"]
        header += ["s a step", "peak GiB", "fits"]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        chosen = {arm: rows for arm in self.arms if len(rows := self.chosen(arm))}
        order = sorted(
            chosen, key=lambda arm: (self.known[arm].budget, float(chosen[arm].validation_perplexity.astype(float).mean()))
        )
        for arm in order:
            rows = chosen[arm]
            reference = chosen.get(f"{REFERENCE}@{max(1.0, self.known[arm].budget):g}")
            paired = "" if reference is None or reference is rows else by_seed(rows, reference)
            numbers = rows[["latents", "tau", "step_seconds", "peak_memory_bytes"]].astype(float)
            cells = [arm, number_text(float(rows.learning_rate.iloc[0])), f"{numbers.latents.mean():,.0f}"]
            cells += [mean_sd(rows[f"{name}_perplexity"]) for name in ("validation", "test")]
            kept = rows.kept_adapted.astype(float) / rows.kept_base.astype(float)
            cells += [paired, "" if kept.isna().all() else mean_sd(kept, 3)]
            cells += [f"{numbers.tau.mean():.3g}", f"{numbers.step_seconds.mean():.2f}"]
            cells += [f"{numbers.peak_memory_bytes.max() / 2**30:.2f}", str(len(rows))]
            lines.append(f"| {' | '.join(cells)} |")
        note = "kept: perplexity of the kept documents under the adapters / under the base; above 1 is forgotten"
        return "\n".join([*lines, *([note] if self.config.kept_data else []), *self.at_ends(order)])


@torch.no_grad()
def kept_perplexities(saved: SavedRun, config: AdaptersConfig) -> dict[str, float | None]:
    """Perplexity of the kept documents under the base, and under the adapters of all tasks."""
    if config.kept_data is None:
        return {"kept_base": None, "kept_adapted": None}
    fitted, tokenizer = saved.fitted, saved.fitted.model.backbone.tokenizer
    assert tokenizer is not None
    own = load_tasks(config.kept_data, tokenizer, max_tokens=saved.config.max_tokens).test
    chosen = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[: config.kept_documents]
    tasks = len(fitted.tasks)
    many = own.subset(chosen.repeat(tasks)).replace(task=torch.arange(tasks).repeat_interleave(len(chosen)), num_tasks=tasks)
    weights = fitted.weights_of()
    base, adapted = evaluate(fitted.model, many, None, lambda index: weights(index)[0])
    return {"kept_base": base.perplexity(), "kept_adapted": adapted.perplexity()}


def active_latents(starts: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> int:
    """The number of latents of a task that no mask leaves out; of tasks with different masks, the rounded mean.

    >>> starts = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    >>> active_latents(starts, {"b": torch.tensor([[True], [False]])})
    9
    >>> active_latents(starts, {"b": torch.tensor([[[True], [False]], [[True], [True]]])})  # of two tasks
    10
    """
    total = 0.0
    for name, value in starts.items():
        mask = masks.get(name, torch.ones((), dtype=torch.bool))
        by_task = mask if mask.dim() > value.dim() else mask[None]
        total += float(by_task.expand(len(by_task), *value.shape).sum()) / len(by_task)
    return round(total)


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""

    def make() -> Comparison:
        config = parse_config(AdaptersConfig, argv, prog="compare_adapters.py")
        fit = config.fit()
        check_source(fit.data)
        base = Backbone.from_pretrained(fit.base_model, targets=fit.targets, precision=getattr(torch, fit.precision))
        return Comparison(config, arms_of(base.slots, *BUDGETS))

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
