"""Add columns of groups to a table of documents: each row gets those of its task.

    python scripts/experiments/prepare_groups.py --data us_presidents.csv.gz --output runs/presidents_groups.csv.gz

``--groups`` is a table with the column ``task`` and one column or more of groups. ``groups_presidents.csv`` has the presidents'
parties, and the centuries in which most of their speeches were held.

>>> documents = pd.DataFrame({"task": ["Ada", "Bo", "Ada"], "text": ["a", "b", "c"]})
>>> with_groups(documents, pd.DataFrame({"task": ["Ada", "Bo"], "party": ["Whig", "Free"]})).party.tolist()
['Whig', 'Free', 'Whig']
"""

from __future__ import annotations

import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bora_pyro.data.files import read_file
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.atomic import replace_file
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option

#: The groups of the presidents.
PRESIDENTS = Path(__file__).with_name("groups_presidents.csv")


@dataclass(kw_only=True)
class PrepareConfig:
    """Add columns of groups to a table of documents."""

    data: str = option("us_presidents.csv.gz", "the documents, with a column task", filled=True)
    groups: str = option(str(PRESIDENTS), "a table with the column task and columns of groups", filled=True)
    output: str = option("runs/presidents_groups.csv.gz", "the table to write, .csv.gz", filled=True)

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not self.output.endswith(".csv.gz"):
            raise InputError(f"output is {self.output}; give a name that ends with .csv.gz")


def with_groups(documents: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """The documents with the columns of groups.

    Raises:
        InputError: a table has no column ``task``, a task has no group or stands twice, or a column stands in both tables.
    """
    for name, table in (("the documents", documents), ("the groups", groups)):
        if "task" not in table:
            raise InputError(f"{name} have no column 'task'{nearest('task', map(str, table.columns))}")
    if len(twice := groups.task[groups.task.duplicated()]):
        raise InputError(f"the groups have the task {shown(twice.iloc[0])} twice; give each once")
    if both := [name for name in groups if name != "task" and name in documents]:
        raise InputError(f"the documents have a column {both[0]!r} already; rename that of the groups")
    if missing := sorted({*documents.task} - {*groups.task}):
        raise InputError(f"task {shown(missing[0])} has no row in the groups; give every task one")
    return documents.merge(groups, on="task", how="left", validate="many_to_one")


def main(argv: list[str]) -> int:
    """Write the table and say what it has."""
    try:
        config = parse_config(PrepareConfig, argv, prog="prepare_groups.py")
        groups = read_file(Path(config.groups))
        found = with_groups(read_file(Path(config.data)), groups)
        content = gzip.compress(found.to_csv(index=False).encode(), mtime=0)
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(config.output), lambda file: file.write_bytes(content))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in groups.columns.drop("task"):
        sizes = found.groupby(name).task.nunique()
        print(f"{name}: " + ", ".join(f"{group} ({number} tasks)" for group, number in sizes.items()))
    print(f"{config.output}: {len(found):,} documents of {found.task.nunique()} tasks")
    return 0


if __name__ == "__main__":
    run_script(main)
