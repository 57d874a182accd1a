"""Make the paper's table of documents out of Talk of Norway, for ``scripts/map_fit.py``.

    python paper_figures/prepare_talk_of_norway.py --ton ton.csv --output talk_of_norway.csv.gz

``ton.csv`` is that of https://github.com/ltgoslo/talk-of-norway; the table has the columns task, text, doc_id and split. The
selection ``released`` is the one behind the reported numbers: its counts of documents are those of ``reported/tasks.csv``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common import run

from bora_pyro.data.files import SPLITS, table_ending
from bora_pyro.data.talk_of_norway import SELECTIONS, talk_of_norway
from bora_pyro.errors import InputError
from bora_pyro.options.field import check_choices, option

COLUMNS = ["task", "text", "doc_id", "split"]


@dataclass(kw_only=True)
class PrepareConfig:
    """Make the paper's table of documents out of Talk of Norway."""

    ton: str = option("ton.csv", "the corpus, as its authors publish it")
    selection: str = option(
        "released", "which speakers and which split: the released code's or the paper's words", choices=SELECTIONS
    )
    output: str = option("talk_of_norway.csv.gz", "the table that is written, .csv or .csv.gz")

    def validate(self) -> None:
        """Check the values."""
        check_choices(self)
        if table_ending(self.output) not in (".csv", ".csv.gz"):
            raise InputError(f"output {self.output} has an unknown ending; give a .csv or a .csv.gz")


def prepare(config: PrepareConfig) -> str:
    """Write the table; returns what it holds."""
    table = talk_of_norway(config.ton, config.selection).to_pandas()[COLUMNS]
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.output, index=False, lineterminator="\n")
    counts = ", ".join(f"{(table['split'] == split).sum()} {split}" for split in SPLITS)
    return f"{config.output}: {table['task'].nunique()} tasks; documents: {counts}"


if __name__ == "__main__":
    sys.exit(run(PrepareConfig, prepare, sys.argv[1:], __file__))
