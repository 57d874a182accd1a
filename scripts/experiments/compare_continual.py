"""Compare ways to fit tasks in sequence by what they learn and what they forget.

    python scripts/experiments/compare_continual.py --output results/continual_documentation.csv

The methods are those of ``continual_arms.py``. Each has its own best learning rate (``arm_table.py``), by the validation
perplexity of all tasks after the last stage: exp of the mean of their losses.

The columns, in nats per token of test documents: ``average`` is the loss after the last stage; ``learning`` is what a task's own
stage gains; ``forgetting`` is what later stages lose of it; ``forward`` is what earlier stages gain for a task; ``last`` is the
gain of the last task in its own stage. A method that freezes everything forgets nothing, and learns nothing here. ``losses`` is
the whole table as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from arm_table import KEYS, ArmTable, GridOptions, Run, run_table
from continual_arms import ARMS, SequenceOptions
from paired_ratios import mean_sd

from bora_pyro.data.tables import check_source
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import check_one_of
from bora_pyro.exchange.continual import Continual, Stage
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.stored_options import fit_options

MEASURES = ("average", "learning", "last", "forgetting", "forward")
COLUMNS = [
    *KEYS, "validation_perplexity", "test_perplexity", *MEASURES, "seconds", "losses", "documents_digest", "options",
]  # fmt: skip


@dataclass(kw_only=True)
class ContinualTableConfig(GridOptions, SequenceOptions):
    """Compare ways to fit tasks in sequence."""

    arms: list[str] = option([*ARMS], f"which methods (default: {' '.join(ARMS)})")
    rates: list[str] = option(["0.003", "0.01", "0.03"], "the grid of learning rates (default: 0.003 0.01 0.03)")
    output: str = option("results/continual_documentation.csv", "the table, one row a sequence; those it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        for arm in self.arms:
            check_one_of("arm", arm, ARMS)
        self.fit()


class Comparison(ArmTable):
    """The table of the methods."""

    program = (str(Path(__file__).with_name("continual_arms.py")),)

    def __init__(self, config: ContinualTableConfig) -> None:
        self.config = config
        own = {name: getattr(config, name) for name in ("order", "penalty", "prior_precision", "preserve_from", "preserve_to")}
        options = fit_options(config.fit(), without=("learning_rate", "tau")) | own
        super().__init__(config, config.arms, config.output, columns=COLUMNS, options=options)

    def words(self, run: Run, result: Path) -> list[str]:
        given = {of.name: getattr(self.config, of.name) for of in fields(SequenceOptions)}
        given |= {"arm": run.arm, "learning_rate": run.rate, "seed": run.seed, "result": result}
        found: list[str] = []
        for name, value in given.items():
            if value is not None:
                found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return found

    def rows(self, run: Run, result: Path) -> list[dict[str, Any]]:
        found = json.loads(result.read_text(encoding="utf-8"))
        row = {"arm": run.arm, "seconds": found["seconds"], "documents_digest": found["digest"], "losses": json.dumps(found)}
        return [row | measures(found)]

    def summary(self) -> str:
        """The table in Markdown, the lowest final loss first."""
        names = ["method", "rate", "test perplexity after the last task", *MEASURES, "s", "fits"]
        lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        chosen = {arm: rows for arm in self.arms if len(rows := self.chosen(arm))}
        for arm in sorted(chosen, key=lambda arm: float(chosen[arm].validation_perplexity.astype(float).mean())):
            rows = chosen[arm]
            cells = [arm, number_text(float(rows.learning_rate.iloc[0])), mean_sd(rows.test_perplexity)]
            cells += ["–" if rows[name].isna().all() else mean_sd(rows[name], 3) for name in MEASURES]
            cells += [f"{rows.seconds.astype(float).mean():.0f}", str(len(rows))]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *self.at_ends(list(chosen))])


def measures(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a sequence, from its losses.

    >>> losses = [{"validation": [1.0, 1.0], "test": [2.0, 3.5]}, {"validation": [1.0, 1.0], "test": [2.5, 3.0]}]
    >>> of = measures({"order": ["a", "b"], "base": {"test": [4.0, 4.0]}, "stages": losses})
    >>> of["average"], of["forgetting"], of["last"], round(of["test_perplexity"], 2), round(of["validation_perplexity"], 2)
    (2.75, 0.5, 0.5, 15.64, 2.72)
    """
    stages: Sequence[Mapping[str, list[float]]] = found["stages"]
    validation, test = (math.exp(sum(stages[-1][split]) / len(stages[-1][split])) for split in ("validation", "test"))
    row: dict[str, float | None] = dict.fromkeys(MEASURES) | {"validation_perplexity": validation, "test_perplexity": test}
    if len(stages) < len(found["order"]):  # fitted at once
        return row | {"average": math.log(test)}
    order = list(found["order"])
    done = [Stage(task, 0.0, 0, 0.0, 0.0, stage["test"]) for task, stage in zip(order, stages, strict=True)]
    of = Continual(order, found["base"]["test"], done)
    last = float(of.matrix[-2, -1] - of.matrix[-1, -1])
    numbers = {name: getattr(of, name) for name in ("average", "learning", "forgetting", "forward")} | {"last": last}
    return row | {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""

    def make() -> Comparison:
        config = parse_config(ContinualTableConfig, argv, prog="compare_continual.py")
        check_source(config.fit().data)
        return Comparison(config)

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
