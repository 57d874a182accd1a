"""The configuration of a sweep over τ, and of its fits.

>>> config = SweepConfig(fit_config="results/documentation.yaml", taus=["0", "1e2"])
>>> config.arguments(Run("100", "0.01", 0))[2:6]
['--tau', '100', '--learning_rate', '0.01']
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bora_pyro.diagnostics.sweep_table import LEARNED, number_text, tau_order
from bora_pyro.errors import InputError
from bora_pyro.likelihoods import LIKELIHOODS, PERPLEXITY
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import check_choices, option
from bora_pyro.runs.config.map_fit import MapFitConfig

SEARCHES = ("climb", "grid")


class Run(NamedTuple):
    """One fit of a sweep.

    >>> str(Run("100", "0.01", 0))
    'tau 100, learning rate 0.01, seed 0'
    """

    tau: str
    rate: str
    seed: int

    def __str__(self) -> str:
        return f"tau {self.tau}, learning rate {self.rate}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return f"tau{self.tau}-lr{self.rate}-seed{self.seed}"


@dataclass(kw_only=True)
class SweepConfig:
    """Fit a range of τ, each at its own best learning rate, and choose the best τ on the validation split."""

    fit_config: str = option("results/documentation.yaml", "YAML file of the options that all fits share")
    data: str | list[str] | None = option(None, "the documents (default: as in fit_config)")
    base_model: str | None = option(None, "the frozen language model (default: as in fit_config)")
    precision: str | None = option(
        None, "arithmetic of the frozen model (default: as in fit_config)", choices=("float32", "bfloat16")
    )
    taus: list[str] = option(
        ["0", "1", "10", "100", "1000", "10000", "inf", LEARNED],
        "precisions of the prior: numbers, inf or learned (default: 0 1 10 100 1000 10000 inf learned)",
    )
    learning_rates: list[str] = option(["0.003", "0.01", "0.03"], "the grid of learning rates (default: 0.003 0.01 0.03)")
    search: str = option("climb", "climb: from the grid's middle to the nearest minimum; grid: all rates", choices=SEARCHES)
    seeds: int = option(3, "number of seeds; they count from 0")
    jobs: int = option(2, "fits that run at the same time, one thread each")
    path: str = option(
        "cold",
        "cold: a fit for each tau; warm: one fit that lowers tau step by step, at the middle rate of the grid",
        choices=("cold", "warm"),
    )
    warm_epochs: int = option(2, "epochs at each tau of a warm path; the first tau has the epochs of fit_config")
    runs_dir: str = option("runs/sweep", "folder for the runs; they go into its subfolder with the name of the output")
    output: str = option(
        "results/documentation",
        "path of the table and figure; .csv, .parquet and .png are added; runs in the table are not repeated",
    )

    def validate(self) -> None:
        """Check the values, sort the τ and the rates, and check the configuration of the fits."""
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
        """The values of τ that are numbers."""
        return [tau for tau in self.taus if tau != LEARNED]

    @property
    def stem(self) -> Path:
        """The path of the output without its suffix."""
        path = Path(self.output)
        return path.with_suffix("") if path.suffix in (".csv", ".parquet", ".png") else path

    def arguments(self, run: Run) -> list[str]:
        """The command line of ``bora map-fit`` for a run."""
        folder = Path(self.runs_dir) / self.stem.name / run.folder
        own = {"tau": run.tau, "learning_rate": run.rate, "seed": run.seed, "threads": 1, "output_dir": folder}
        given = {name: getattr(self, name) for name in ("data", "base_model", "precision")}
        own |= {name: value for name, value in given.items() if value is not None}
        words = ((f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in own.items())
        return ["--config", self.fit_config, *(word for option in words for word in option)]

    def fit(self, run: Run) -> MapFitConfig:
        """The configuration of the MAP fit of a run."""
        config = parse_config(MapFitConfig, self.arguments(run))
        if config.likelihood in LIKELIHOODS and LIKELIHOODS[config.likelihood].measure != PERPLEXITY:
            raise InputError(
                f"{self.fit_config} has likelihood {config.likelihood}, and a sweep compares perplexities, which it has not; fit "
                "each tau with map-fit, and compare validation_nll in metrics.json"
            )
        return config


def _texts(name: str, values: list[str], allowed: str) -> set[str]:
    texts = set()
    for value in values:
        try:
            texts.add(number_text(value))
        except ValueError:
            raise InputError(f"{name} has {value!r}; give {allowed}") from None
    return texts
