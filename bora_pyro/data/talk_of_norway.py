"""Talk of Norway, the corpus of the BoRA paper: speeches in the Norwegian parliament, with one task for each speaker.

It reads ``ton.csv`` of https://github.com/ltgoslo/talk-of-norway (Lapponi et al. 2018). This library does not contain the file.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "ton.csv")
    >>> speech = "Takk for ordet, president. Det er en stor dag for oss alle her i salen."
    >>> rows = [f'{name},2001-01-{n % 28 + 1:02},"{speech}"' for name in ("Abid Q. Raja", "Aksel Hagen") for n in range(300)]
    >>> _ = path.write_text("\\n".join(["rep_name,time,text", *rows]), encoding="utf-8")
    >>> speeches = talk_of_norway(path, "released")
    >>> sorted(set(speeches["task"])), {name: speeches["split"][:].count(name) for name in ("train", "validation", "test")}
    (['abid q raja', 'aksel hagen'], {'train': 300, 'validation': 150, 'test': 150})

To fit the result, use its own split and the length that the released code was run with::

    load_tasks(talk_of_norway("ton.csv", "released"), tokenizer, split_column="split", max_tokens=128)
"""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd

from bora_pyro.data.files import read_file
from bora_pyro.errors import InputError, check_one_of, nearest

SELECTIONS = ("paper", "released")
COLUMNS = ("rep_name", "text", "time")

# The released code takes the first 25 speakers by alphabet who have more than 200 and fewer than 1000 speeches. It keeps their
# speeches of more than 40 characters and splits them 50/25/25 at random, with this seed.
_RELEASED_BETWEEN = (200, 1000)
_RELEASED_CHARACTERS = 40
_RELEASED_SEED = 42
_RELEASED_TASKS = 25

# The paper takes speakers with more than 100 speeches, and the last third by date for testing. It does not say which of the
# earlier speeches are for validation. Here it is their last quarter, so that the three parts follow one another in time.
_PAPER_MORE_THAN = 100
_PAPER_TEST = 0.33
_PAPER_VALIDATION = 0.25


def talk_of_norway(path: str | Path, selection: str = "paper") -> datasets.Dataset:
    """Read the speeches of one selection, with its split.

        >>> talk_of_norway("ton.csv", "papr")
        Traceback (most recent call last):
        bora_pyro.errors.InputError: ...did you mean 'paper'?

    Args:
        path: ton.csv (or .csv.gz), with at least the columns ``rep_name``, ``text`` and ``time``.
        selection: ``paper``: all speakers with more than 100 speeches; the last 33 % of each, by date, are for testing.
            ``released``, as in the released code: the first 25 by alphabet of the speakers with 200 to 1000 speeches, split
            50/25/25 at random. Task names are in lower case and without dots, as in the paper's tables.

    Returns:
        Columns ``task``, ``text``, ``date`` (yyyy-mm-dd), ``doc_id`` (the speech's row in the file), ``split``.

    Raises:
        InputError: the file does not exist, the selection is unknown, a column is missing, a time is not a date, or no speaker
            is left.
    """
    check_one_of("selection", selection, SELECTIONS)
    speeches = _read(Path(path).expanduser())
    chosen = _released(speeches) if selection == "released" else _paper(speeches)
    if chosen.empty:
        least = _PAPER_MORE_THAN if selection == "paper" else _RELEASED_BETWEEN[0]
        raise InputError(f"file {str(path)!r} has no speaker with more than {least} speeches; give the whole ton.csv")
    return datasets.Dataset.from_dict({name: chosen[name].tolist() for name in ("task", "text", "date", "doc_id", "split")})


def _read(path: Path) -> pd.DataFrame:
    """A table with columns task, text, date, time and doc_id. Speeches without a speaker or a text are left out."""
    if not path.is_file():
        raise InputError(f"file {str(path)!r} does not exist; take ton.csv from https://github.com/ltgoslo/talk-of-norway")
    frame = read_file(path)
    for column in COLUMNS:
        if column not in frame.columns:
            hint = nearest(column, frame.columns)
            raise InputError(f"file {str(path)!r} has no column {column!r}; Talk of Norway has {', '.join(COLUMNS)}{hint}")
    speaker, text = frame["rep_name"].fillna("").astype(str), frame["text"].fillna("").astype(str)
    # read as UTC, because times in summer and in winter have different offsets
    time = pd.to_datetime(frame["time"], utc=True, format="ISO8601", errors="coerce")
    kept = (speaker.str.strip() != "") & (text.str.strip() != "")
    if (unread := kept & time.isna()).any():
        row = int(unread.to_numpy().argmax())
        raise InputError(f"file {str(path)!r}, row {row + 1}: time {frame['time'].iloc[row]!r} is not a date; write yyyy-mm-dd")
    doc_id = [f"ton row {row}" for row in range(1, len(frame) + 1)]
    date = frame["time"].astype(str).str[:10]
    speeches = pd.DataFrame({"task": speaker, "text": text, "date": date, "time": time, "doc_id": doc_id})
    return speeches[kept].reset_index(drop=True)


def _released(speeches: pd.DataFrame) -> pd.DataFrame:
    counts = speeches.groupby("task")["task"].transform("size")
    low, high = _RELEASED_BETWEEN
    speeches = speeches[(counts > low) & (counts < high) & (speeches["text"].str.len() > _RELEASED_CHARACTERS)]
    speeches = speeches.assign(task=speeches["task"].str.replace(".", "", regex=False).str.lower(), split="train")
    parts = []
    for _, one in list(speeches.groupby("task"))[:_RELEASED_TASKS]:
        held_back = one.drop(one.sample(frac=0.5, random_state=_RELEASED_SEED).index)
        validation = held_back.sample(frac=0.5, random_state=_RELEASED_SEED).index
        one.loc[held_back.index, "split"] = "test"
        one.loc[validation, "split"] = "validation"
        parts.append(one)
    return pd.concat(parts) if parts else speeches


def _paper(speeches: pd.DataFrame) -> pd.DataFrame:
    counts = speeches.groupby("task")["task"].transform("size")
    speeches = speeches[counts > _PAPER_MORE_THAN].sort_values(["task", "time"], kind="stable")
    size = speeches.groupby("task")["task"].transform("size")
    earlier = size - (size * _PAPER_TEST).round().astype(int)
    train = earlier - (earlier * _PAPER_VALIDATION).round().astype(int)
    position = speeches.groupby("task").cumcount()
    split = pd.Series("test", index=speeches.index)
    split = split.mask(position < earlier, "validation").mask(position < train, "train")
    return speeches.assign(split=split)
