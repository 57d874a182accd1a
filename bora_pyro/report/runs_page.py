"""The page of a folder of runs: one row a run, and the pictures of a sweep if the runs are one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from bora_pyro.diagnostics.sweep_table import KEY, LEARNED
from bora_pyro.errors import InputError
from bora_pyro.files.text import replaced
from bora_pyro.report.blocks import Cell, Column, Lines, Number, Page, Pictures, Section, Table, short_number
from bora_pyro.report.sweep_page import HERE, MOST, options_block, perplexity_number, score_cell, sweep_pictures, tau_cell
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG, REPORT
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.versions import versions


def runs_page(folder: str | Path, output: str | Path) -> Page:
    """Make the page of a folder of runs: one row a run, and the pictures of a sweep if the runs are one.

    Args:
        folder: folder with runs at any depth. Runs that are not finished are named in the notes.
        output: path of the page, from which it links to the pages of single runs.

    Raises:
        InputError: the folder has no finished run.
    """
    folder, tables, notes = Path(folder), dict[str, pd.DataFrame](), list[str]()
    configs: list[dict[str, Any]] = []
    for path in _run_folders(folder):
        name = str(path.relative_to(folder))
        try:
            tables[name] = rows_of_run(path)
        except InputError as error:
            notes.append(f"{name} is left out: {error}")
        else:
            configs.append(RunFolder(path).read_config())
    if not tables:
        raise InputError(f"{folder} has no finished run{f' ({notes[0]})' if notes else ''}; give a run, a sweep's table, or runs")
    shared = {key: value for key, value in configs[0].items() if all(config.get(key, value) == value for config in configs)}
    shared = {key: value for key, value in shared.items() if key not in ("overwrite", "resume", "output_dir")}
    table = pd.concat(tables.values(), ignore_index=True)
    firsts = pd.DataFrame([rows.iloc[0] for rows in tables.values()], index=list(tables))
    pictures = [*sweep_pictures(table)] if _is_sweep(firsts, tables) else []
    best = _best(firsts)
    sections = [
        Section("results", "Results", [_each_run(firsts, folder, Path(output))], _best_text(firsts, best)),
        Section("pictures", "What sharing does", [Pictures(pictures)] if pictures else []),
        Section("tasks", "By task", [_tasks_by_run(tables)] if len(tables) <= MOST else []),
        Section("configuration", "Configuration", [options_block(shared)]),
        Section("notes", "Notes", [Lines(notes)] if notes else []),
    ]
    tasks = {task for rows in tables.values() for task in rows["task"]}
    numbers = [Number("runs", f"{len(tables)}", f"{len(notes)} not finished" if notes else "")]
    if best is not None:
        numbers.insert(0, perplexity_number("lowest validation perplexity", firsts.validation_perplexity[best], str(best)))
        if np.isfinite(firsts.test_perplexity[best]):
            numbers.insert(1, perplexity_number("its test perplexity", firsts.test_perplexity[best], ""))
    subtitle = f"{len(tables)} finished run{'s' * (len(tables) != 1)} · {len(tasks):,} tasks"
    return Page("runs", folder.resolve().name, subtitle, numbers, sections, versions=versions(), versions_of=HERE)


def _run_folders(folder: Path) -> Iterator[Path]:
    for where, names, files in os.walk(folder):
        names.sort()
        if CONFIG in files and Path(where) != folder:
            names.clear()  # there are no runs inside a run
            yield Path(where)


def _is_sweep(firsts: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> bool:
    """Whether the runs have the same tasks, several τ, and no two the same τ, learning rate and seed."""
    tasks = {tuple(rows["task"]) for rows in tables.values()}
    scored = firsts["validation_perplexity"].notna().any() and firsts["test_perplexity"].notna().any()
    return len(tasks) == 1 and not firsts.duplicated(KEY).any() and firsts["tau"].nunique() > 1 and bool(scored)


def _each_run(firsts: pd.DataFrame, folder: Path, output: Path) -> Table:
    rows = []
    for name, run in firsts.iterrows():
        report = folder / str(name) / REPORT
        link = quote(os.fsencode(os.path.relpath(report, output.parent).replace(os.sep, "/"))) if report.is_file() else None
        fitted = short_number(run.fitted_tau) if run.tau == LEARNED else None
        ratio = run.test_perplexity / run.base_test_perplexity
        rows.append(
            [
                Cell(str(name), str(name), link=link), tau_cell(run.tau, fitted),
                Cell(run.learning_rate, float(run.learning_rate)), run.seed, run.validation_perplexity, run.test_perplexity,
                run.base_test_perplexity, ratio, run.best_epoch, run.fit_seconds,
            ]
        )  # fmt: skip
    columns = [
        Column("run"), Column("prior τ", number=True), Column("learning rate", number=True), Column("seed", 0),
        Column("validation perplexity", 2), Column("test perplexity", 2), Column("base perplexity", 2),
        Column("ratio to base", 3), Column("best epoch", 0), Column("seconds", 1),
    ]  # fmt: skip
    return Table("The finished runs; a name links to the page of its run, if there is one", columns, rows)


def _tasks_by_run(tables: Mapping[str, pd.DataFrame]) -> Table:
    names = dict.fromkeys(task for rows in tables.values() for task in rows["task"])
    scores = {name: dict(zip(rows["task"], rows["task_test_perplexity"], strict=True)) for name, rows in tables.items()}
    rows = []
    for task in names:
        own = [scores[name].get(task, math.nan) for name in tables]
        lowest = min((score for score in own if np.isfinite(score)), default=None)
        rows.append([replaced(task), *(score_cell(score, lowest) for score in own)])
    columns = [Column("task"), *(Column(name, number=True) for name in tables)]
    return Table("Test perplexity by task and run; the lowest of each task is bold", columns, rows)


def _best(firsts: pd.DataFrame) -> Any:
    scored = firsts["validation_perplexity"].dropna()
    return None if scored.empty else scored.idxmin()


def _best_text(firsts: pd.DataFrame, best: Any) -> str:
    if best is None or len(firsts) < 2:
        return ""
    return (
        f"{replaced(str(best))} has the lowest validation perplexity. Runs on different documents or base models "
        "cannot be compared."
    )
