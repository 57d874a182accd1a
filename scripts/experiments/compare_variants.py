"""Compare the paper's model with variants from its released code, each at its own best τ and learning rate.

    python scripts/experiments/compare_variants.py --fit_config results/documentation.yaml --tau 100 --output results/fidelity.csv

Each variant except the last is one change of the paper's model (Normal penalty, every token an observation, non-centred):

- ``paper``: no change.
- ``centered_rate_by_tau``: θ_d itself is sampled, and the learning rate is proportional to τ. The model is the same.
- ``norm_penalty``: the penalty is the sum of unsquared norms ‖θ_d − Θ‖, one for each matrix.
- ``document_likelihood``: a document counts as one observation, with its mean token loss.
- ``shared_plus_task``: the sum of a shared adapter and the task's own adapter.
- ``released_objective``: the ``regularized`` fits of the released code: norms, documents, centred with the rate ∝ τ.

Every fit is a run of ``scripts/map_fit.py`` with the options of ``--fit_config``, except ``tau``, ``learning_rate``, ``seed``,
``threads`` (1) and those of the variant. The meaning of τ depends on the penalty and on the likelihood. The standard deviation
of a matrix's entries is √(n + 1)/τ under the norm and 1/√τ under the Normal, and a document of some hundred tokens may count as
one observation. So each variant has its own small grid of τ, relative to ``--tau``, which is that of the paper's model. With
the first seed, validation perplexity chooses τ at the middle learning rate, and then the rate at that τ. The other seeds (other
splits, other starts) use this choice. The test split is only reported. Runs that the output already has are not repeated. The
column ``learning_rate`` is the option of ``map_fit.py``: if the rate is proportional to τ, it is the factor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.errors import InputError, nearest
from bora_pyro.files.atomic import replace_file
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.stored_options import check_options, fit_options, options_json
from bora_pyro.runs.sweep import MAP_FIT, Fits, run_fits

COLUMNS = [
    "variant", "tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "base_test_perplexity", "fit_seconds",
    "options",
]  # fmt: skip
Run = tuple[str, str, str, int]  # variant, tau, learning rate, seed


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        options: options of ``map_fit.py``.
        taus: function from the τ of the paper's model to the variant's grid of τ.
    """

    options: dict[str, str]
    taus: Callable[[float], list[float]] = lambda tau: [tau]


_CENTERED = {"prior_form": "centered", "scale_learning_rate_with_tau": "true"}
_NORM, _DOCUMENTS = {"penalty": "norm"}, {"likelihood_unit": "documents"}
VARIANTS = {
    "paper": Variant({}),
    "centered_rate_by_tau": Variant(_CENTERED),
    "norm_penalty": Variant(_NORM, lambda tau: [factor * math.sqrt(tau) for factor in (3, 10, 30, 100)]),
    "document_likelihood": Variant(_DOCUMENTS, lambda tau: [factor * tau for factor in (0.003, 0.01, 0.03)]),
    "shared_plus_task": Variant(
        {"adapter": "lora_shared_plus_task"}, lambda tau: [factor * tau for factor in (0.01, 0.1, 1, 10)]
    ),
    "released_objective": Variant(
        _CENTERED | _NORM | _DOCUMENTS, lambda tau: [factor * math.sqrt(tau) for factor in (0.1, 0.3, 1)]
    ),
}


