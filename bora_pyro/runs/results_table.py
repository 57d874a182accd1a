"""Tables of results that a script fills run by run. A later call reads the rows that exist and runs only the missing ones.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     table = read_results(f"{folder}/a.csv", ["seed", "arm"])
...     write_results(pd.DataFrame({"seed": [0], "arm": ["bora"], "perplexity": [20.5]}), f"{folder}/a.csv")
...     len(table), read_results(f"{folder}/a.csv", ["seed", "arm"]).to_dict("records")
(0, [{'seed': 0, 'arm': 'bora', 'perplexity': 20.5}])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bora_pyro.diagnostics.sweep_table import rows_of_metrics
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.runs.folder import RunFolder


def read_results(output: str | Path, keys: Sequence[str]) -> pd.DataFrame:
    """Read the table that an earlier run wrote. If there is none, return an empty table with the columns ``keys``.

    Raises:
        InputError: the file is another table, which lacks one of the columns ``keys``.
    """
    table = pd.read_csv(output) if Path(output).exists() else pd.DataFrame(columns=list(keys))
    if missing := [name for name in keys if name not in table]:
        raise InputError(f"output {output} has no column {missing[0]!r}; give another file for the table")
    return table


def write_results(table: pd.DataFrame, output: str | Path) -> None:
    """Write the table to a file atomically.

    Raises:
        InputError: the file cannot be written; an old file is unchanged.
    """
    replace_file(Path(output), lambda file: table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n"))


def rows_of_run(run_folder: RunFolder | str | Path, *, tau: str | None = None, learning_rate: str | None = None) -> pd.DataFrame:
    """The rows of one finished run in a sweep table, one row a task (:mod:`bora_pyro.diagnostics.sweep_table`).

    Args:
        run_folder: the folder of a fit, or its path.
        tau: τ as a text; default: the value in ``metrics.json``.
        learning_rate: the learning rate as a text; default: the value in ``metrics.json``.

    Raises:
        InputError: the folder has no run, the run is not finished, or its ``metrics.json`` cannot be used.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder.open(run_folder)
    where = f"metrics.json of {run.path}"
    return rows_of_metrics(run.read_metrics(), where=where, tau=tau, learning_rate=learning_rate)
