"""Make a sweep table from finished runs that were started separately, such as the paper's six fits.

python paper_figures/collect_runs.py --runs runs/paper/tau0 runs/paper/tau100 --output results/talk_of_norway
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd
from common import run

from bora_pyro.diagnostics.sweep_table import number_text, with_run, write_sweep
from bora_pyro.errors import InputError
from bora_pyro.options.field import option
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results_table import rows_of_run


@dataclass(kw_only=True)
class CollectConfig:
    """Make a sweep table from finished runs."""

    runs: list[str] | None = option(None, "the run folders")
    output: str = option("results/talk_of_norway", "path of the table without its ending; a .csv and a .parquet file are written")

    def validate(self) -> None:
        """Check that runs are given."""
        if not self.runs:
            raise InputError("no run is given; name the folders, as in --runs runs/paper/tau0 runs/paper/tau100")


def collect(config: CollectConfig) -> str:
    """Write the table and return a line about its content."""
    table: pd.DataFrame | None = None
    for path in config.runs or ():
        folder = RunFolder.open(path)
        options, metrics = folder.read_config(), folder.read_metrics()
        rate = float(metrics["learning_rate"])
        if options.get("scale_learning_rate_with_tau"):
            rate *= float(metrics["tau"])  # a run stores the factor of tau; a sweep table has AdamW's rate
        table = with_run(table, rows_of_run(folder, learning_rate=number_text(f"{rate:.12g}")))
    assert table is not None
    write_sweep(table, config.output)
    return f"{config.output}.parquet: tau {', '.join(table['tau'].unique())}; {table['task'].nunique()} tasks"


if __name__ == "__main__":
    sys.exit(run(CollectConfig, collect, sys.argv[1:], __file__))
