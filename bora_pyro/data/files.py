"""Read one file or folder of documents into a table. Errors name the file and the place in it.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "speeches.csv")
    >>> _ = path.write_text("task,text\\nAda,Hello.\\n", encoding="utf-8")
    >>> read_file(path).to_dict("records")
    [{'task': 'Ada', 'text': 'Hello.'}]

A file becomes a ``pandas.DataFrame`` and a folder a ``datasets.Dataset``. ``tables.read_table`` gives both one form.
"""

from __future__ import annotations

import gzip
import io
import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pandas as pd
import pyarrow.parquet

from bora_pyro.data.folder_check import check_folder
from bora_pyro.data.split_names import SPLITS, find_split
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.limits import check_cells, read_bounded

P = TypeVar("P")
TABLE_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")


def table_ending(path: Path | str) -> str | None:
    """The ending of a file name, if it is one of `TABLE_ENDINGS`; otherwise None.

    >>> table_ending("Speeches.CSV.gz")
    '.csv.gz'
    """
    name = Path(path).name.lower()
    return max((ending for ending in TABLE_ENDINGS if name.endswith(ending)), key=len, default=None)


def read_file(path: Path) -> pd.DataFrame:
    """Read a .csv, .tsv, .jsonl (each also with .gz) or .parquet file.

    Cells of .csv and .tsv files stay texts, as written: a task may be called ``NA``, and ``1.0`` stays ``1.0``.

    Raises:
        InputError: the ending is unknown; the file is not UTF-8, not a gzip file, or malformed; or its expanded size is larger
            than :mod:`bora_pyro.files.limits` allows.
    """
    if not path.is_file():
        raise InputError(f"file {str(path)!r} is not a regular file; give one of {', '.join(TABLE_ENDINGS)}")
    ending = table_ending(path)
    if ending is None:
        hint = nearest("".join(path.suffixes), TABLE_ENDINGS)
        raise InputError(f"file {str(path)!r} has an ending that is not known; use one of {', '.join(TABLE_ENDINGS)}{hint}")
    if ending == ".parquet":
        return _read_parquet(path)
    text = _read_text(path, compressed=ending.endswith(".gz"))
    if ending.startswith(".jsonl"):
        return _parse_json_lines(path, text)
    return _parse_delimited(path, text, separator="\t" if ending.startswith(".tsv") else ",")


def read_folder(path: Path, *, split: str | None = None) -> tuple[datasets.Dataset, bool]:
    """Read a folder that ``save_to_disk`` wrote, or a folder of data files like a hub repository.

    Args:
        path: the folder.
        split: the one split to read; None reads all splits (see `join_splits`).

    Returns:
        The table, and whether it has splits of its own.

    Raises:
        InputError: the folder is of neither kind or cannot be read, a link or a file name in it leads out of it, or it holds an
            archive.
    """
    check_folder(path)
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return join_splits(datasets.load_from_disk(path), split)
        return join_splits(datasets.load_dataset(str(path)), split)
    except InputError:
        raise
    except Exception as error:  # the readers of `datasets` raise many types of errors
        raise InputError(
            f"folder {str(path)!r} could not be read ({one_line(error)}); give a folder written by datasets' save_to_disk, "
            f"or one that holds {', '.join(TABLE_ENDINGS)} files"
        ) from error


def join_splits(data: datasets.Dataset | datasets.DatasetDict, split: str | None = None) -> tuple[datasets.Dataset, bool]:
    """Join all splits into one table, with a column ``split`` for the split of each row, or take one split alone.

        >>> part = datasets.Dataset.from_dict({"text": ["a"]})
        >>> table, has_splits = join_splits(datasets.DatasetDict({"train": part, "dev": part}))
        >>> table["split"][:], has_splits
        (['train', 'validation'], True)

    Args:
        data: one table, or one for each split.
        split: the split to take alone.

    Returns:
        The table, and whether it has several splits.

    Raises:
        InputError: there is no such split, or there are several splits and one has a name that stands for no side.
    """
    if isinstance(data, datasets.Dataset):
        if split is not None:
            raise InputError(f"hub_split is {shown(split)}, but the data has no splits; leave it out")
        return data, False
    parts = choose_splits(data, split)
    if len(parts) == 1:
        return parts[0][1], False
    joined = []
    for name, part in parts:
        part = part.remove_columns("split") if "split" in part.column_names else part
        joined.append(part.add_column("split", [name] * len(part)))
    return datasets.concatenate_datasets(joined), True


