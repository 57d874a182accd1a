"""Read one table file into a ``pandas.DataFrame``. Errors name the file and the place in it.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "speeches.csv")
    >>> _ = path.write_text("task,text\\nAda,Hello.\\n", encoding="utf-8")
    >>> read_file(path).to_dict("records")
    [{'task': 'Ada', 'text': 'Hello.'}]

The package ``readers`` reads the rows of any source. This module is for the small tables beside the documents: weights,
questions, numbers of documents.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.formats import PLAIN, open_file, table_ending
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.texts import check_unicode, one_line
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError

__all__ = ["SPLITS", "check_unicode", "one_line", "read_file", "table_ending"]


def read_file(path: Path, reading: ReadingOptions | None = None) -> pd.DataFrame:
    """Read the table of a file, with every cell as it is written.

    Cells of .csv, .tsv and .xlsx files are texts: a task may be called ``NA``, and ``1.0`` stays ``1.0``.

    Raises:
        InputError: the ending is unknown, or the file is malformed or larger than :mod:`bora_pyro.files.limits` allows.
    """
    file = DataFile.of(path)
    if file.kind in PLAIN and (reading is None or reading.separator is None):
        raise InputError(f"{file.label} is plain text and no table; give a .csv, .jsonl or .parquet file")
    part = open_file(file, reading or ReadingOptions())
    rows = [cells for _, cells in part.rows(None, [])]
    return pd.DataFrame(rows, columns=part.columns, dtype=object)
