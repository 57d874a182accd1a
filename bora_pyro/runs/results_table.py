"""Tables of results that a script fills run by run: what is there is read again, and not run again.

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
    """What an earlier run has left, an empty table with the columns ``keys`` where there is nothing.

    Raises:
        InputError: the table is another one, which lacks one of the columns.
    """
    table = pd.read_csv(output) if Path(output).exists() else pd.DataFrame(columns=list(keys))
    if missing := [name for name in keys if name not in table]:
        raise InputError(f"output {output} has no column {missing[0]!r}; give another file for the table")
    return table


def write_results(table: pd.DataFrame, output: str | Path) -> None:
    """Replace the file in one piece.

    Raises:
        InputError: it cannot be written; the old one is as it was.
    """
    replace_file(Path(output), lambda file: table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n"))


def rows_of_run(run_folder: RunFolder | str | Path, *, tau: str | None = None, learning_rate: str | None = None) -> pd.DataFrame:
    """The rows of one finished run in a sweep table, one a task (:mod:`bora_pyro.diagnostics.sweep_table`).

    Args:
        run_folder: the folder of a fit, or its path.
        tau: the text of τ; default: what ``metrics.json`` has.
        learning_rate: the text of the learning rate; default: what ``metrics.json`` has.

    Raises:
        InputError: there is no run, it is not finished, or its ``metrics.json`` cannot be used.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder.open(run_folder)
    where = f"metrics.json of {run.path}"
    return rows_of_metrics(run.read_metrics(), where=where, tau=tau, learning_rate=learning_rate)
