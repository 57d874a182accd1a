"""Compare a τ that is learned from all validation documents with one that is learned from half of them.

    python scripts/experiments/tau_folds.py --fit_config results/documentation.yaml --output results/tau_folds.csv

Under ``--tau_documents all`` the same validation documents teach τ and choose the epoch. Under ``half`` one half teaches τ, the
other one chooses the epoch. Each fit is a run of ``scripts/map_fit.py`` with the options of ``--fit_config``, except
``tau_documents``, ``learning_rate``, ``seed`` and ``export_adapters`` (false), one after the other. Runs that the output already
has are not repeated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bora_pyro import InputError
from bora_pyro.inference.options import ALL, HALF
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options, fit_options, with_options

KEY = ["tau_documents", "seed"]
METRICS = ["tau", "best_epoch", "averaged", "validation_perplexity", "test_perplexity", "base_test_perplexity", "fit_seconds"]


@dataclass(kw_only=True)
class FoldsConfig:
    """Compare a learned tau's two uses of the validation documents."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options that all fits share")
    learning_rate: float = option(0.03, "learning rate of the fits", positive=True)
    seeds: int = option(3, "number of seeds, from 0", least=1)
    most: int = option(1000, "stop after so many new fits", least=1)
    runs_dir: str = option("runs/tau_folds", "folder of the runs")
    output: str = option("results/tau_folds.csv", "the table, one row for each fit")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)


def main(argv: list[str]) -> int:
    """Run the missing fits, and print the table."""
    try:
        config = parse_config(FoldsConfig, argv, prog="tau_folds.py")
        output = Path(config.output)
        shared = ["--config", config.fit_config, "--learning_rate", str(config.learning_rate)]
        options = fit_options(parse_config(MapFitConfig, shared, prog="tau_folds.py"), without=("tau_documents",))
        table = read_results(output, KEY)
        check_options(table, options, output=output)
        rows: list[Any] = table.to_dict("records")
        done = {tuple(row[name] for name in KEY) for row in rows}
        missing = [key for seed in range(config.seeds) for key in ((ALL, seed), (HALF, seed)) if key not in done]
        for key in missing[: config.most]:
            own = {**dict(zip(KEY, key, strict=True)), "overwrite": "true", "export_adapters": "false"}
            own |= {"output_dir": Path(config.runs_dir, "{}-seed{}".format(*key))}
            words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
            metrics = run_map_fit(parse_config(MapFitConfig, [*shared, *words], prog="tau_folds.py"))
            row = dict(zip(KEY, key, strict=True)) | {name: metrics[name] for name in METRICS}
            rows += with_options([row], options)
            write_results(pd.DataFrame(rows), output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(pd.DataFrame(rows)[[*KEY, *METRICS]].to_string(index=False))
    return 0


if __name__ == "__main__":
    run_script(main)
