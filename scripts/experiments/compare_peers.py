"""Compare BoRA with what else one would do with LoRA for many tasks, on the same documents, through PEFT and transformers.

    python scripts/experiments/compare_peers.py --fit_config results/documentation.yaml --output results/peers_documentation.csv

All arms have the same base, layers, rank, documents, batches in the same order, epochs, schedule and early stopping, and the same
mean of their steps (``--average false``: none has it). They are scored by the same code. The fits have the options of
``--fit_config``, except ``tau``, ``learning_rate`` and ``seed``. The arms:

- ``base``: no adapter. ``base_task_id``: with the name of the task as the first line of each document.
- ``bora_learned``, ``bora_inf`` (one adapter for all), ``bora_0`` (one a task), ``bora_100`` or any other τ.
- ``bora_learned_task_id``, or with any other τ: BoRA, with the names too.
- ``peft_one``: one LoRA for all tasks.
- ``peft_each``: one LoRA a task. Each is stopped by its own validation documents.
- ``peft_one_then_each``: half of the epochs (rounded up) one LoRA for all, then the other half one a task from there.
- ``peft_soup``, ``peft_soup_delta``: the mean over tasks of the adapters of ``peft_each``: of (A, B), and of the changes B A.
- ``peft_task_id``: one LoRA, with the name of the task as the first line of each document. The name is read, not predicted.
- ``peft_big``: one LoRA of rank D r, as many parameters as one a task have, or the largest rank that the layers have room for.
- ``hydra``: an A for all tasks and a B for each, as in HydraLoRA without its router: the task is known.

Each arm is fitted at its own best learning rate, and the comparison can be interrupted (``arm_table.py``). Other seeds have other
splits, starts and orders. Every fit is a process of its own (``peer_fits.py``).

The columns: ``averaged`` is the share of tasks whose kept state is a mean of steps; ``adapter_bytes`` are PEFT folders (and Θ,
where there is one); ``training_tokens`` are predicted tokens of all steps; ``tau_A`` and ``tau_B`` are geometric means of τ over
the entries of A and of B; ``test_accuracy`` is that of ``options_column``, if ``fit_config`` has it; ``tasks`` is JSON with each
task's documents, perplexities and accuracy. The soups have the cost of ``peft_each``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from arm_table import KEYS, ArmTable, GridOptions, Run, run_table
from paired_ratios import by_seed, by_task, mean_sd
from peer_options import BORA, NAMED, SOUPS, THROUGH_PEFT, FitOf

from bora_pyro.data.tables import check_source
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError, nearest
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.runs.stored_options import fit_options

ARMS = (
    "base", "base_task_id", "bora_learned", "bora_learned_task_id", "bora_inf", "bora_0", "peft_one", "peft_each",
    "peft_one_then_each", *SOUPS, "peft_task_id", "peft_big", "hydra",
)  # fmt: skip
REFERENCE = "bora_learned"
COLUMNS = [
    *KEYS, "validation_perplexity", "test_perplexity", "test_accuracy", "best_epoch", "averaged", "training_tokens",
    "trainable_parameters", "rank", "adapter_bytes", "seconds", "peak_memory_bytes", "tau_A", "tau_B", "logit_difference",
    "documents_digest", "options", "tasks",
]  # fmt: skip
#: Options of a fit that an arm sets itself.
NOT_SHARED = {
    "tau", "tau_per", "tau_start", "prior", "prior_option", "prior_form", "penalty", "start_as", "learning_rate",
}  # fmt: skip


@dataclass(kw_only=True)
class PeersConfig(GridOptions, FitOf):
    """Compare BoRA with other uses of LoRA for many tasks, through PEFT and transformers."""

    arms: list[str] = option([*ARMS], f"which arms; bora_ with any tau is one, as bora_100 (default: {' '.join(ARMS)})")
    output: str = option("results/peers_documentation.csv", "the table, one row a fit and arm; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        super().validate()
        for arm in self.arms:
            check_arm(arm)
        self.check_rates()
        self.fit()


def check_arm(arm: str) -> None:
    """Raise ``InputError`` if there is no such arm.

    >>> check_arm("bora_1e3"), check_arm("bora_inf_task_id")
    (None, None)
    >>> check_arm("bora_fast")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: arm bora_fast has no tau; give a number from 0 up, inf or learned, as in bora_100
    """
    if arm.startswith(BORA) and arm not in ARMS:
        try:
            usable = (text := arm.removeprefix(BORA).removesuffix(NAMED)) == "learned" or float(text) >= 0
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"arm {arm} has no tau; give a number from 0 up, inf or learned, as in bora_100")
    elif arm not in ARMS:
        raise InputError(f"arm {arm!r} is not known; known: {', '.join(ARMS)}{nearest(arm, ARMS)}")


def trained_arm(arm: str) -> str:
    """The arm whose fit gives an arm.

    >>> trained_arm("peft_soup"), trained_arm("peft_one")
    ('peft_each', 'peft_one')
    """
    return "peft_each" if arm in SOUPS else arm


class Comparison(ArmTable):
    """The table of the peers."""

    program = (str(Path(__file__).with_name("peer_fits.py")),)
    without_rate = ("base", "base_task_id")

    def __init__(self, config: PeersConfig) -> None:
        self.config = config
        options = fit_options(config.fit(), without=NOT_SHARED)
        super().__init__(config, config.arms, config.output, columns=COLUMNS, options=options)

    def trained(self, arm: str) -> str:
        return trained_arm(arm)

    def words(self, run: Run, result: Path) -> list[str]:
        config = self.config
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(FitOf)}
        given |= {"arm": run.arm, "learning_rate": run.rate, "seed": run.seed, "result": result}
        given = {name: value for name, value in given.items() if value is not None}
        pairs = ((f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in given.items())
        return [word for pair in pairs for word in pair]

    def rows(self, run: Run, result: Path) -> list[dict[str, Any]]:
        found = json.loads(result.read_text(encoding="utf-8"))
        return [row | {"tasks": json.dumps(row["tasks"], ensure_ascii=False)} for row in found]

    def summary(self) -> str:
        """The table in Markdown."""
        chosen = {arm: rows for arm in self.config.arms if len(rows := self.chosen(arm))}
        reference = chosen.get(REFERENCE, self.chosen(REFERENCE))
        header = ["arm", "rate", "validation", "test", "by seed (95 %)", "by task (95 %)"]
        has_accuracy = bool(self.table.test_accuracy.notna().any())
        header += ["accuracy"] * has_accuracy + ["trained parameters", "MB", "seconds", "peak GiB", "fits"]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for arm, rows in sorted(chosen.items(), key=lambda item: float(item[1].validation_perplexity.astype(float).mean())):
            rate = "" if arm == "base" else number_text(float(rows.learning_rate.iloc[0]))
            perplexities = [mean_sd(rows[f"{name}_perplexity"]) for name in ("validation", "test")]
            paired = ["", ""] if arm == REFERENCE else [by_seed(rows, reference), by_task(rows, reference)]
            numbers = rows[["trainable_parameters", "adapter_bytes", "seconds", "peak_memory_bytes"]].astype(float)
            parameters, size, seconds, _ = numbers.mean()
            cost = [f"{parameters:,.0f}", f"{size / 1e6:.2f}", f"{seconds:.0f}", f"{numbers.peak_memory_bytes.max() / 2**30:.2f}"]
            accuracy = [mean_sd(rows.test_accuracy, 3)] if has_accuracy else []
            lines.append(f"| {' | '.join([arm, rate, *perplexities, *paired, *accuracy, *cost, str(len(rows))])} |")
        return "\n".join([*lines, *self.notes(chosen)])

    def notes(self, chosen: Mapping[str, pd.DataFrame]) -> Iterator[str]:
        """What to know of the table."""
        yield (
            "by seed, by task: 100 (test perplexity of the arm / that of bora_learned - 1), paired by seed, with an interval "
            "over seeds (Student's t) or over tasks (bootstrap); above 0: bora_learned is better"
        )
        yield from self.at_ends(list(chosen))
        if REFERENCE in chosen and len(rows := chosen[REFERENCE]):
            for factor in "AB":
                values = rows[f"tau_{factor}"].astype(float)
                yield f"tau of {factor} in bora_learned: {', '.join(f'{value:.3g}' for value in values)} (by seed)"
        for arm in chosen:
            if arm in THROUGH_PEFT:
                rank, apart = float(chosen[arm]["rank"].iloc[0]), float(chosen[arm]["logit_difference"].astype(float).max())
                yield f"{arm}: rank {rank:g}; its logits through PEFT and through this library agree to {apart:.1g}"


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""

    def make() -> Comparison:
        config = parse_config(PeersConfig, argv, prog="compare_peers.py")
        check_source(config.fit().data)
        return Comparison(config)

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
