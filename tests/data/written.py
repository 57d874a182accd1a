"""Write tables with known contents in every format, quoting, separator, encoding, compression and container."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

COMPRESS = {
    "": lambda raw, name: raw,
    ".gz": lambda raw, name: gzip.compress(raw, 1),
    ".bz2": lambda raw, name: bz2.compress(raw),
    ".xz": lambda raw, name: lzma.compress(raw),
    ".zst": lambda raw, name: pa.compress(raw, codec="zstd", asbytes=True),
    ".zip": lambda raw, name: zipped(raw, name),
}


def zipped(raw, name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, raw)
    return buffer.getvalue()


def delimited(rows, columns, separator=",", quoting=csv.QUOTE_MINIMAL, line_end="\n", header=True):
    """The rows as text; QUOTE_NONE writes them bare."""
    text = io.StringIO()
    options = {"quotechar": None} if quoting == csv.QUOTE_NONE else {}
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=line_end, **options)
    writer.writerows([*([columns] if header else []), *([row[name] for name in columns] for row in rows)])
    return text.getvalue()


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_list(rows):
    return json.dumps(rows, ensure_ascii=False, indent=1)


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def excel(rows, columns):
    buffer = io.BytesIO()
    pd.DataFrame(rows, columns=columns).to_excel(buffer, index=False)
    return buffer.getvalue()


def frame(rows):
    return pd.DataFrame(rows, dtype=object)


def dataset(rows):
    return datasets.Dataset.from_list(rows)
