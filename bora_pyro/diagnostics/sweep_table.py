"""The table of a sweep over τ: one row per run and task, stored as csv and as parquet.

    >>> import tempfile
    >>> rows = [
    ...     dict.fromkeys(COLUMNS, 1) | {"tau": tau, "learning_rate": rate, "validation_perplexity": perplexity}
    ...     for tau, rate, perplexity in [("1", "0.01", 21.0), ("1", "0.03", 25.0), ("100", "0.01", 19.0), ("100", "0.03", 18.0)]
    ... ]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_sweep(sweep_table(rows), f"{folder}/speeches")
    ...     table = read_sweep(f"{folder}/speeches.csv")
    >>> best_rates(table), best_tau(table)
    ({'1': '0.01', '100': '0.03'}, '100')

The validation split chooses first the learning rate of each τ, from the runs with the lowest seed, and then τ. The test split is
only reported. τ and the learning rate are strings. Examples of τ are ``0`` (independent tasks), ``100``, ``inf`` (one shared
adapter) and ``learned``.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.likelihoods import PERPLEXITY, measure_of

LEARNED = "learned"
#: The columns that identify a run.
KEY = ["tau", "learning_rate", "seed"]
# The columns of a run, which all its rows repeat, and the columns of a task, with their types.
_RUN_TYPES: dict[str, type] = {
    "tau": str, "learning_rate": str, "seed": int, "fitted_tau": float, "validation_perplexity": float,
    "test_perplexity": float, "base_test_perplexity": float, "epochs": int, "best_epoch": int, "fit_seconds": float,
    "training_tokens_per_second": float, "peak_memory_bytes": int,
}  # fmt: skip
_TASK_TYPES: dict[str, type] = {
    "task": str, "task_train_documents": int, "task_test_documents": int, "task_base_test_perplexity": float,
    "task_test_perplexity": float, "deviation_norm": float,
}  # fmt: skip
# Columns that only some tables have: accuracies, for documents with options to choose from; and the options of the fit, as JSON,
# which tables of earlier versions lack.
_MORE_RUN_TYPES: dict[str, type] = {"test_accuracy": float, "base_test_accuracy": float, "options": str}
_MORE_TASK_TYPES: dict[str, type] = {"task_test_accuracy": float, "task_base_test_accuracy": float}
_TYPES = _RUN_TYPES | _TASK_TYPES
_MORE_TYPES = _MORE_RUN_TYPES | _MORE_TASK_TYPES
_ALLOWED = {int: "whole numbers", float: "numbers", str: "texts"}
#: The columns of every table, in order, and those that a table may also have.
COLUMNS, MORE_COLUMNS = [*_TYPES], [*_MORE_TYPES]
_REMEDY = "make it again with tau_sweep.py"


def number_text(number: float | str) -> str:
    """The standard text of a τ or a learning rate, so that equal numbers have equal texts. ``learned`` stays as it is.

    >>> [number_text(number) for number in ("1e3", 100.0, "1e-2", "Infinity", "learned")]
    ['1000', '100', '0.01', 'inf', 'learned']

    Raises:
        ValueError: if a text is not a number.
    """
    if number == LEARNED:
        return LEARNED
    value = float(number)
    if math.isnan(value):
        raise ValueError(f"{number!r} is not a number")
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)


def tau_order(tau: str) -> tuple[bool, float]:
    """The sort key of a τ: by number, ``learned`` last.

    >>> sorted(["inf", "learned", "100", "0", "20"], key=tau_order)
    ['0', '20', '100', 'inf', 'learned']
    """
    return tau == LEARNED, 0.0 if tau == LEARNED else float(tau)


def rows_of_metrics(
    metrics: Mapping[str, Any], *, where: str = "the metrics", tau: str | None = None, learning_rate: str | None = None
) -> pd.DataFrame:
    """The rows of one finished run, one row per task.

    Args:
        metrics: the content of the run's ``metrics.json``.
        where: the name of the metrics in error messages.
        tau: τ as text; default: that of the metrics.
        learning_rate: the learning rate as text; default: that of the metrics.

    Raises:
        InputError: if a number is missing or invalid.
    """
    remedy = "run the fit again"
    if (measure := measure_of(metrics)) != PERPLEXITY:
        raise InputError(f"{where} has the {measure.unit}, and a sweep compares perplexities; leave the run out")
    try:
        found = LEARNED if "tau_by_group" in metrics else metrics["tau"]
        values = {name: metrics[name] for name in _RUN_TYPES if name not in ("tau", "learning_rate", "fitted_tau")} | {
            "tau": number_text(found if tau is None else tau),
            "learning_rate": number_text(metrics["learning_rate"] if learning_rate is None else learning_rate),
            "fitted_tau": float(metrics["tau"]),
        }
        values |= {name: metrics[name] for name in _MORE_RUN_TYPES if name in metrics}
        own = ["base_test_perplexity", "test_perplexity", "train_documents", "test_documents"]
        own += [name for name in ("test_accuracy", "base_test_accuracy") if name in metrics]
        rows = [
            values
            | {"task": task["name"], "deviation_norm": task["deviation_norm"]}
            | {f"task_{name}": task[name] for name in own}
            for task in metrics["tasks"].values()
        ]
    except KeyError as error:
        raise InputError(f"{where} lacks {error}; {remedy}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} cannot be used ({error}); {remedy}") from None
    columns = [*COLUMNS, *(name for name in MORE_COLUMNS if any(name in row for row in rows))]
    return _typed(pd.DataFrame(rows, columns=columns, dtype=object), where, remedy)


def sweep_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a table of rows, with the type of each column. A missing number is None.

    Raises:
        InputError: if a column or a required value is missing, or a value has the wrong type.
    """
    return _typed(pd.DataFrame(list(rows), dtype=object), "the table", "give it")


