"""Parquet files, in batches of rows. Values keep their structure, and whole numbers stay exact.

>>> import tempfile, pyarrow as pa
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "a.parquet")
>>> pyarrow.parquet.write_table(pa.table({"task": [2**60 + 1, None], "parts": [[{"kind": "text"}], []]}), path)
>>> list(open_parquet(DataFile.of(path), ReadingOptions()).rows(["task"], []))
[('row 1', {'task': 1152921504606846977}), ('row 2', {'task': None})]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pyarrow
import pyarrow.parquet

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.raw import Part, Row
from bora_pyro.data.readers.texts import one_line
from bora_pyro.errors import InputError
from bora_pyro.files.limits import check_cells

# A batch ends after so many rows, or about so many bytes.
_BATCH_ROWS, _BATCH_BYTES = 1000, 2**20


def open_parquet(file: DataFile, _: ReadingOptions) -> Part:
    """Read the names of the columns.

    Raises:
        InputError: the file is damaged, or has more cells than memory allows.
    """
    with _opened(file) as table:
        columns = list(table.schema_arrow.names)
        if file.whole:
            check_cells(file.label, table.metadata.num_rows, max(len(columns), 1))

    def rows(wanted: Sequence[str] | None, _: list[str]) -> Iterator[Row]:
        names, number = None if wanted is None else [name for name in columns if name in wanted], 0
        with _opened(file) as table:
            for group in range(table.num_row_groups):  # one at a time: Arrow would read ahead
                about = table.metadata.row_group(group)
                size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
                for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=names):
                    batch.validate(full=True)  # checks, among other things, that texts are UTF-8
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", cells

    return Part(file.label, columns, rows)


@contextlib.contextmanager
def _opened(file: DataFile) -> Iterator[pyarrow.parquet.ParquetFile]:
    # a compressed file is expanded, because Arrow reads parquet files from their end
    with file.problems(), contextlib.closing(file.content() if file.packed else file.start()) as raw:
        try:
            with pyarrow.parquet.ParquetFile(raw, pre_buffer=False) as table:
                yield table
        except (InputError, GeneratorExit):
            raise
        except Exception as error:  # Arrow raises many types of errors for damaged files
            raise InputError(
                f"{file.label} is not a parquet file that can be read ({one_line(error)}); write it again"
            ) from error
