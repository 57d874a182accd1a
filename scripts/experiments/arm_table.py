"""A table of arms, a row for each fit. Each arm is fitted at its own best learning rate.

With the first seed an arm is fitted at several rates. The rate with the lowest validation perplexity, or another score that a
subclass names, is that of the other seeds.
The test split is only reported. The rows of a fit are written when it ends. If the comparison is interrupted, the same command
goes on with the missing fits. Rows store the options that matter; a table with other options is refused.

``ArmTable`` makes every fit a process of its own. ``BestRates`` is the rest of it, for fits that take seconds.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError
from bora_pyro.options.field import option
from bora_pyro.runs.config.tau_sweep import SEARCHES
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options
from bora_pyro.runs.sweep import Fits, next_rates, run_fits

KEYS = ["arm", "learning_rate", "seed"]


class Run(NamedTuple):
    """One fit; ``arm`` is the arm that is trained."""

    arm: str
    rate: str
    seed: int


@dataclass(kw_only=True)
class RateOptions:
    """The learning rates and the seeds."""

    rates: list[str] = option(
        ["0.001", "0.003", "0.01", "0.03", "0.1"], "the grid of learning rates (default: 0.001 0.003 0.01 0.03 0.1)"
    )
    search: str = option("climb", "climb: from the grid's middle to the nearest minimum; grid: all rates", choices=SEARCHES)
    seeds: int = option(3, "number of seeds, from 0", least=1)

    def check_rates(self) -> None:
        """Sort the rates and write each in one way.

        Raises:
            InputError: one of them is not a finite number above 0.
        """
        try:
            self.rates = sorted({number_text(rate) for rate in self.rates}, key=float)
            usable = all(0 < float(rate) < math.inf for rate in self.rates)
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"rates has {' '.join(self.rates)}; give finite numbers above 0")


@dataclass(kw_only=True)
class GridOptions(RateOptions):
    """The learning rates, the seeds, and how many fits run at once."""

    jobs: int = option(1, "fits that run at the same time, each with --threads threads", least=1)


class BestRates(ABC):
    """The table, and which fits it still needs. A subclass does them.

    Args:
        grid: the learning rates and seeds.
        arms: names of the arms.
        output: the table.
        columns: its columns: ``arm``, ``learning_rate``, ``seed``, ``validation_perplexity``, ``test_perplexity``,
            ``documents_digest``, ``options``, and others.
        options: what all fits share.

    Attributes:
        without_rate: arms that are not trained.
        failed: fits that have failed, and why.
    """

    without_rate: tuple[str, ...] = ()

    def __init__(
        self, grid: RateOptions, arms: Sequence[str], output: str, *, columns: Sequence[str], options: Mapping[str, Any]
    ) -> None:
        self.grid, self.arms, self.output, self.columns, self.options = grid, arms, output, list(columns), options
        self.table = read_results(output, KEYS)
        if len(self.table):
            missing = [name for name in self.columns if name not in self.table]
            if missing:
                raise InputError(f"output {output} has no column {missing[0]!r}; give another file for the table")
            check_options(self.table, options, output=output)
        self.failed: dict[Run, str] = {}

    @abstractmethod
    def run_all(self) -> None:
        """Do all fits that the table does not have, and add their rows.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; finished fits are in the table.
        """

    @abstractmethod
    def summary(self) -> str:
        """The table in Markdown, with notes."""

    def trained(self, arm: str) -> str:
        """The arm whose fit gives an arm."""
        return arm

    def score(self, row: Mapping[Any, Any]) -> float:
        """What the best learning rate has the lowest value of: validation perplexity."""
        return float(row["validation_perplexity"])

    def scores_text(self, row: Mapping[Any, Any]) -> str:
        """What the line about a finished fit says of its row."""
        return f"validation {row['validation_perplexity']:.3f}, test {row['test_perplexity']:.3f}"

    def scores(self, arm: str, seed: int) -> dict[str, float]:
        """The score by learning rate of the fits that were tried."""
        rows = self.table[(self.table.arm == arm) & (self.table.seed == seed)].to_dict("records") if len(self.table) else []
        found = {number_text(row["learning_rate"]): self.score(row) for row in rows}
        failed = {run.rate: math.inf for run in self.failed if run.arm == self.trained(arm) and run.seed == seed}
        return failed | found

    def best_rate(self, arm: str) -> str | None:
        """The learning rate of the lowest score with the first seed."""
        scores = {rate: score for rate, score in self.scores(arm, 0).items() if score < math.inf}
        return min(scores, key=lambda rate: scores[rate]) if scores else None

    def next_runs(self) -> Iterator[Run]:
        """The fits to do next, of all arms, those that have begun included."""
        for arm in self.arms:
            yield from self.next_runs_of(arm)

    def next_runs_of(self, arm: str) -> list[Run]:
        """The fits of an arm to do next."""
        grid, middle = self.grid, self.grid.rates[(len(self.grid.rates) - 1) // 2]
        if arm in self.without_rate:
            return [Run(arm, middle, seed) for seed in range(grid.seeds) if not self.scores(arm, seed)]
        tried = {rate: score for rate, score in self.scores(arm, 0).items() if rate in grid.rates}
        wanted = [Run(self.trained(arm), rate, 0) for rate in next_rates(grid.rates, tried, grid.search)]
        best = self.best_rate(arm)
        if not wanted and best is not None:
            seeds = [seed for seed in range(1, grid.seeds) if best not in self.scores(arm, seed)]
            wanted = [Run(self.trained(arm), best, seed) for seed in seeds]
        return wanted

    def fail(self, run: Run, reason: str) -> None:
        """Record a fit that has failed."""
        self.failed[run] = reason
        which = f"{run.arm}, rate {run.rate}, seed {run.seed}"
        print(f"error: the fit of {which} failed: {reason}", file=sys.stderr, flush=True)

    def add(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of a finished fit."""
        for row in rows:
            if len(self.table):
                own = self.table[self.table.seed == run.seed]
                if (own.documents_digest != row["documents_digest"]).any():
                    raise InputError(
                        f"output {self.output} has fits of seed {run.seed} to other documents; give another --output"
                    )
            about = {"learning_rate": float(run.rate), "seed": run.seed, "options": json.dumps(self.options, sort_keys=True)}
            whole = dict.fromkeys(self.columns) | about | dict(row)
            new = pd.DataFrame([whole])[self.columns]
            self.table = pd.concat([self.table, new.astype(object)], ignore_index=True) if len(self.table) else new
            about_row = f"{self.scores_text(row)}  ({row['seconds']:.0f} s)"
            print(f"{row['arm']:<20} rate {run.rate:>6}  seed {run.seed}: {about_row}", flush=True)
        write_results(self.table, self.output)

    def chosen(self, arm: str) -> pd.DataFrame:
        """The rows of an arm at its best rate, one a seed, by seed."""
        rate = self.best_rate(arm)
        rows = self.table[(self.table.arm == arm) & (self.table.seed < self.grid.seeds)]
        at = rows.learning_rate.astype(float) == (math.nan if rate is None else float(rate))
        return (rows if arm in self.without_rate else rows[at]).drop_duplicates("seed").set_index("seed").sort_index()

    def at_ends(self, arms: Sequence[str]) -> Iterator[str]:
        """Notes on arms whose best rate is an end of the grid, where a larger grid might have a better one."""
        rates = self.grid.rates
        for arm in arms:
            if arm not in self.without_rate and len(rates) > 1 and (rate := self.best_rate(arm)) in (rates[0], rates[-1]):
                yield f"note: {arm} is best at the learning rate {rate}, an end of the grid {' '.join(rates)}"