@dataclass(kw_only=True)
class VariantsConfig:
    """Compare the paper's model with variants from its released code, each at its own best tau and learning rate."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options that all fits share")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    variants: list[str] = option([*VARIANTS], f"which variants (default: {' '.join(VARIANTS)})")
    tau: float = option(100.0, "precision of the paper's model on these data; the grids of the variants are relative to it")
    learning_rates: list[str] = option(
        ["0.003", "0.01", "0.03"],
        "the grid of AdamW's learning rates, a factor tau included (default: 0.003 0.01 0.03)",
        positive=True,
    )
    seeds: int = option(3, "number of seeds, from 0", least=1)
    jobs: int = option(2, "fits that run at the same time, one thread each", least=1)
    runs_dir: str = option("runs/variants", "folder of the runs")
    output: str = option("results/fidelity.csv", "the table, one row for each run; runs that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        for name in self.variants:
            if name not in VARIANTS:
                raise InputError(f"variant {name!r} is not known; known: {', '.join(VARIANTS)}{nearest(name, VARIANTS)}")
        if not 0 < self.tau < math.inf:
            raise InputError(f"tau is {self.tau}; give a finite number above 0, because the limits have no variants")


class Comparison:
    """The runs of one comparison and the table that they fill."""

    def __init__(self, config: VariantsConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.chosen: dict[str, tuple[str, str]] = {}  # τ and learning rate of each variant, chosen with the first seed
        self.table = pd.DataFrame(columns=COLUMNS)
        if self.output.exists():
            self.table = pd.read_csv(self.output, dtype={"tau": str, "learning_rate": str})
            if [*self.table] not in (COLUMNS, COLUMNS[:-1]):  # the options came later
                raise InputError(
                    f"output {self.output} has the columns {', '.join(self.table.columns)}; give another file for the table"
                )
        words = [] if config.data is None else ["--data", config.data]
        shared = parse_config(MapFitConfig, ["--config", config.fit_config, *words])
        of_arms = {name for variant in VARIANTS.values() for name in variant.options}
        self.options = fit_options(shared, without={"tau", "learning_rate", *of_arms})
        check_options(self.table, self.options, output=self.output)
        self.table = self.table.reindex(columns=COLUMNS)

    def taus(self, variant: str) -> list[str]:
        """The grid of τ of a variant."""
        return [_number(tau) for tau in VARIANTS[variant].taus(self.config.tau)]

    def rates(self, variant: str, tau: str) -> list[str]:
        """The grid of learning rates of a variant at τ, divided by τ if ``map_fit.py`` multiplies them by it."""
        rates = sorted(map(float, self.config.learning_rates))
        if "scale_learning_rate_with_tau" not in VARIANTS[variant].options:
            return [number_text(rate) for rate in rates]
        return [_number(rate / float(tau)) for rate in rates]

    def run_all(self) -> None:
        """Choose τ and then the learning rate with the first seed, and run the other seeds at this choice."""
        names, pairs = self.config.variants, {}
        for name in names:
            pairs[name] = [(tau, _middle(self.rates(name, tau))) for tau in self.taus(name)]
        self.run((name, *pair, 0) for name in names for pair in pairs[name])
        for name in names:
            tau, _ = self.best(name, pairs[name])
            pairs[name] = [(tau, rate) for rate in self.rates(name, tau)]
        self.run((name, *pair, 0) for name in names for pair in pairs[name])
        chosen = {name: self.best(name, pairs[name]) for name in names}
        self.run((name, *chosen[name], seed) for seed in range(1, self.config.seeds) for name in names)
        self.chosen = chosen

    def best(self, variant: str, pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
        """The pair of τ and learning rate that has the lowest validation perplexity with the first seed."""
        first = self.table[(self.table.variant == variant) & (self.table.seed == 0)].dropna(subset="validation_perplexity")
        found = dict(zip(zip(first.tau, first.learning_rate, strict=True), first.validation_perplexity, strict=True))
        scores = {pair: found[pair] for pair in pairs if pair in found}
        if not scores:
            raise InputError(f"no fit of {variant} has a validation perplexity to choose by; give data with a validation split")
        return min(scores, key=lambda pair: scores[pair])

    def run(self, runs: Iterable[Run]) -> None:
        """Run the fits that the table does not have. A fit that fails is left out.

        Raises:
            InputError: the very first fit has failed, so that the others would probably fail, too.
        """
        done = set(zip(self.table.variant, self.table.tau, self.table.learning_rate, self.table.seed, strict=True))
        missing = [run for run in runs if run not in done]

        def finish(run: Run, reason: str | None) -> None:
            if not reason:
                self.add(run)
                return
            failure = "the fit of {} with tau {}, learning rate {}, seed {} failed: ".format(*run) + reason
            if self.table.empty:
                raise InputError(failure)
            print(f"error: {failure}", file=sys.stderr, flush=True)

        run_fits(Fits(MAP_FIT, self.config.jobs), lambda: missing, self.arguments, finish)

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return Path(self.config.runs_dir) / self.output.stem / "{}-tau{}-lr{}-seed{}".format(*run)

    def arguments(self, run: Run) -> list[str]:
        """The arguments of map_fit.py for a run.

        Raises:
            InputError: map_fit.py would refuse them.
        """
        variant, tau, rate, seed = run
        options = VARIANTS[variant].options | {"tau": tau, "learning_rate": rate, "seed": str(seed), "threads": "1"}
        options |= {"output_dir": str(self.folder(run)), "overwrite": "true"}
        options |= {} if self.config.data is None else {"data": self.config.data}
        words = ["--config", self.config.fit_config, *(word for name, value in options.items() for word in (f"--{name}", value))]
        parse_config(MapFitConfig, words)
        return words

    def add(self, run: Run) -> None:
        """Add a finished run to the table."""
        metrics = RunFolder.open(self.folder(run)).read_metrics()
        row = metrics | dict(zip(COLUMNS[:4], run, strict=True)) | {"options": options_json(self.options)}
        self.table = pd.DataFrame([*self.table.to_dict("records"), row])[COLUMNS]
        self._write()
        score = "none" if metrics["test_perplexity"] is None else f"{metrics['test_perplexity']:.2f}"
        print("{}  tau {}  rate {}  seed {}: test perplexity ".format(*run) + score, flush=True)

    def _write(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        table = self.table.sort_values(COLUMNS[:4])
        replace_file(self.output, lambda file: table.to_csv(file, index=False, lineterminator="\n"))

    def summary(self) -> str:
        """A Markdown table of each variant at its choice, and its ratio to the first variant on the same splits."""
        lines = ["| variant | τ | learning rate | test perplexity | to the first | fits |", "|---|---|---|---|---|---|"]
        reference = None
        for name, (tau, rate) in self.chosen.items():
            table = self.table[(self.table.variant == name) & (self.table.tau == tau) & (self.table.learning_rate == rate)]
            perplexity = table[table.seed < self.config.seeds].set_index("seed").test_perplexity
            reference = perplexity if reference is None else reference
            ratio = perplexity / reference
            lines.append(f"| {name} | {tau} | {rate} | {_mean_sd(perplexity, 2)} | {_mean_sd(ratio, 3)} | {len(perplexity)} |")
        return "\n".join([*lines, *self._ends()])

    def _ends(self) -> list[str]:
        """Notes about choices at an end of their grid, where a larger grid might have a better value."""
        notes = []
        for name, (tau, rate) in self.chosen.items():
            grids = {"tau": (tau, self.taus(name)), "learning rate": (rate, self.rates(name, tau))}
            for what, (value, grid) in grids.items():
                if len(grid) > 1 and value in (grid[0], grid[-1]):
                    notes.append(f"note: {name} is best at the {what} {value}, an end of its grid {' '.join(grid)}")
        return notes


def _number(value: float) -> str:
    """Format a number with three significant digits."""
    return number_text(f"{value:.3g}")


def _middle(grid: list[str]) -> str:
    return grid[len(grid) // 2]


def _mean_sd(values: pd.Series, digits: int) -> str:
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    try:
        comparison = Comparison(parse_config(VariantsConfig, argv, prog="compare_variants.py"))
        comparison.run_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison.summary())
    return 0


if __name__ == "__main__":
    run_script(main)
