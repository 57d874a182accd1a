"""Compare priors in fits from rewards, and adapters of different layers that are composed.

    python scripts/experiments/compare_rewards.py --output results/rewards_documentation.csv

A task is a task of the documents with a number of words as its target (``--words``). The reward of a text is minus the distance
of its number of words from the target. Prompts are the first tokens of documents; training, validation and test prompts are of
different documents, and no held-out prompt is a training prompt. The arms:

- ``base``: no adapter;
- ``independent``, ``tau_T`` for each of ``--taus``, and ``pooled``: rewards under the priors τ = 0, T and ∞, in all layers;
- ``tau_T_one_rate`` for each of ``--one_rate``: the same with one learning rate for Θ and deviations, ``--deviation_reach 0``;
- ``early``: rewards under ``--tau``, in the layers ``--early`` alone;
- ``text`` and ``text_late``: MAP fits under ``--tau`` to the documents of the training prompts, in all layers and in ``--late``;
- ``composed``: ``early`` and ``text_late`` joined by ``bora compose``, without training;
- ``text_then_reward``: rewards under ``--tau`` in all layers, begun at ``text``.

Each arm has its own best learning rate: the largest reward of validation prompts, of MAP fits the lowest validation perplexity
(``arm_table.py``). Every fit is a run folder in ``--runs_dir``, which later arms and a later call read.

The columns, measured on texts behind the test prompts: ``test_reward``; ``entropy`` and ``kl``, in nats a token, from the
log-probabilities of the written tokens under adapter and base; ``tokens`` a text, the end token included. ``test_perplexity``
is that of the test documents, each by the adapter of its task: the drift. ``rollouts``, ``train_rewards``, ``validation_rewards``
and ``kls`` are the trajectory, a number an epoch; ``task_rewards`` are the test rewards of the tasks by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from arm_table import KEYS, BestRates, RateOptions, Run, run_table
from paired_ratios import mean_sd
from reward_tasks import REWARD, RewardTables, score
from reward_texts import about_texts, numbers_text
from torch import Tensor

from bora_pyro import Backbone, BoRA, InputError, LoRA, load_tasks
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data import TaskData
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import nearest, shown
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.rewards.judge import TextJudge
from bora_pyro.runs.compose import ComposeConfig, compose
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.reward_fit import RewardFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.reward_fit import run_reward_fit
from bora_pyro.runs.saved import load_run

TRAJECTORY = ["rollouts", "train_rewards", "validation_rewards", "kls"]
COLUMNS = [
    *KEYS, "validation_reward", "validation_perplexity", "test_reward", "test_perplexity", "kl", "entropy", "tokens",
    "best_epoch", "seconds", *TRAJECTORY, "task_rewards", "documents_digest", "options",
]  # fmt: skip
BASE, COMPOSED, EARLY, TEXT, LATE, BOTH = "base", "composed", "early", "text", "text_late", "text_then_reward"
#: The end of the name of an arm whose deviations have the learning rate of Θ (``--deviation_reach 0``).
ONE_RATE = "_one_rate"
#: The arms whose fits an arm needs.
NEEDS = {COMPOSED: (LATE, EARLY), BOTH: (TEXT,)}
#: Options that change no row.
_NO_EFFECT = {*(field.name for field in dataclasses.fields(RateOptions)), "arms", "threads", "runs_dir", "output"}


@dataclass(kw_only=True)
class RewardsConfig(RateOptions):
    """Compare priors in fits from rewards, and adapters of different layers that are composed."""

    data: str = option("builtin:documentation", "the documents")
    base_model: str = option("builtin:nano", "the frozen language model")
    targets: list[str] = option(["q_proj", "v_proj", "fc1", "fc2"], "layers with adapters (default: q_proj v_proj fc1 fc2)")
    rank: int = option(8, "rank of each adapter", least=1)
    words: list[str] = option(
        ["4", "5", "6", "6", "7", "7", "8", "9"], "the number of words that is best, of each task (default: 4 5 6 6 7 7 8 9)"
    )
    documents: int = option(8, "training documents, and so prompts, of a task at most", least=1)
    held_out: int = option(6, "validation and test documents of a task at most", least=1)
    max_tokens: int = option(48, "longest document in tokens", least=2)
    prompt_tokens: int = option(5, "tokens of a prompt", least=1)
    new_tokens: int = option(10, "tokens of a text at most", least=1)
    samples: int = option(4, "texts behind each prompt of a step", least=2)
    prompts_per_step: int = option(8, "prompts of a step", least=1)
    epochs: int = option(3, "passes over the prompts", least=1)
    text_epochs: int = option(4, "passes over the documents in fits to texts", least=1)
    validation_samples: int = option(2, "texts behind each validation prompt", least=1)
    test_samples: int = option(8, "texts behind each test prompt", least=1)
    taus: list[str] = option(["1", "10", "100"], "precisions between the limits (default: 1 10 100)", positive=True)
    one_rate: list[str] = option(["1", "10"], "the same for fits with one rate for all (default: 1 10)", positive=True)
    tau: float = option(100.0, "precision of the prior of the arms that are not about the prior", positive=True)
    early: list[str] = option(["0-1"], "blocks of the reward's adapter, as for --layers (default: 0-1)")
    late: list[str] = option(["2-3"], "blocks of the text's adapter (default: 2-3)")
    arms: list[str] | None = option(None, "which arms (default: all); those that an arm needs are added")
    rates: list[str] = option(["0.01"], "the grid of learning rates (default: 0.01 alone)")
    seeds: int = option(2, "number of seeds, from 0: other splits and texts", least=1)
    threads: int = option(1, "CPU threads", least=1)
    runs_dir: str = option("runs/rewards", "folder of the runs")
    output: str = option("results/rewards_documentation.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        for text in self.words:
            if not (text.isascii() and text.isdigit() and int(text) >= 1):
                raise InputError(f"words has {shown(text)}; give whole numbers from 1 up")
        if len(self.words) < 2:
            raise InputError(f"words has {len(self.words)} target; give two or more, one for each task")
        for name, taus in (("tau", [str(self.tau)]), ("taus", self.taus), ("one_rate", self.one_rate)):
            if not all(float(tau) < float("inf") for tau in taus):
                raise InputError(
                    f"{name} has {' '.join(taus)}; give finite numbers: the limits are the arms independent and pooled"
                )

    @property
    def priors(self) -> dict[str, float]:
        """The precision of each arm that is about the prior."""
        taus = {f"tau_{number_text(tau)}": float(tau) for tau in self.taus}
        taus |= {f"tau_{number_text(tau)}{ONE_RATE}": float(tau) for tau in self.one_rate}
        return {"independent": 0.0, **taus, "pooled": float("inf")}

    @property
    def all_arms(self) -> list[str]:
        """The names of all arms; an arm comes after those that it needs."""
        return [BASE, *self.priors, EARLY, TEXT, LATE, BOTH, COMPOSED]

    @property
    def chosen_arms(self) -> list[str]:
        """The arms to fit, with those that they need.

        Raises:
            InputError: an arm is not known.
        """
        for name in self.arms or ():
            if name not in self.all_arms:
                raise InputError(
                    f"arm {shown(name)} is not known; known: {', '.join(self.all_arms)}{nearest(name, self.all_arms)}"
                )
        asked = set(self.arms or self.all_arms)
        asked |= {needed for name in asked for needed in NEEDS.get(name, ())}
        return [name for name in self.all_arms if name in asked]

    def of_result(self) -> dict[str, Any]:
        """The options that change the rows. The priors are those of the arms, whose names say them."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in {*_NO_EFFECT, "taus", "one_rate"}}
        return found | {"data": Path(self.data).name}


