"""Check every causal language model class of the installed transformers with a tiny model: does a fit do what it should?

    python scripts/maintenance/check_architectures.py --output results/architectures.csv --page docs/architectures.md

``architecture_checks.py`` has the checks and ``tiny_architectures.py`` the models. Each type runs in a child process with a time
limit. A row is written after each type, and a later run goes on with the types that have no row (``--again true``: all). The exit
code is 1 if a type has a fault: a traceback, or a result that differs from its reference.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import pandas as pd
import peft
import torch
import transformers
from architecture_checks import CHECKS, FAULT, REFUSED, UNBUILT, Outcome, check_type
from tiny_architectures import causal_types

from bora_pyro.errors import InputError, nearest
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option

#: Longest remark of the page, in characters.
LONGEST = 250
COLUMNS = ("type", "class", "result", "targets", *CHECKS, "lines")


@dataclass(kw_only=True)
class CheckConfig:
    """Check the causal classes of transformers."""

    types: list[str] | None = option(None, "only these model types (default: all)")
    output: str = option("results/architectures.csv", "CSV with a row for each type; types that are in it are not checked again")
    again: bool = option(False, "check the types again that are in the CSV")
    page: str | None = option(None, "page in Markdown to write from the CSV")
    fits: bool = option(True, "also fit by the command line and resume the fit")
    seconds: float = option(240.0, "time limit of a type", positive=True)
    jobs: int = option(2, "types to check at one time", least=1)

    def validate(self) -> None:
        """Check the names of the types.

        Raises:
            InputError: transformers has no such causal type.
        """
        for name in self.types or ():
            if name not in causal_types():
                raise InputError(f"transformers has no causal model type {name!r}{nearest(name, causal_types())}")


def checked(model_type: str, config: CheckConfig) -> Outcome:
    """Check one type in a child process."""
    context = multiprocessing.get_context("fork")  # the libraries take seconds to import
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(model_type, config.fits, theirs))
    child.start()
    theirs.close()
    try:
        if ours.poll(config.seconds):
            return ours.recv()
        why = f"no result within {config.seconds:g} seconds"
    except EOFError:
        child.join()
        why = f"the process ended with status {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return Outcome(model_type, cells={"logits": FAULT}, lines=[why])


def _child(model_type: str, fits: bool, results: Connection) -> None:
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        outcome = check_type(model_type, Path(folder), fits=fits)
    results.send(outcome)


def row_of(outcome: Outcome) -> dict[str, str]:
    """The row of a type."""
    named = {"type": outcome.model_type, "class": outcome.kind, "result": outcome.result, "targets": outcome.targets}
    lines = re.sub(r"'/[^']*/base'", "'base'", " | ".join(outcome.lines))  # a temporary folder
    return named | {check: outcome.cells.get(check, "") for check in CHECKS} | {"lines": lines}


def rows(config: CheckConfig) -> Iterator[Outcome]:
    """Check the types that are not in the table yet, in the order in which they end."""
    file, wanted = Path(config.output), config.types or causal_types()
    known = set() if config.again or not file.exists() else set(_read(file)["type"])
    with ThreadPoolExecutor(config.jobs) as pool:
        yield from pool.map(lambda name: checked(name, config), [name for name in wanted if name not in known])


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


_PAGE = """# Which architectures work

`scripts/maintenance/check_architectures.py` builds a tiny random model of every type that transformers' `AutoModelForCausalLM`
loads, and checks it with this library. This page is made by the script from `results/architectures.csv` (transformers
{transformers}, PEFT {peft}, torch {torch}).

{total} types, encoders as decoders (`is_decoder: true`) among them: **{works} work, {refused} are refused** with one line
before anything is written, {fault} have a fault. Of the refused ones, {unbuilt} are types of which transformers could not build
a tiny model here, so their adapters could not be tried.

A type works if all of this holds for its tiny model:

- The losses of the base are those of the model's own forward pass, also where the embedding of token 0 or of the padding is zero.
- A later token changes no earlier logit, padding changes no logit of a text, and a text as long as the context can be read.
- A batch with texts of two tasks gives the losses that PEFT gives with each exported adapter alone, for the usual targets and for
  `all-linear`; and an exported adapter is read back bit for bit.
- Texts generated in a batch are those generated one at a time, with the log-probabilities of one pass over the whole text.
- Gradient checkpointing gives the same gradients, or is refused.
- `bora map-fit` fits two epochs from the saved model, and a killed fit is resumed to the same numbers, bit for bit.

A tiny random model shows that the computation is right. It does not show that adapters of these layers are the best ones for a
type; `--targets` chooses others.

## Types that work

The remarks name the checks that end in one line for this type, and the notes that a fit prints.

{working}

## Types that are refused

{refusing}
"""


def page(table: pd.DataFrame) -> str:
    """The page in Markdown about a table of results."""
    counts = table["result"].value_counts()
    parts = {name: table[table["result"] == name] for name in ("works", REFUSED, FAULT)}
    working = [(row["type"], row["class"], row["targets"], _remarks(row)) for _, row in parts["works"].iterrows()]
    refusing = [(row["type"], row["class"], _remarks(row)) for name in (REFUSED, FAULT) for _, row in parts[name].iterrows()]
    return _PAGE.format(
        transformers=transformers.__version__,
        peft=peft.__version__,
        torch=torch.__version__.split("+")[0],
        total=len(table),
        works=counts.get("works", 0),
        refused=counts.get(REFUSED, 0),
        fault=counts.get(FAULT, 0) or "none",
        unbuilt=int(table["lines"].str.contains(UNBUILT, regex=False).sum()) or "none",
        working=_markdown(("type", "class", "usual targets", "remarks"), working),
        refusing=_markdown(("type", "class", "the line"), refusing),
    )


def _remarks(row: pd.Series) -> str:
    """The lines of a type, each once and not too long, with temporary folders left out."""
    lines = [re.sub(r"^logits: |^note: |^fit: error: |^transformers cannot.*", "", line) for line in row["lines"].split(" | ")]
    lines = [re.sub(r"base model '[^']*'", "the base", line) for line in lines]
    return "; ".join(line if len(line) <= LONGEST else line[:LONGEST] + "..." for line in dict.fromkeys(lines) if line)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |" for row in rows)


def main(argv: list[str]) -> int:
    """Check, write the table, and write the page if one is named."""
    config = parse_config(CheckConfig, argv)
    file = Path(config.output)
    for outcome in rows(config):
        table = _read(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
        table = pd.concat([table[table["type"] != outcome.model_type], pd.DataFrame([row_of(outcome)])])
        table.sort_values("type").to_csv(file, index=False)
        print(f"{outcome.model_type:24} {outcome.result:8} {outcome.lines[-1][:150] if outcome.lines else ''}", flush=True)
    table = _read(file)
    counts = table["result"].value_counts()
    print(f"{len(table)} types: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    if config.page is not None:
        Path(config.page).write_text(page(table), encoding="utf-8")
    return int(FAULT in counts)


if __name__ == "__main__":
    run_script(main)
