"""Make the paper's table of documents from Talk of Norway, for ``scripts/map_fit.py``.

    python paper_figures/prepare_talk_of_norway.py --ton ton.csv --output talk_of_norway.csv.gz

``ton.csv`` is the file in https://github.com/ltgoslo/talk-of-norway. The table has the columns task, text, doc_id and split.
The reported numbers are from the selection ``released``: its document counts are those in ``reported/tasks.csv``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common import run

from bora_pyro.data.files import table_ending
from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.talk_of_norway import SELECTIONS, talk_of_norway
from bora_pyro.errors import InputError
from bora_pyro.options.field import check_choices, option

COLUMNS = ["task", "text", "doc_id", "split"]


@dataclass(kw_only=True)
class PrepareConfig:
    """Make the paper's table of documents from Talk of Norway."""

    ton: str = option("ton.csv", "the corpus, as its authors publish it")
    selection: str = option(
        "released", "which speakers and which split: as in the released code, or as the paper describes them", choices=SELECTIONS
    )
    output: str = option("talk_of_norway.csv.gz", "the table to write, .csv or .csv.gz")

    def validate(self) -> None:
        """Check the options."""
        check_choices(self)
        if table_ending(self.output) not in (".csv", ".csv.gz"):
            raise InputError(f"output {self.output} has an unknown ending; give a .csv or a .csv.gz")


def prepare(config: PrepareConfig) -> str:
    """Write the table and return a line about its content."""
    table = talk_of_norway(config.ton, config.selection).to_pandas()[COLUMNS]
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(config.output, index=False, lineterminator="\n")
    counts = ", ".join(f"{(table['split'] == split).sum()} {split}" for split in SPLITS)
    return f"{config.output}: {table['task'].nunique()} tasks; documents: {counts}"


if __name__ == "__main__":
    sys.exit(run(PrepareConfig, prepare, sys.argv[1:], __file__))
