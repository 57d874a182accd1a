"""Prepare tasks of CrossFit with options for a fit: every fourth task by alphabet, and a line end after each prompt.

    python scripts/experiments/prepare_crossfit.py --data crossfit_choices.jsonl.gz --output runs/crossfit16.jsonl.gz

The input has one question a row: task, split (train, validation, test), prompt, completion (the right option) and options. Of 63
tasks 16 are kept. The completion follows the prompt directly in the model's eyes, so the line end separates the two.

>>> rows = [{"task": task, "prompt": "Is it?", "completion": "yes"} for task in "cab"]
>>> [row["task"] for row in prepared(rows, every=2)], prepared(rows, every=2)[0]["prompt"]
(['c', 'a'], 'Is it?\\n')
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bora_pyro.data.readers import open_source
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option


@dataclass(kw_only=True)
class PrepareConfig:
    """Keep every so many-th task of a file of questions, and end each prompt with a line end."""

    data: str = option("crossfit_choices.jsonl.gz", "the questions, a file of JSON lines", filled=True)
    every: int = option(4, "keep every so many-th task by alphabet, from the first", least=1)
    output: str = option("runs/crossfit16.jsonl.gz", "the file to write, .jsonl.gz", filled=True)

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not self.output.endswith(".jsonl.gz"):
            raise InputError(f"output is {self.output}; give a name that ends with .jsonl.gz")


def prepared(rows: Iterable[Mapping[str, Any]], *, every: int) -> list[dict[str, Any]]:
    """The rows of every so many-th task by alphabet, with a line end after each prompt."""
    rows = list(rows)
    kept = set(sorted({row["task"] for row in rows})[::every])
    return [{**row, "prompt": row["prompt"].rstrip() + "\n"} for row in rows if row["task"] in kept]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as gzipped JSON lines; equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, lambda file: file.write_bytes(gzip.compress(text.encode(), mtime=0)))


def main(argv: list[str]) -> int:
    """Write the file and say what it has."""
    try:
        config = parse_config(PrepareConfig, argv, prog="prepare_crossfit.py")
        raw = open_source(config.data)
        if missing := [name for name in ("task", "split", "prompt", "completion", "options") if name not in raw.columns]:
            raise InputError(f"data {config.data} has no column {missing[0]!r}; give questions with task, split, prompt, ...")
        rows = prepared((cells for _, cells in raw), every=config.every)
        write(Path(config.output), rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: {len(rows)} questions of {', '.join(sorted({row['task'] for row in rows}))}")
    return 0


if __name__ == "__main__":
    run_script(main)