def choose_splits(parts: Mapping[str, P], split: str | None) -> list[tuple[str, P]]:
    """The splits of a source with the sides that they stand for, train first; or one split alone, if ``split`` names it."""
    names = ", ".join(shown(name) for name in parts)
    if not parts:
        raise InputError("the saved DatasetDict has no splits; save one with a split 'train'")
    if split is not None:
        if split not in parts:
            raise InputError(f"hub_split is {shown(split)}; the splits of the data are {names}{nearest(split, parts)}")
        return [(split, parts[split])]
    if len(parts) == 1:
        return [*parts.items()]
    for name in parts:
        if find_split(name) is None:
            raise InputError(
                f"the data has the splits {names}, and {shown(name)} stands for none of {', '.join(SPLITS)}; read one split "
                "alone with hub_split to have it split by group"
            )
    return [(side, part) for side in SPLITS for name, part in parts.items() if find_split(name) == side]


def check_unicode(text: str, where: str) -> None:
    r"""Check that a text has no lone surrogate, such as JSON's "\ud800", which UTF-8 cannot encode.

    >>> check_unicode("\ud83d", "row 1")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: row 1 has half a surrogate pair, '\ud83d'; write the whole character
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a surrogate pair, {text[error.start]!r}; write the whole character") from None


def one_line(error: BaseException, *, characters: int = 200) -> str:
    """The type of an error and the beginning of its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:characters]}" if message else type(error).__name__


def _read_text(path: Path, *, compressed: bool) -> str:
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            raw = read_bounded(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"file {str(path)!r} is not a whole gzip file ({one_line(error)}); compress it again with gzip"
        ) from error
    except OSError as error:
        raise InputError(f"file {str(path)!r} could not be read ({one_line(error)})") from error
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"file {str(path)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; save the file as UTF-8"
        ) from None


def _parse_delimited(path: Path, text: str, *, separator: str) -> pd.DataFrame:
    check_cells(path, text.count("\n") + 1, text.partition("\n")[0].count(separator) + 1)
    try:
        with warnings.catch_warnings():
            # If the first row is longer than the header, pandas only warns, and shifts every cell by one column.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.EmptyDataError:
        raise InputError(f"file {str(path)!r} is empty; give a header line and one document a row") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InputError(
            f"file {str(path)!r} is malformed ({one_line(error)}); put texts with commas, quotes or line ends in double quotes"
        ) from error


def _parse_json_lines(path: Path, text: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    columns: set[str] = set()
    # Not str.splitlines: a JSON string may contain line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: lists a thousand deep
            what = getattr(error, "msg", None) or one_line(error)
            raise InputError(f"file {str(path)!r}, line {number}: not JSON ({what}); write one JSON object a line") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise InputError(
                f"file {str(path)!r}, line {number}: a JSON {kind}; write one JSON object a line, with named columns"
            )
        rows.append(row)
        columns.update(row)
        check_cells(path, len(rows), len(columns))
    for column in columns:
        check_unicode(column, f"file {str(path)!r}, a column's name")
    return pd.DataFrame(rows, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        about = pyarrow.parquet.read_metadata(path)
        check_cells(path, about.num_rows, max(about.num_columns, 1))
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)  # checks, among other things, that texts are UTF-8
        return table.to_pandas()
    except InputError:
        raise
    except Exception as error:  # Arrow raises many types of errors for damaged files
        raise InputError(f"file {str(path)!r} is not a parquet file ({one_line(error)}); write it again") from error
