"""Tables in memory: ``pandas.DataFrame``, ``datasets.Dataset``, and lists of mappings.

>>> frame = pd.DataFrame({"task": pd.array([2**60 + 1, None], dtype="Int64"), "text": ["a", "b"]})
>>> list(frame_part(frame, "the DataFrame").rows(["task"], []))
[('row 1', {'task': 1152921504606846977}), ('row 2', {'task': None})]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pandas as pd

from bora_pyro.data.readers.raw import Part, Row
from bora_pyro.data.readers.texts import one_line
from bora_pyro.errors import InputError

_BATCH = 1000


def frame_part(frame: pd.DataFrame, label: str) -> Part:
    """The rows of a DataFrame. Missing cells become None; numbers stay numbers."""
    columns = [str(name) for name in frame.columns]

    def rows(wanted: Sequence[str] | None, _: list[str]) -> Iterator[Row]:
        names = columns if wanted is None else [name for name in columns if name in wanted]
        cells = [_cells(frame.iloc[:, columns.index(name)]) for name in names]
        for number, values in enumerate(zip(*cells, strict=True) if cells else ((),) * len(frame), start=1):
            yield f"row {number}", dict(zip(names, values, strict=True))

    return Part(label, columns, rows)


def dataset_part(data: datasets.Dataset, label: str) -> Part:
    """The rows of a ``datasets.Dataset``, on disk or in memory."""

    def rows(wanted: Sequence[str] | None, _: list[str]) -> Iterator[Row]:
        names = data.column_names if wanted is None else [name for name in data.column_names if name in wanted]
        number, batches = 0, data.select_columns(names).with_format(None).iter(batch_size=_BATCH)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # the readers of `datasets` raise many types of errors
                raise InputError(f"{label} could not be read to its end ({one_line(error)})") from error
            if batch is None:
                return
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"row {number}", dict(zip(batch, values, strict=True))

    return Part(label, list(data.column_names), rows)


def rows_part(table: Sequence[Mapping[str, Any]], label: str) -> Part:
    """The rows of a list of mappings."""
    columns = dict.fromkeys(name for row in table for name in row)

    def rows(_: Sequence[str] | None, notes: list[str]) -> Iterator[Row]:
        for number, row in enumerate(table, start=1):
            yield f"row {number}", {**dict.fromkeys(columns), **row}

    return Part(label, list(columns), rows, ragged=True)


def _cells(column: pd.Series) -> list[Any]:
    cells = column.astype(object)
    return cells.where(cells.notna(), None).tolist()