def with_run(table: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame:
    """Add the rows of a run to the table, or replace the run's rows, and sort by τ, learning rate and seed."""
    if table is not None:
        run = rows.iloc[0]
        others = table[(table[KEY] != run[KEY]).any(axis=1)]
        rows = pd.concat([others, rows], ignore_index=True)
    keys = [(tau_order(tau), float(rate), seed) for tau, rate, seed in rows[KEY].itertuples(index=False)]
    return rows.iloc[sorted(range(len(rows)), key=lambda n: (keys[n], n))].reset_index(drop=True)


def write_sweep(table: pd.DataFrame, stem: str | Path) -> None:
    """Write ``<stem>.csv`` and ``<stem>.parquet``. Each file is replaced atomically."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    replace_file(stem.with_name(f"{stem.name}.csv"), lambda file: table.to_csv(file, index=False, lineterminator="\n"))
    replace_file(stem.with_name(f"{stem.name}.parquet"), lambda file: table.to_parquet(file, index=False))


def read_sweep(path: str | Path) -> pd.DataFrame:
    """Read a file written by :func:`write_sweep`.

    Raises:
        InputError: if the file is missing, empty or truncated, lacks columns or tasks, or is neither csv nor parquet.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"sweep {path} has an unknown ending; give the .csv or the .parquet file of tau_sweep.py")
    if not path.is_file():
        raise InputError(f"sweep {path} does not exist; give the --output of tau_sweep.py")
    table = _typed(readers[path.suffix](path), f"sweep {path}", _REMEDY)
    repeated = table[table.duplicated([*KEY, "task"])]
    if len(repeated):
        raise InputError(f"sweep {path} has {_run_name(repeated.iloc[0])} twice; keep one of them")
    tasks = table.groupby(KEY)["task"].transform("size")
    if tasks.min() < tasks.max():
        run = table.iloc[int(tasks.argmin())]
        raise InputError(f"sweep {path} is cut short: {_run_name(run)} has {tasks.min()} of {tasks.max()} tasks; {_REMEDY}")
    return table


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """The table with one row per run, without the columns of the tasks."""
    columns = [*_RUN_TYPES, *(name for name in _MORE_RUN_TYPES if name in table)]
    return table.drop_duplicates(KEY)[columns].reset_index(drop=True)


def best_rates(table: pd.DataFrame) -> dict[str, str]:
    """The best learning rate of each τ: that of lowest validation perplexity among the runs of the τ's lowest seed.

    A τ whose runs have no validation perplexity is left out.

    Raises:
        InputError: if no run has a validation perplexity.
    """
    scored = runs(table).dropna(subset="validation_perplexity")
    if scored.empty:
        raise InputError(
            "no run of the sweep has a validation perplexity, and nothing else may choose the learning rate and tau; "
            "fit with validation documents"
        )
    first = scored[scored.seed == scored.groupby("tau").seed.transform("min")]
    chosen = first.loc[first.groupby("tau").validation_perplexity.idxmin()].set_index("tau").learning_rate
    return {tau: str(chosen[tau]) for tau in sorted(chosen.index, key=tau_order)}


