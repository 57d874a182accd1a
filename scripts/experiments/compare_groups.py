"""Compare a prior with a level of groups of tasks with one without, under learned τ.

    python scripts/experiments/compare_groups.py --fit_config results/averaged_presidents.yaml \\
        --data runs/presidents_groups.csv.gz --groups party century --output results/groups_presidents.csv

The arms are ``none``, and one for each column of groups (``prepare_groups.py`` adds such columns). Every fit is a process of
``bora map-fit`` with the options of ``--fit_config``. Each arm has its own best learning rate (``arm_table.py``). The control of
a column is the column with its groups given to other tasks at random (``party_shuffled``): as many groups of the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arm_table import KEYS, ArmTable, GridOptions, Run, run_table
from paired_ratios import by_seed, mean_sd

from bora_pyro.data.files import read_file
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError, nearest
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.stored_options import fit_options
from bora_pyro.runs.sweep import MAP_FIT

COLUMNS = [
    *KEYS, "validation_perplexity", "test_perplexity", "base_test_perplexity", "best_epoch", "tau", "tau_group", "seconds",
    "documents_digest", "options",
]  # fmt: skip
#: The arm without groups, and the ending of an arm whose groups are shuffled.
NONE, SHUFFLED = "none", "_shuffled"


@dataclass(kw_only=True)
class GroupsConfig(GridOptions):
    """Compare a prior with a level of groups of tasks with one without."""

    fit_config: str = option("results/averaged_presidents.yaml", "YAML file of the options that all fits share")
    data: str = option("runs/presidents_groups.csv.gz", "the documents, a table with the columns of groups", filled=True)
    groups: list[str] = option(["party"], "columns of groups; each is an arm (default: party)")
    shuffled: bool = option(True, "also fit each column with its groups given to other tasks")
    rates: list[str] = option(["0.01", "0.03"], "the grid of learning rates (default: 0.01 0.03)")
    threads: int = option(1, "CPU threads of a fit", least=1)
    runs_dir: str = option("runs/groups", "folder of the runs; they go into its subfolder with the name of the output")
    output: str = option("results/groups_presidents.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        for name in (self.fit_config, self.data):
            if not Path(name).is_file():
                raise InputError(f"{name} does not exist; give an existing file")

    def fit(self) -> MapFitConfig:
        """What the fits share."""
        return parse_config(MapFitConfig, ["--config", self.fit_config, "--data", self.data])


class Comparison(ArmTable):
    """The table of the columns of groups."""

    program = MAP_FIT

    def __init__(self, config: GroupsConfig) -> None:
        self.config, documents = config, read_file(Path(config.data))
        for column in config.groups:
            if column not in documents:
                raise InputError(f"{config.data} has no column {column!r}{nearest(column, map(str, documents.columns))}")
        arms = [NONE, *(name + end for name in config.groups for end in ("", SHUFFLED) if not end or config.shuffled)]
        options = fit_options(config.fit(), without=("learning_rate", "data")) | {"data": [Path(config.data).name]}
        super().__init__(config, arms, config.output, columns=COLUMNS, options=options)

    @property
    def place(self) -> Path:
        """The folder of all runs."""
        return Path(self.config.runs_dir) / Path(self.output).stem

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self.place / "{}-lr{}-seed{}".format(*run)

    def data_of(self, run: Run) -> Path:
        """The documents of a run: those of the configuration, or a copy whose groups are shuffled with the run's seed."""
        if not run.arm.endswith(SHUFFLED):
            return Path(self.config.data)
        path = self.place / f"{run.arm}-seed{run.seed}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        shuffled(read_file(Path(self.config.data)), run.arm.removesuffix(SHUFFLED), seed=run.seed).to_csv(path, index=False)
        return path

    def words(self, run: Run, result: Path) -> list[str]:
        own: dict[str, Any] = {"data": self.data_of(run), "learning_rate": run.rate, "seed": run.seed}
        own |= {"threads": self.config.threads, "output_dir": self.folder(run), "resume": "auto", "export_adapters": "false"}
        own |= {} if run.arm == NONE else {"task_group_column": run.arm.removesuffix(SHUFFLED)}
        words = ["--config", self.config.fit_config, *(word for name, value in own.items() for word in (f"--{name}", str(value)))]
        parse_config(MapFitConfig, words)
        return words

    def rows(self, run: Run, result: Path) -> Sequence[dict[str, Any]]:
        metrics = RunFolder.open(self.folder(run)).read_metrics()
        names = ("validation_perplexity", "test_perplexity", "base_test_perplexity", "best_epoch", "tau")
        row = {name: metrics[name] for name in names} | {"arm": run.arm, "tau_group": metrics.get("tau_group")}
        data = load_run(self.folder(run), device="cpu").data
        data.task_groups = None  # arms differ in their groups, and in no document
        return [row | {"seconds": metrics["fit_seconds"], "documents_digest": data.digest}]

    def summary(self) -> str:
        """The table in Markdown."""
        header = ["groups", "rate", "validation", "test", "to none (95 %)", "τ", "τ of groups", "fits"]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        chosen = {arm: rows for arm in self.arms if len(rows := self.chosen(arm))}
        for arm, rows in chosen.items():
            reference = chosen.get(NONE)
            cells = [arm, number_text(float(rows.learning_rate.iloc[0]))]
            cells += [mean_sd(rows[f"{name}_perplexity"]) for name in ("validation", "test")]
            cells += ["" if reference is None or arm == NONE else by_seed(rows, reference)]
            cells += [
                "" if rows[name].isna().all() else ", ".join(f"{value:.3g}" for value in rows[name])
                for name in ("tau", "tau_group")
            ]
            lines.append(f"| {' | '.join([*cells, str(len(rows))])} |")
        return "\n".join([*lines, *self.at_ends([*chosen])])


def shuffled(documents: pd.DataFrame, column: str, *, seed: int) -> pd.DataFrame:
    """The documents with the groups of a column given to other tasks at random; each task has one.

    >>> documents = pd.DataFrame({"task": ["a", "a", "b", "c"], "party": ["x", "x", "y", "y"]})
    >>> sorted(shuffled(documents, "party", seed=0).drop_duplicates("task").party)
    ['x', 'y', 'y']
    """
    of_task = documents.drop_duplicates("task").set_index("task")[column]
    drawn = pd.Series(np.random.default_rng(seed).permutation(of_task.to_numpy()), index=of_task.index)
    return documents.assign(**{column: documents.task.map(drawn)})


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""
    return run_table(lambda: Comparison(parse_config(GroupsConfig, argv, prog="compare_groups.py")))


if __name__ == "__main__":
    run_script(main)
