"""How strong should the prior be? Perplexity against τ, each τ at its own best learning rate; the validation split chooses.

    python scripts/tau_sweep.py --taus 0 1 10 100 1000 10000 inf learned --output results/documentation

Every fit is a run of ``scripts/map_fit.py`` with the options of ``--fit_config``, in a process of its own. With the first seed
each τ is fitted at several learning rates; the lowest validation perplexity chooses the rate, and the other seeds (other
splits, other starts) are fitted at it. Table and figure are written again after every fit. A finished run is not repeated,
and one that was interrupted goes on: give the same command again. ``--path warm`` relaxes τ within one fit instead.
"""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from matplotlib.figure import Figure

from bora_pyro.data import TaskData
from bora_pyro.diagnostics.plots import style, tau_curve
from bora_pyro.diagnostics.plots.warm_path import warm_curve, warm_summary
from bora_pyro.diagnostics.sweep_table import (
    LEARNED,
    best_rates,
    best_tau,
    number_text,
    read_sweep,
    runs,
    summary,
    tau_order,
    with_run,
    write_sweep,
)
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.inference.warm_path import WarmPoint, warm_path
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors import Prior, prior_from_tau, with_shared
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.sweep import SEARCHES, Fits, Run, can_resume, finished_rows, interrupts, next_rates

# What a warm path hands to every fit.
_FIT_OPTIONS = ("learning_rate", "warmup", "token_budget", "accumulate", "gradient_clip", "patience", "seed")
MAP_FIT = Path(__file__).parent / "map_fit.py"