def at_best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each τ at its best learning rate, for all seeds and tasks.

    Raises:
        InputError: if no run has a validation perplexity.
    """
    return table[table.learning_rate == table.tau.map(best_rates(table))].reset_index(drop=True)


def best_tau(table: pd.DataFrame) -> str:
    """The fixed τ of lowest mean validation perplexity over seeds, each τ at its best learning rate.

    In an unfinished sweep the mean is over the seeds that all τ have, because seeds have different splits and these differ in
    difficulty.

    Raises:
        InputError: if there are fewer than two fixed τ, or no validation perplexity.
    """
    chosen = runs(at_best_rates(table)).dropna(subset="validation_perplexity")
    by_tau = chosen[chosen.tau != LEARNED].pivot(index="tau", columns="seed", values="validation_perplexity")
    if len(by_tau) < 2:
        have = f"only tau {by_tau.index[0]}" if len(by_tau) else "no fixed tau"
        raise InputError(f"a sweep with one tau cannot choose, and this sweep has {have}; give two or more")
    common = by_tau.dropna(axis="columns")
    means = (by_tau if common.empty else common).mean(axis="columns")
    return min(sorted(means.index, key=tau_order), key=lambda tau: means[tau])


def summary(table: pd.DataFrame) -> str:
    """A Markdown table of each τ at its best learning rate: mean ± standard deviation over seeds.

    The column "to the base's" is the ratio of the test perplexity to that of the base model on the same split.

    Raises:
        InputError: if no run has a validation perplexity.
    """
    chosen = runs(at_best_rates(table))
    has_accuracy = "test_accuracy" in chosen
    header = [
        "τ",
        "learning rate",
        "validation perplexity",
        "test perplexity",
        "to the base's",
        *["accuracy"] * has_accuracy,
        "fits",
    ]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for tau, rate in best_rates(table).items():
        rows = chosen[chosen.tau == tau]
        name = "∞" if tau == "inf" else tau
        if tau == LEARNED:
            name = f"learned, {float(f'{np.exp(np.log(rows.fitted_tau).mean()):.3g}'):g}"
        ratio = _mean_sd(rows.test_perplexity / rows.base_test_perplexity, 3)
        cells = [name, rate, _mean_sd(rows.validation_perplexity, 2), _mean_sd(rows.test_perplexity, 2), ratio]
        cells += [_mean_sd(rows.test_accuracy, 3)] if has_accuracy else []
        lines.append(f"| {' | '.join([*cells, str(len(rows))])} |")
    base = chosen.drop_duplicates("seed")
    accuracy = ""
    if has_accuracy:
        known = chosen.dropna(subset="base_test_accuracy").drop_duplicates("seed")
        accuracy = f" {_mean_sd(known.base_test_accuracy, 3)} |"
    return "\n".join([*lines, f"| base | | | {_mean_sd(base.base_test_perplexity, 2)} | 1 |{accuracy} |"])


def _mean_sd(values: pd.Series, digits: int) -> str:
    values = values.dropna()
    if values.empty:
        return "–"
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _run_name(run: pd.Series) -> str:
    return f"the run with tau {run.tau}, learning rate {run.learning_rate}, seed {run.seed}"


def _typed(table: pd.DataFrame, where: str, remedy: str) -> pd.DataFrame:
    """The known columns of the table, in order, each with its type."""
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise InputError(f"{where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; {remedy}")
    if table.empty:
        raise InputError(f"{where} has no row; {remedy}")
    typed = {}
    for name, kind in (_TYPES | {name: kind for name, kind in _MORE_TYPES.items() if name in table}).items():
        try:
            values = [_value(cell, name) for cell in table[name].tolist()]
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where} has {error} in the column {name}, which holds {_ALLOWED[kind]}; {remedy}") from None
        typed[name] = pd.Series(values, dtype=None if kind is str else kind)  # pandas chooses its own type for strings
    return pd.DataFrame(typed)


def _value(cell: Any, name: str) -> Any:
    kind, missing = (_TYPES | _MORE_TYPES)[name], cell is None or cell == "" or cell != cell
    try:
        if kind is float:
            return math.nan if missing else float(cell)
        if missing and name in _MORE_TYPES:
            return ""
        if missing or (kind is int and (float(cell) != int(float(cell)) or abs(int(float(cell))) >= 2**63)):
            raise ValueError
        if name in ("tau", "learning_rate"):
            return number_text(cell)
        str(cell).encode()  # raises for an unpaired surrogate
        return int(float(cell)) if kind is int else str(cell)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(repr(cell)) from None


def _read_csv(path: Path) -> pd.DataFrame:
    # not with pandas, which fills a truncated line with missing values
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"sweep {path} cannot be read ({error}); {_REMEDY}") from None
    if not lines:
        raise InputError(f"sweep {path} is empty; {_REMEDY}")
    uneven = [number for number, line in enumerate(lines, start=1) if len(line) != len(lines[0])]
    if uneven or not text.endswith("\n"):
        raise InputError(f"sweep {path} is cut short at line {uneven[0] if uneven else len(lines)}; {_REMEDY}")
    if len(set(lines[0])) < len(lines[0]):
        raise InputError(f"sweep {path} names a column twice; {_REMEDY}")
    return pd.DataFrame(lines[1:], columns=lines[0], dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # Arrow's own errors are subclasses of these
        raise InputError(f"sweep {path} cannot be read ({' '.join(str(error).split())}); {_REMEDY}") from None