class ArmTable(BestRates):
    """The table, and the processes that fill it. A subclass says how an arm is fitted, and what its rows are.

    Attributes:
        program: Python's arguments in the process of a fit (:class:`~bora_pyro.runs.sweep.Fits`).
        grid: the learning rates, the seeds, and how many fits run at once.
    """

    program: tuple[str, ...]
    grid: GridOptions

    @abstractmethod
    def words(self, run: Run, result: Path) -> list[str]:
        """The command line of a fit. ``result`` is a path for what it leaves, in a folder that is deleted at the end."""

    @abstractmethod
    def rows(self, run: Run, result: Path) -> Sequence[Mapping[str, Any]]:
        """The rows of a finished fit: of its arm, and of arms that come with it."""

    def run_all(self) -> None:
        with tempfile.TemporaryDirectory() as folder:

            def place(run: Run) -> Path:
                return Path(folder) / f"{run.arm}-{run.rate}-{run.seed}.json"

            def finish(run: Run, reason: str | None) -> None:
                if reason:
                    self.fail(run, reason)
                else:
                    self.add(run, self.rows(run, place(run)))

            run_fits(Fits(self.program, self.grid.jobs), self.next_runs, lambda run: self.words(run, place(run)), finish)


def run_table(make: Callable[[], BestRates]) -> int:
    """The command of a table: make it, do the missing fits, print it, and return the exit code."""
    try:
        table = make()
        table.run_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.summary() if len(table.table) else "no fit has finished")
    if table.failed:
        print(f"error: {len(table.failed)} fits failed; the same command tries them again", file=sys.stderr)
        return 2
    return 0