@dataclass(kw_only=True)
class SweepConfig:
    """Fit a range of τ, each at its own best learning rate, and let the validation split choose."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options that all fits share")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    taus: list[str] = option(
        ["0", "1", "10", "100", "1000", "10000", "inf", LEARNED],
        "precisions of the prior: numbers, inf or learned (default: 0 1 10 100 1000 10000 inf learned)",
    )
    learning_rates: list[str] = option(["0.003", "0.01", "0.03"], "the grid of learning rates (default: 0.003 0.01 0.03)")
    search: str = option("climb", "climb: from the grid's middle to the nearest minimum; grid: all rates", choices=SEARCHES)
    seeds: int = option(3, "how many seeds, from 0")
    jobs: int = option(2, "fits that run at the same time, one thread each")
    path: str = option(
        "cold", "cold: a fit for each tau; warm: one fit that relaxes tau, at the grid's middle rate", choices=("cold", "warm")
    )
    warm_epochs: int = option(2, "epochs at each tau of a warm path but the first, which has those of fit_config")
    runs_dir: str = option("runs/sweep", "where the run folders go, in a folder of the output's name")
    output: str = option(
        "results/documentation", "table and figure: .csv, .parquet and .png; runs that the table has are not repeated"
    )

    def validate(self) -> None:
        """Check the values, put τ and rates in order, and see that map_fit.py takes them."""
        check_choices(self)
        for name in ("seeds", "jobs", "warm_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        self.taus = sorted(_texts("taus", self.taus, f"numbers from 0 up, inf or {LEARNED}"), key=tau_order)
        rates = _texts("learning_rates", self.learning_rates, "numbers above 0")
        if LEARNED in rates:
            raise InputError(f"learning_rates has {LEARNED!r}; give numbers above 0")
        self.learning_rates = sorted(rates, key=float)
        if len(self.taus) < 2 or (self.path == "warm" and len(self.numbers) < 2):
            raise InputError(f"taus has only {' and '.join(self.taus)}; a sweep needs two or more numbers, such as 0 100 inf")
        first_tau, first_rate = self.numbers[0] if self.numbers else self.taus[0], self.learning_rates[0]
        taus = self.taus if self.path == "cold" else self.numbers
        for run in [*(Run(tau, first_rate, 0) for tau in taus), *(Run(first_tau, rate, 0) for rate in self.learning_rates)]:
            self.fit(run)

    @property
    def numbers(self) -> list[str]:
        """The τ that are numbers."""
        return [tau for tau in self.taus if tau != LEARNED]

    @property
    def stem(self) -> Path:
        """The output without its ending."""
        path = Path(self.output)
        return path.with_suffix("") if path.suffix in (".csv", ".parquet", ".png") else path

    def arguments(self, run: Run) -> list[str]:
        """What map_fit.py is called with."""
        folder = Path(self.runs_dir) / self.stem.name / run.folder
        own = {"tau": run.tau, "learning_rate": run.rate, "seed": run.seed, "threads": 1, "output_dir": folder}
        own |= {} if self.data is None else {"data": self.data}
        return ["--config", self.fit_config, *(word for name, value in own.items() for word in (f"--{name}", str(value)))]

    def fit(self, run: Run) -> MapFitConfig:
        """The configuration that map_fit.py makes of it."""
        return parse_config(MapFitConfig, self.arguments(run))


def _texts(name: str, values: list[str], allowed: str) -> set[str]:
    texts = set()
    for value in values:
        try:
            texts.add(number_text(value))
        except ValueError:
            raise InputError(f"{name} has {value!r}; give {allowed}") from None
    return texts


def _table(config: SweepConfig) -> pd.DataFrame | None:
    """The table that is there already."""
    file = config.stem.with_name(f"{config.stem.name}.csv")
    try:
        return read_sweep(file) if file.exists() else None
    except InputError as error:
        raise InputError(f"{error}, move it away, or give another --output") from None


class Sweep:
    """The runs of one sweep, and the table that they fill."""

    def __init__(self, config: SweepConfig) -> None:
        self.config, self.failed = config, dict[Run, str]()
        self.started: set[Run] = set()
        self.table = _table(config)

    def run(self) -> None:
        """Take over what is finished, and fit the rest.

        Raises:
            InputError: no fit can begin, or there is nothing to choose by. What is finished is in the table.
            KeyboardInterrupt: the fits have been ended; what was finished is in the table.
        """
        self.take_over()
        if not any(self.next_runs(tau) for tau in self.config.taus):
            return
        self.tokenise()
        fits, waiting = Fits(MAP_FIT, self.config.jobs), dict[Future[str | None], Run]()

        def begin(tau: str) -> None:
            for run in self.next_runs(tau):
                self.started.add(run)
                resume, overwrite = ("true", "false") if can_resume(self.config.fit(run)) else ("false", "true")
                line = [*self.config.arguments(run), "--resume", resume, "--overwrite", overwrite]
                waiting[fits.start(line)] = run

        with interrupts() as asked:
            try:
                for tau in self.config.taus:
                    begin(tau)
                while waiting:
                    done = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done
                    if asked.is_set():
                        raise KeyboardInterrupt
                    for future in done:
                        run = waiting.pop(future)
                        self.finish(run, future.result())
                        begin(run.tau)
            finally:
                fits.stop()

    def take_over(self) -> None:
        """Put the runs whose folders are finished into the table.

        Raises:
            InputError: a folder holds something that no run wrote, or a finished run with other options.
        """
        config, problems = self.config, []
        for run in (
            Run(tau, rate, seed) for tau in config.taus for rate in config.learning_rates for seed in range(config.seeds)
        ):
            try:
                rows = finished_rows(config.fit(run), tau=run.tau, learning_rate=run.rate)
            except InputError as error:
                problems.append(str(error))
            else:
                self.table = self.table if rows is None else with_run(self.table, rows)
        if self.table is not None:
            print(f"{len(runs(self.table))} finished runs are taken over", flush=True)
            self.write()
        if problems:
            raise InputError(problems[0] + (f" (so it is with {len(problems)} folders)" if len(problems) > 1 else ""))

    def next_runs(self, tau: str) -> list[Run]:
        """What to fit next of a τ: the first seed at other learning rates, in the end the other seeds at the best one."""
        scores = dict.fromkeys(self.failed, float("inf"))
        for row in [] if self.table is None else runs(self.table).to_dict("records"):
            scores[Run(row["tau"], row["learning_rate"], row["seed"])] = row["validation_perplexity"]
        rates = self.config.learning_rates
        tried = {rate: scores[Run(tau, rate, 0)] for rate in rates if Run(tau, rate, 0) in scores}
        wanted = [Run(tau, rate, 0) for rate in next_rates(rates, tried, self.config.search)]
        if not wanted and self.table is not None and (best := best_rates(self.table).get(tau)):
            wanted = [Run(tau, best, seed) for seed in range(1, self.config.seeds)]
        return [run for run in wanted if run not in scores and run not in self.started]

    def tokenise(self) -> None:
        """Read and tokenise each seed's split, before the fits begin: they find the tokens in the cache."""
        for seed in range(self.config.seeds):
            run = self.config.fit(Run(self.config.taus[0], self.config.learning_rates[0], seed))
            _check_validation(build_run(dataclasses.replace(run, device="cpu"), quiet=seed > 0)[1])

    def finish(self, run: Run, reason: str | None) -> None:
        """Put a run that has ended into the table, or say why it failed."""
        try:
            if reason:
                raise InputError(reason)
            rows = rows_of_run(self.config.fit(run).output_dir, tau=run.tau, learning_rate=run.rate)
        except InputError as error:
            self.failed[run] = str(error)
            print(f"error: the fit with {run} failed: {error}", file=sys.stderr, flush=True)
            return
        self.table, row = with_run(self.table, rows), rows.iloc[0]
        scores = f"validation perplexity {row.validation_perplexity:.2f}, test {row.test_perplexity:.2f}"
        print(f"tau {run.tau:>7}  rate {run.rate:>6}  seed {run.seed}: {scores}  ({row.fit_seconds:.0f} s)", flush=True)
        self.write()

    def write(self) -> None:
        """Write the table and its figure."""
        assert self.table is not None
        write_sweep(self.table, self.config.stem)
        best_rates(self.table)  # an error where no run can be chosen by
        if self.table.test_perplexity.notna().any():
            with style():
                figure = Figure(figsize=(5.5, 4.0))
                tau_curve(self.table, figure.subplots())
                _save(figure, self.config.stem)