@dataclass(frozen=True)
class Tables:
    """The tables of a seed as files, and their tokens.

    Attributes:
        folder: the folder of ``documents.csv`` and ``prompts.csv``.
        documents: the documents.
        prompts: the prompts.
    """

    folder: Path
    documents: TaskData
    prompts: TaskData

    @property
    def digest(self) -> str:
        """A digest of both."""
        return f"{self.documents.digest[:16]}-{self.prompts.digest[:16]}"


class Comparison(BestRates):
    """The table of the arms. The fits are done in this process, one after another."""

    without_rate = (BASE, COMPOSED)

    def __init__(self, config: RewardsConfig) -> None:
        self.config, self._tables = config, dict[int, Tables]()
        super().__init__(config, config.chosen_arms, config.output, columns=COLUMNS, options=config.of_result())
        # other options have other folders
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:8]
        self.runs = Path(config.runs_dir) / digest

    def run_all(self) -> None:
        while runs := [run for run in self.next_runs() if run not in self.failed]:
            for run in runs:
                try:
                    row = self.row(run)
                except InputError as error:
                    self.fail(run, str(error))
                else:
                    self.add(run, [row])

    def next_runs_of(self, arm: str) -> list[Run]:
        waits = any(self.next_runs_of(needed) or self.best_rate(needed) is None for needed in NEEDS.get(arm, ()))
        return [] if waits else super().next_runs_of(arm)

    def score(self, row: Mapping[Any, Any]) -> float:
        of_texts = row["arm"] in (TEXT, LATE, *self.without_rate)
        return float(row["validation_perplexity"]) if of_texts else -float(row["validation_reward"])

    def scores_text(self, row: Mapping[Any, Any]) -> str:
        return f"reward {row['test_reward']:.3f}, perplexity {row['test_perplexity']:.2f}, KL {row['kl']:.3f} on test"

    @cached_property
    def backbone(self) -> Backbone:
        """The base."""
        return Backbone.from_pretrained(self.config.base_model, targets=self.config.targets)

    def tables(self, seed: int) -> Tables:
        """The tables of a seed."""
        if seed not in self._tables:
            config, tokenizer = self.config, tokenizer_of(self.backbone)
            data = load_tasks(config.data, tokenizer, max_tokens=config.max_tokens, seed=seed)
            sizes = {name: getattr(config, name) for name in ("prompt_tokens", "documents", "held_out")}
            made = RewardTables.of(data, tokenizer, [int(text) for text in config.words], **sizes)
            folder = self.runs / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            read = []
            for name, column, table in (("documents", "text", made.documents), ("prompts", "prompt", made.prompts)):
                table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
                options: dict[str, Any] = {"text_column": column, "split_column": "split", "max_tokens": config.max_tokens}
                read.append(load_tasks(str(folder / f"{name}.csv"), tokenizer, **options))
            tables = self._tables[seed] = Tables(folder, *read)
            sizes_of = ", ".join(f"{len(getattr(tables.prompts, name))} {name}" for name in ("train", "validation", "test"))
            left_out = f"{made.left_out} held-out documents left out, because another has their beginning"
            print(f"seed {seed}: {len(tables.prompts.tasks)} tasks, prompts: {sizes_of}; {left_out}", file=sys.stderr, flush=True)
        return self._tables[seed]

    def run_of(self, arm: str, seed: int) -> Path:
        """The run of an arm that another needs, at its best rate; it is fitted if its folder is not there."""
        rate = self.best_rate(arm)
        assert rate is not None
        run = Run(arm, rate, seed)
        return self.folder(run) if RunFolder.holds_run(self.folder(run)) else self.fitted(run)

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self.tables(run.seed).folder / (run.arm if run.arm in self.without_rate else f"{run.arm}-lr{run.rate}")

    def fitted(self, run: Run) -> Path:
        """Do a fit, or what is left of it; returns its folder."""
        config, tables, folder = self.config, self.tables(run.seed), self.folder(run)
        shared: dict[str, Any] = {"base_model": config.base_model, "targets": config.targets, "rank": config.rank}
        shared |= {"split_column": "split", "max_tokens": config.max_tokens, "seed": run.seed, "learning_rate": float(run.rate)}
        shared |= {
            "output_dir": str(folder),
            "resume": "auto",
            "export_adapters": False,
            "patience": 0,
            "threads": config.threads,
        }
        shared |= {"tau": config.priors.get(run.arm, config.tau), "device": "cpu"}
        shared |= {"layers": {EARLY: config.early, LATE: config.late}.get(run.arm)}
        if run.arm == COMPOSED:
            # the documents of the composition are those of the first
            runs = [str(self.run_of(needed, run.seed)) for needed in NEEDS[COMPOSED]]
            compose(ComposeConfig(runs=runs, output_dir=str(folder), overwrite=True, device="cpu", threads=config.threads))
        elif run.arm in (TEXT, LATE):
            shared |= {"data": str(tables.folder / "documents.csv"), "epochs": config.text_epochs}
            run_map_fit(MapFitConfig(**shared), quiet=True)
        else:
            names = ("samples", "prompts_per_step", "new_tokens", "epochs", "validation_samples")
            own: dict[str, Any] = {name: getattr(config, name) for name in names}
            own |= {"deviation_reach": 0.0} if run.arm.endswith(ONE_RATE) else {}
            start = {"start_run": str(self.run_of(TEXT, run.seed))} if run.arm == BOTH else {}
            own |= {"prompts": str(tables.folder / "prompts.csv"), "reward": REWARD, "trust_reward_code": True, **start}
            run_reward_fit(RewardFitConfig(**shared, **own), quiet=True)
        return folder

    def row(self, run: Run) -> dict[str, Any]:
        """Fit an arm and measure it."""
        tables, config = self.tables(run.seed), self.config
        if run.arm == BASE:
            model = BoRA(self.backbone, len(tables.prompts.tasks), adapter=LoRA(config.rank))
            return {"arm": run.arm, "seconds": 0.0, "documents_digest": tables.digest} | self.measured(model, None, tables)
        folder = RunFolder.open(self.fitted(run))
        metrics, log = folder.read_metrics(), folder.read_log()
        fitted = load_run(folder.path, device="cpu").fitted
        if fitted.tasks != tables.prompts.tasks:
            raise InputError(f"the run in {folder.path} has other tasks; move it away")
        row = {"arm": run.arm, "documents_digest": tables.digest, "seconds": metrics["fit_seconds"]}
        row |= {"best_epoch": metrics["best_epoch"]} | self.measured(fitted.model, fitted.weights()[0], tables)
        if "reward" not in metrics:
            return row
        row["validation_reward"] = metrics["reward"]["validation_reward"]
        texts = len(tables.prompts.train) * config.samples
        trajectory = [[texts * record["epoch"] for record in log]]
        trajectory += [[record[name] for record in log] for name in ("reward", "validation_reward_last", "kl")]
        return row | {name: numbers_text(values) for name, values in zip(TRAJECTORY, trajectory, strict=True)}

    def measured(self, model: BoRA, theta: dict[str, Tensor] | None, tables: Tables) -> dict[str, Any]:
        """What a model writes behind the test prompts, and how well it predicts the held-out documents."""
        judge = TextJudge(score, tables.prompts.tasks, new_tokens=self.config.new_tokens)
        found = about_texts(model, theta, tables.prompts.test, judge, samples=self.config.test_samples)
        for name, split in (("validation", tables.documents.validation), ("test", tables.documents.test)):
            found[f"{name}_perplexity"] = evaluate(model, split, theta)[0].perplexity()
        return found

    def summary(self) -> str:
        """The arms at their best rates, in Markdown. Gains are paired with the base by seed."""
        marks = self.marks()
        names = ["arm", "rate", *(f"after {mark}" for mark in marks), "test reward", "gain", "perplexity", "KL", "entropy"]
        names += ["tokens", "fits"]
        lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        base = self.chosen(BASE)
        for arm in self.arms:
            rows = self.chosen(arm)
            if not len(rows):
                continue
            trajectory = rows.validation_rewards.dropna()
            by_mark = list(zip(*(str(text).split() for text in trajectory), strict=True))
            cells = [arm, "–" if arm in self.without_rate else number_text(float(rows.learning_rate.iloc[0]))]
            cells += [mean_sd(pd.Series(values)) for values in by_mark] or ["–"] * len(marks)
            cells += [mean_sd(rows.test_reward), mean_sd(rows.test_reward.astype(float) - base.test_reward.astype(float))]
            cells += [mean_sd(rows.test_perplexity), mean_sd(rows.kl, 3), mean_sd(rows.entropy), mean_sd(rows.tokens, 1)]
            lines.append(f"| {' | '.join([*cells, str(len(rows))])} |")
        note = "after N: mean reward of the validation prompts after N training texts; KL and entropy: nats a token"
        return "\n".join([*lines, note, *self.at_ends(self.arms)])

    def marks(self) -> list[str]:
        """The numbers of training texts after which rewards were measured."""
        found = self.table.rollouts.dropna()
        return str(found.iloc[0]).split() if len(found) else []


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""
    transformers.utils.logging.disable_progress_bar()

    def make() -> Comparison:
        config = parse_config(RewardsConfig, argv, prog="compare_rewards.py")
        torch.set_num_threads(config.threads)
        return Comparison(config)

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
