"""Sweep over τ: how strong should the prior be? Each τ is fitted at its own best learning rate; validation perplexity decides.

    bora tau-sweep --taus 0 1 10 100 1000 10000 inf learned --output results/documentation

Every fit is a run of ``bora map-fit`` with the options of ``--fit_config``, in a process of its own. With the first seed,
each τ is fitted at several learning rates. The rate with the lowest validation perplexity is then used for the other seeds,
which have other splits and other starts. The table and the figure are written again after every fit.

If the sweep is interrupted, give the same command again: finished runs are not repeated, and interrupted runs are resumed.
``--path warm`` lowers τ step by step within one fit instead.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

from matplotlib.figure import Figure

from bora_pyro.diagnostics.learned_against_fixed import lines_of_learned
from bora_pyro.diagnostics.plots import style, tau_curve
from bora_pyro.diagnostics.plots.warm_path import warm_summary
from bora_pyro.diagnostics.sweep_table import LEARNED, best_rates, best_tau, runs, summary, with_run, write_sweep
from bora_pyro.errors import InputError
from bora_pyro.runs.build import build_run, check_can_export
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.tau_sweep import Run, SweepConfig
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.stored_options import check_options, fit_options, options_json
from bora_pyro.runs.sweep import MAP_FIT, Fits, can_resume, finished_rows, next_rates, run_fits
from bora_pyro.runs.sweep_files import check_validation, save_figure, stored_table
from bora_pyro.runs.warm_sweep import run_warm


class Sweep:
    """The runs of one sweep, and the table that they fill."""

    def __init__(self, config: SweepConfig) -> None:
        self.config, self.failed = config, dict[Run, str]()
        self.table = stored_table(config)
        shared = fit_options(config.fit(Run(config.taus[0], config.learning_rates[0], 0)), without=("tau", "learning_rate"))
        if self.table is not None:
            check_options(runs(self.table), shared, output=f"{config.stem}.csv", things="fits")
        self.options = options_json(shared)

    def run(self) -> None:
        """Take the finished runs into the table, and fit the rest.

        Raises:
            InputError: no fit can begin, or no run has a validation perplexity. Finished runs are in the table.
            KeyboardInterrupt: Ctrl-C or SIGTERM ended the fits. Finished runs are in the table.
        """
        self.take_over()
        if any(self.next_runs()):
            self.tokenise()
            run_fits(Fits(MAP_FIT, self.config.jobs), self.next_runs, self.words, self.finish)

    def take_over(self) -> None:
        """Put the runs whose folders are finished into the table.

        Raises:
            InputError: a folder contains something that no run wrote, or a finished run with other options.
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
                self.table = self.table if rows is None else with_run(self.table, rows.assign(options=self.options))
        if self.table is not None:
            print(f"{len(runs(self.table))} finished runs are taken over", flush=True)
            self.write()
        if problems:
            raise InputError(problems[0] + (f" ({len(problems)} folders have such a problem)" if len(problems) > 1 else ""))

    def next_runs(self) -> Iterator[Run]:
        """The runs to fit next, of all τ, those that have begun included."""
        for tau in self.config.taus:
            yield from self.next_runs_of(tau)

    def next_runs_of(self, tau: str) -> list[Run]:
        """The runs of a τ to fit next: the first seed at further learning rates, and then the other seeds at the best rate."""
        scores = dict.fromkeys(self.failed, float("inf"))
        for row in [] if self.table is None else runs(self.table).to_dict("records"):
            scores[Run(row["tau"], row["learning_rate"], row["seed"])] = row["validation_perplexity"]
        rates = self.config.learning_rates
        tried = {rate: scores[Run(tau, rate, 0)] for rate in rates if Run(tau, rate, 0) in scores}
        wanted = [Run(tau, rate, 0) for rate in next_rates(rates, tried, self.config.search)]
        if not wanted and self.table is not None and (best := best_rates(self.table).get(tau)):
            wanted = [Run(tau, best, seed) for seed in range(1, self.config.seeds)]
        return [run for run in wanted if run not in scores]

    def words(self, run: Run) -> list[str]:
        """The command line of a run, which is resumed if it can be."""
        resume, overwrite = ("true", "false") if can_resume(self.config.fit(run)) else ("false", "true")
        return [*self.config.arguments(run), "--resume", resume, "--overwrite", overwrite]

    def tokenise(self) -> None:
        """Read and tokenise the split of each seed before the fits begin, so that the fits find the tokens in the cache."""
        for seed in range(self.config.seeds):
            run = self.config.fit(Run(self.config.taus[0], self.config.learning_rates[0], seed))
            model, data = build_run(dataclasses.replace(run, device="cpu"), quiet=seed > 0)
            check_validation(data)
            if run.export_adapters:
                check_can_export(model.backbone)

    def finish(self, run: Run, reason: str | None) -> None:
        """Take a run that has ended into the table, or print why it failed."""
        try:
            if reason:
                raise InputError(reason)
            rows = rows_of_run(self.config.fit(run).output_dir, tau=run.tau, learning_rate=run.rate)
        except InputError as error:
            self.failed[run] = str(error)
            print(f"error: the fit with {run} failed: {error}", file=sys.stderr, flush=True)
            return
        self.table, row = with_run(self.table, rows.assign(options=self.options)), rows.iloc[0]
        scores = f"validation perplexity {row.validation_perplexity:.2f}, test {row.test_perplexity:.2f}"
        print(f"tau {run.tau:>7}  rate {run.rate:>6}  seed {run.seed}: {scores}  ({row.fit_seconds:.0f} s)", flush=True)
        self.write()

    def write(self) -> None:
        """Write the table and its figure."""
        assert self.table is not None
        write_sweep(self.table, self.config.stem)
        best_rates(self.table)  # raises an error if no run has a validation perplexity
        if self.table.test_perplexity.notna().any():
            with style():
                figure = Figure(figsize=(5.5, 4.0))
                tau_curve(self.table, figure.subplots())
                save_figure(figure, self.config.stem)


def run_sweep(config: SweepConfig) -> None:
    """Run the sweep, and print its table and the τ with the best validation perplexity.

    Raises:
        InputError: a fit has failed, or none can begin.
        RunStopped: the sweep was interrupted; the same command resumes it.
    """
    try:
        if config.path == "warm":
            print(warm_summary(run_warm(config)))
            return
        sweep = Sweep(config)
        sweep.run()
    except KeyboardInterrupt:
        raise RunStopped("error: interrupted; the same command resumes the sweep", 130) from None
    if sweep.table is not None:
        print(summary(sweep.table))
        if len(set(sweep.table.tau) - {LEARNED}) > 1:
            print("\n".join([f"validation chooses tau = {best_tau(sweep.table)}", *lines_of_learned(sweep.table)]))
    if sweep.failed:
        raise InputError(
            f"{len(sweep.failed)} fits failed; the table has the others; the same command tries the failed ones again"
        )


COMMAND = Command("tau-sweep", SweepConfig, run_sweep)