def _check_validation(data: TaskData) -> None:
    if not data.validation.num_tokens:
        raise InputError("there is no validation document, and nothing else may choose tau; give data with a validation split")


def _save(figure: Figure, stem: Path) -> None:
    replace_file(stem.with_name(f"{stem.name}.png"), lambda file: figure.savefig(file, format="png"))


def run_warm(config: SweepConfig) -> pd.DataFrame:
    """A path from the largest τ to the smallest for each seed; its table and figure are ``<output>_warm``."""
    rate, rows = config.learning_rates[(len(config.learning_rates) - 1) // 2], list[dict[str, Any]]()
    stem, cold = config.stem.with_name(f"{config.stem.name}_warm"), _table(config)
    for seed in range(config.seeds):
        run = config.fit(Run(config.numbers[-1], rate, seed))
        if run.scale_learning_rate_with_tau:
            raise InputError("scale_learning_rate_with_tau belongs to a fit with one tau; leave it out for --path warm")
        model, data = build_run(run, quiet=seed > 0)
        _check_validation(data)

        def record(point: WarmPoint, seed: int = seed) -> None:
            rows.append(
                {
                    "tau": number_text(point.tau),
                    "seed": seed,
                    "validation_perplexity": point.validation_perplexity,
                    "test_perplexity": point.test_perplexity,
                    "fit_seconds": point.seconds,
                    "seconds_so_far": point.seconds_so_far,
                }
            )
            table = pd.DataFrame(rows).astype({"test_perplexity": float})  # missing where there is no test document
            stem.parent.mkdir(parents=True, exist_ok=True)
            replace_file(stem.with_name(f"{stem.name}.csv"), lambda file: table.to_csv(file, index=False))
            _draw_warm(table, cold, stem)
            scores = f"validation perplexity {point.validation_perplexity:.2f}, test {point.test_perplexity or float('nan'):.2f}"
            print(f"tau {point.tau:>7g}  seed {seed}: {scores}  ({point.seconds_so_far:.0f} s so far)", flush=True)

        warm_path(
            model,
            data,
            [float(tau) for tau in config.numbers],
            epochs=config.warm_epochs,
            first_epochs=run.epochs,
            make_prior=partial(_prior, run, model.adapter.shared),
            on_point=record,
            **{name: getattr(run, name) for name in _FIT_OPTIONS},
        )
    return pd.DataFrame(rows).astype({"test_perplexity": float})


def _prior(run: MapFitConfig, shared: tuple[str, ...], tau: float) -> Prior:
    return with_shared(prior_from_tau(tau, run.prior_form, penalty=run.penalty), shared)


def _draw_warm(table: pd.DataFrame, cold: pd.DataFrame | None, stem: Path) -> None:
    """The path; where there is a cold sweep, its curve stands beside it."""
    with style():
        figure = Figure(figsize=(5.5 if cold is None else 9.0, 4.0))
        axes = figure.subplots(1, 1 if cold is None else 2, squeeze=False)[0]
        if cold is not None:
            tau_curve(cold, axes[0]).set_title("a fit for each τ")
        warm_curve(table, axes[-1]).set_title("one fit that relaxes τ, from right to left")
        limits = [ax.get_ylim() for ax in axes]
        for ax in axes:  # one scale for both; a shared axis would keep the limits of the first
            ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        _save(figure, stem)


def main(argv: list[str]) -> int:
    """Run the sweep, print its table and what validation chooses."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(SweepConfig, argv, prog="tau_sweep.py")
        if config.path == "warm":
            print(warm_summary(run_warm(config)))
            return 0
        sweep = Sweep(config)
        sweep.run()
        if sweep.table is not None:
            print(summary(sweep.table))
            if len(set(sweep.table.tau) - {LEARNED}) > 1:
                print(f"validation chooses tau = {best_tau(sweep.table)}")
        if sweep.failed:
            raise InputError(f"{len(sweep.failed)} fits failed; the table has the others, and the same command tries them again")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_script(main)
