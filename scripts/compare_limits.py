"""Compare the hierarchy with its two limits: test perplexity by τ, each arm at its own best learning rate.

    python scripts/compare_limits.py --fit_config results/presidents.yaml --output results/presidents.csv

Every fit is a run of ``scripts/map_fit.py`` with the options of ``--fit_config``. With the first seed each τ is fitted at
every learning rate of the grid; the lowest validation perplexity chooses the rate, and the other seeds (other splits, other
starts) are fitted at it. The test split is only reported. Runs that the output already has are not repeated.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pandas as pd

from bora_pyro.command_line import option, parse_config
from bora_pyro.errors import InputError
from bora_pyro.run_folder import RunFolder

COLUMNS = [
    "tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "base_test_perplexity", "epochs", "best_epoch",
    "fit_seconds", "train_documents", "test_documents",
]  # fmt: skip
Run = tuple[str, str, int]  # tau, learning rate, seed


@dataclass(kw_only=True)
class CompareConfig:
    """Compare the hierarchy with its two limits, each at its own best learning rate."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options that all fits share")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    taus: list[str] = option(["0", "1000", "inf"], "precisions of the prior (default: 0 1000 inf)")
    learning_rates: list[str] = option(["0.003", "0.01", "0.03"], "the grid of learning rates (default: 0.003 0.01 0.03)")
    seeds: int = option(3, "how many seeds, from 0")
    jobs: int = option(2, "fits that run at the same time, one thread each")
    runs_dir: str = option("runs/limits", "where the run folders go")
    output: str = option("results/documentation.csv", "the table, one row a run; what it has is not run again")

    def validate(self) -> None:
        """Check the values."""
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")
        for name in ("taus", "learning_rates"):
            for value in getattr(self, name):
                try:
                    float(value)
                except ValueError:
                    raise InputError(f"{name} has {value!r}; give numbers (tau may be inf)") from None


class Comparison:
    """The runs of one comparison and the table that they fill."""

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.output, self.lock = config, Path(config.output), Lock()
        self.table = pd.read_csv(self.output, dtype={"tau": str, "learning_rate": str}) if self.output.exists() else None

    def run(self, runs: list[Run]) -> None:
        """Run what the table does not have."""
        done = set() if self.table is None else set(zip(self.table.tau, self.table.learning_rate, self.table.seed, strict=True))
        with ThreadPoolExecutor(self.config.jobs) as pool:
            list(pool.map(self._run_one, [run for run in runs if run not in done]))

    def _run_one(self, run: Run) -> None:
        tau, rate, seed = run
        folder = Path(self.config.runs_dir) / Path(self.config.output).stem / f"tau{tau}-lr{rate}-seed{seed}"
        command = [
            sys.executable, Path(__file__).parent / "map_fit.py", "--config", self.config.fit_config, "--tau", tau,
            "--learning_rate", rate, "--seed", str(seed), "--threads", "1", "--output_dir", folder, "--overwrite", "true",
        ]  # fmt: skip
        if self.config.data is not None:
            command += ["--data", self.config.data]
        finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if finished.returncode:
            reason = finished.stderr.strip().splitlines()[-1].removeprefix("error: ")
            raise InputError(f"the fit with tau {tau}, learning rate {rate}, seed {seed} failed: {reason}")
        metrics = RunFolder.open(folder).read_metrics()
        row = {name: metrics[name] for name in COLUMNS if name in metrics} | {"tau": tau, "learning_rate": rate, "seed": seed}
        with self.lock:
            self.table = pd.concat([self.table, pd.DataFrame([row])[COLUMNS]], ignore_index=True)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.table.sort_values(["tau", "learning_rate", "seed"]).to_csv(self.output, index=False, float_format="%.6g")
        print(f"tau {tau:>6}  rate {rate:>6}  seed {seed}: test perplexity {metrics['test_perplexity']:.2f}", flush=True)

    def best_rates(self) -> dict[str, str]:
        """For each τ the learning rate of lowest validation perplexity, by the first seed."""
        assert self.table is not None
        first = self.table[self.table.seed == 0]
        return {
            tau: first[first.tau == tau].sort_values("validation_perplexity").iloc[0].learning_rate for tau in self.config.taus
        }

    def summary(self) -> str:
        """A Markdown table: τ, its learning rate, test perplexity, and its ratio to the base's on the same split."""
        assert self.table is not None
        lines = ["| τ | learning rate | test perplexity | to the base's | fits |", "|---|---|---|---|---|"]
        for tau, rate in self.best_rates().items():
            rows = self.table[(self.table.tau == tau) & (self.table.learning_rate == rate)]
            ratio = rows.test_perplexity / rows.base_test_perplexity
            name = "∞" if tau == "inf" else tau
            lines.append(f"| {name} | {rate} | {_mean_sd(rows.test_perplexity, 2)} | {_mean_sd(ratio, 3)} | {len(rows)} |")
        base = self.table.drop_duplicates("seed").base_test_perplexity
        lines.append(f"| base | | {_mean_sd(base, 2)} | 1 | {len(base)} |")
        return "\n".join(lines)


def _mean_sd(values: pd.Series, digits: int) -> str:
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def main(argv: list[str]) -> int:
    """Run the comparison and print its table."""
    try:
        config = parse_config(CompareConfig, argv, prog="compare_limits.py")
        comparison = Comparison(config)
        comparison.run([(tau, rate, 0) for tau in config.taus for rate in config.learning_rates])
        rates = comparison.best_rates()
        comparison.run([(tau, rates[tau], seed) for seed in range(1, config.seeds) for tau in config.taus])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
