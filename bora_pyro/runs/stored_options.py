"""The options with which the rows of a stored table were computed: only rows with the same ones are added.

>>> rows = with_options([{"seed": 0, "perplexity": 20.5}], {"epochs": 3})
>>> table = pd.DataFrame(rows)
>>> check_options(table, {"epochs": 3}, output="table.csv")
>>> check_options(table, {"epochs": 4}, output="table.csv")
Traceback (most recent call last):
bora_pyro.errors.InputError: output table.csv has rows with epochs 3 instead of 4; give another --output, or move it away
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bora_pyro.errors import InputError, shown
from bora_pyro.runs.config.map_fit import MapFitConfig

#: The column that has them, as JSON.
COLUMN = "options"
#: Options of a fit that do not change its result, and the seed, which is a key of the rows.
NOT_OF_RESULT = {
    "seed", "output_dir", "overwrite", "resume", "threads", "device", "trackers", "export_adapters", "checkpoint_every",
    "checkpoint_minutes", "keep_checkpoints", "task_memory", "gradient_checkpointing", "gradient_norm",
}  # fmt: skip


def fit_options(fit: MapFitConfig, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The options of a fit that are not the defaults, and the names of its data files.

    >>> fit_options(MapFitConfig(rank=4, threads=2, data=["texts/speeches.csv"]))
    {'data': ['speeches.csv'], 'rank': 4}

    Args:
        fit: the options of the fit.
        without: options that the rows do not share, beside ``NOT_OF_RESULT``.
    """
    names = [field.name for field in dataclasses.fields(fit) if field.name not in {*NOT_OF_RESULT, *without}]
    usual = MapFitConfig()
    found = {name: getattr(fit, name) for name in names if getattr(fit, name) != getattr(usual, name)}
    found["data"] = [Path(name).name for name in (fit.data if isinstance(fit.data, list) else [fit.data])]
    return found


def with_options(rows: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with the column ``options``."""
    text = options_json(options)
    return [{**row, COLUMN: text} for row in rows]


def options_json(options: Mapping[str, Any]) -> str:
    """The options as the column has them."""
    return json.dumps(options, sort_keys=True)


def check_options(table: pd.DataFrame, options: Mapping[str, Any], *, output: str | Path, things: str = "rows") -> None:
    """Check that the rows of a table have the given options. A note says how many rows do not say theirs.

    Args:
        table: the stored rows.
        options: those of the new rows (`fit_options`).
        output: the file of the table, for messages.
        things: what a row is, for messages.

    Raises:
        InputError: a row has other options.
    """
    stored = table[COLUMN].replace("", pd.NA) if COLUMN in table else pd.Series(pd.NA, index=table.index, dtype=object)
    for text in stored.dropna().unique():
        try:
            found = dict(json.loads(text))
        except (TypeError, ValueError):
            raise InputError(f"output {output} has options that are no JSON ({shown(text)}); give another --output") from None
        if difference := first_difference(found, json.loads(json.dumps(options))):
            raise InputError(f"output {output} has {things} with {difference}; give another --output, or move it away")
    if unknown := int(stored.isna().sum()):
        print(f"note: {unknown} of {len(table)} {things} of {output} do not say which options they had", file=sys.stderr)


def first_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first option that differs, in words.

    >>> first_difference({"epochs": 3}, {"epochs": 4}), first_difference({}, {"rank": 4}), first_difference({}, {})
    ('epochs 3 instead of 4', 'the usual rank instead of 4', None)
    """
    for name in sorted({*stored, *now}):
        if (old := stored.get(name)) != (new := now.get(name)):
            was = f"the usual {name}" if name not in stored else f"{name} {old}"
            return f"{was} instead of {new if name in now else 'the usual one'}"
    return None
