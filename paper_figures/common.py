"""Functions that the scripts of this folder share: the paper's reported numbers, writing figures and tables, and error handling.

The reported numbers have the form of a sweep table (``bora_pyro.diagnostics.sweep_table``), so the same functions draw the
paper's numbers and ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: these scripts write files and open no window

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bora_pyro.diagnostics.rank_correlation import rank_correlation
from bora_pyro.diagnostics.sweep_table import at_best_rates, best_tau, read_sweep, sweep_table
from bora_pyro.errors import InputError
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import option

REPORTED = Path(__file__).parent / "reported"
SWEEP = "results/presidents.parquet"
#: The paper's τ of lowest perplexity, and its smallest and largest τ. The largest, 10⁴, stands for one shared adapter.
PAPER_BEST, PAPER_INDEPENDENT, PAPER_POOLED = "100", "0", "10000"

Config = Any  # a dataclass of options; each script has its own class


def sweep_option() -> str:
    """The option ``sweep`` of most scripts."""
    return option(SWEEP, "the sweep table of tau_sweep.py, csv or parquet")


def output_option(name: str) -> str:
    """The option ``output``."""
    return option(f"paper_figures/{name}", "the file to write")


def run(config_class: type, draw: Callable[[Config], str], argv: Sequence[str], script: str) -> int:
    """Parse the options, draw, and print the result. An ``InputError`` is printed as one line on stderr.

    Args:
        config_class: the dataclass of the script's options.
        draw: draws the figure or table and returns the text to print.
        argv: the command line arguments.
        script: the path of the script.

    Returns:
        The exit code: 0, or 2 after an error.
    """
    try:
        print(draw(parse_config(config_class, argv, prog=Path(script).name)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def save(figure: Figure, output: str) -> str:
    """Write a figure and return its path."""
    path = _make_parent(output)
    try:
        # no date and no version in the file, so that the same numbers give the same bytes
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    except ValueError as error:  # matplotlib does not know the ending
        raise InputError(
            f"output {output} cannot be written ({' '.join(str(error).split())}); give a .png, .pdf or .svg"
        ) from None
    finally:
        plt.close(figure)
    return str(path)


def save_text(text: str, output: str) -> str:
    """Write a table and return its text, which the script prints."""
    _make_parent(output).write_text(text + "\n", encoding="utf-8")
    return text


def _make_parent(output: str) -> Path:
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output {output} cannot be written ({error.strerror}); give a path in a folder that you can write"
        ) from None
    return path


def reported(name: str) -> pd.DataFrame:
    """Read a table in ``reported/``. τ and learning rates are texts."""
    return pd.read_csv(REPORTED / f"{name}.csv", dtype={"tau": str, "learning_rate": str})


def reported_sweep() -> pd.DataFrame:
    """The paper's Tables 1 and 2 as a sweep table. Values that the paper does not report are NaN or 0."""
    overall, tasks = reported("table1"), reported("tasks").set_index("task")
    rows = reported("table2").merge(overall, on="tau", suffixes=("_of_task", ""))
    train, test = tasks["train_documents"], tasks["test_documents"]
    return sweep_table(
        {
            "tau": row.tau, "learning_rate": row.learning_rate, "seed": 0, "fitted_tau": float(str(row.tau)),
            # the released plotting code calls the numbers in these tables validation perplexities
            "validation_perplexity": row.test_perplexity, "test_perplexity": row.test_perplexity,
            "base_test_perplexity": np.nan, "epochs": 0, "best_epoch": 0, "fit_seconds": np.nan,
            "training_tokens_per_second": np.nan, "peak_memory_bytes": 0, "task": row.task,
            "task_train_documents": train[str(row.task)], "task_test_documents": test[str(row.task)],
            "task_base_test_perplexity": np.nan, "task_test_perplexity": row.test_perplexity_of_task, "deviation_norm": np.nan,
        }
        for row in rows.itertuples()
    )  # fmt: skip


def best_between_limits(table: pd.DataFrame) -> str:
    """The fixed τ of lowest validation perplexity, without the limits τ = 0 and τ = ∞.

    Raises:
        InputError: the sweep has no τ between the limits.
    """
    between = table[~table["tau"].isin(["0", "inf", "learned"])]
    taus = list(between["tau"].unique())
    if not taus:
        raise InputError("the sweep has no tau above 0 and below inf; add one, as in --taus 0 100 inf")
    return str(taus[0]) if len(taus) == 1 else best_tau(between)


def means_by_task(table: pd.DataFrame, tau: str) -> pd.DataFrame:
    """One row for each task: means over seeds of task_train_documents, task_test_perplexity and deviation_norm at one τ."""
    columns = ["task_train_documents", "task_test_perplexity", "deviation_norm"]
    chosen = at_best_rates(table)
    return chosen[chosen["tau"] == tau].groupby("task")[columns].mean()


def read_table(path: str, columns: Sequence[str], *, made_by: str) -> pd.DataFrame:
    """Read a csv table of results other than a sweep.

    Args:
        path: the file.
        columns: the columns that the table must have.
        made_by: how to make the table, for errors.

    Raises:
        InputError: the file does not exist, cannot be read, is empty, or lacks one of ``columns``.
    """
    if not Path(path).is_file():
        raise InputError(f"table {path} does not exist; {made_by}")
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' parsing errors are ValueErrors
        raise InputError(f"table {path} cannot be read ({' '.join(str(error).split())}); {made_by}") from None
    if missing := [name for name in columns if name not in table.columns]:
        raise InputError(f"table {path} lacks the column {', '.join(missing)}; {made_by}")
    if table.empty:
        raise InputError(f"table {path} has no row; {made_by}")
    return table


def trend(documents: Any, values: Any) -> str:
    """Spearman's rank correlation of a value of each task with its N_d, with its interval, as a text.

    >>> trend([4, 8, 16], [3.0, 2.0, 1.0]), trend([4, 8], [1.0, 2.0])
    ('ρ = −1.00 (95 %: −1.00 to −1.00; 3 tasks)', 'ρ: too few tasks')
    """
    try:
        return str(rank_correlation(documents, values))
    except InputError:
        return "ρ: too few tasks"


def with_trends(path: str, trends: Mapping[str, str]) -> str:
    """The path of a figure, and a line for each rank correlation that it shows."""
    return "\n".join([path, *(f"{name}: {text}" for name, text in trends.items())])


def corpus(sweep: str) -> str:
    """The name of a sweep's corpus in a figure: the file name of the table.

    >>> corpus("results/presidents.parquet")
    'presidents'
    """
    return Path(sweep).stem


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def mean_sd(values: pd.Series, digits: int = 2) -> str:
    """Mean ± standard deviation over seeds as a text; only the mean if there is one seed."""
    values = values.dropna()
    if values.empty:
        return "–"
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


__all__ = [
    "PAPER_BEST", "PAPER_INDEPENDENT", "PAPER_POOLED", "best_between_limits", "corpus", "markdown", "mean_sd", "means_by_task",
    "output_option", "read_sweep", "read_table", "reported", "reported_sweep", "run", "save", "save_text", "sweep_option",
    "trend", "with_trends",
]  # fmt: skip
