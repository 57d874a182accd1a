"""The tasks' adapters on their first two principal components, and their dendrogram.

The released code draws its 25 speakers in this way, with all their weights, coloured by home county. Most speakers are in one
cluster, and a few are far from it. The paper does not print this figure. Here everything is computed from the tasks' Gram
matrix, D x D, which is stored as a table. ``--run`` makes the table from a run folder. The run's base model and documents must
then be available.

    python paper_figures/pca_figure.py --gram results/presidents_gram.csv
    python paper_figures/pca_figure.py --run runs/presidents --gram results/presidents_gram.csv

If the tasks are the paper's speakers, colour and marker show their parties. ``--groups`` gives other groups.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import output_option, read_table, reported, run, save

from bora_pyro.diagnostics.plots import style, task_dendrogram, task_pca
from bora_pyro.errors import InputError, nearest
from bora_pyro.options.field import check_choices, option


@dataclass(kw_only=True)
class PcaConfig:
    """Draw the tasks' adapters on two principal components, and their dendrogram."""

    gram: str = option(
        "results/presidents_gram.csv", "the inner products of the tasks, D x D, with task names as header and index"
    )
    run: str | None = option(None, "a run folder; its inner products are written to --gram first")
    space: str = option(
        "delta_w",
        "what is compared: the change of the layers' weights, or the entries of the adapters",
        choices=("delta_w", "weights"),
    )
    groups: str | None = option(None, "csv with columns task, group; colour and marker show the group")
    output: str = output_option("pca.png")

    def validate(self) -> None:
        """Check the options."""
        check_choices(self)


def draw(config: PcaConfig) -> str:
    """Draw the figure and return the path of its file."""
    if config.run is not None:
        write_gram(config.run, config.space, config.gram)
    gram = read_gram(config.gram)
    names = [str(name) for name in gram.index]
    groups = groups_of(names, config.groups)
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(10.5, max(4.5, 0.6 + 0.2 * len(names))), width_ratios=(3, 2))
        task_dendrogram(gram.to_numpy(), names, axes[1])
        task_pca(gram.to_numpy(), names, axes[0], groups=groups)
        return save(figure, config.output)


def write_gram(folder: str, space: str, path: str) -> None:
    """Store the Gram matrix of a run's tasks, with six digits for each entry."""
    import transformers

    from bora_pyro.diagnostics.deviations import task_gram  # imported here because it loads the language model
    from bora_pyro.runs.saved import load_run

    transformers.utils.logging.disable_progress_bar()

    fitted = load_run(folder).fitted
    table = pd.DataFrame(task_gram(fitted, space=space).numpy(), index=pd.Index(fitted.tasks, name="task"), columns=fitted.tasks)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, float_format="%.6g", lineterminator="\n")


def read_gram(path: str) -> pd.DataFrame:
    """Read a stored Gram matrix, with task names as index and columns."""
    table = read_table(path, ["task"], made_by="make it with pca_figure.py --run RUN")
    table = table.set_index(table["task"].astype(str)).drop(columns="task")
    if list(table.columns) != list(table.index) or not all(np.issubdtype(kind, np.number) for kind in table.dtypes):
        raise InputError(
            f"table {path} is not a square table of numbers with the same names in rows and columns; make it with --run RUN"
        )
    return table


def groups_of(names: list[str], path: str | None) -> list[str] | None:
    """The group of each task: from the file, or the party for the paper's speakers, or None for all other tasks."""
    if path is None:
        speakers = reported("tasks").set_index("task")["party"]
        return [str(speakers[name]) for name in names] if set(names) <= set(speakers.index) else None
    groups = read_table(path, ["task", "group"], made_by="give a csv with columns task, group").set_index("task")["group"]
    if missing := [name for name in names if name not in groups.index]:
        raise InputError(
            f"groups {path} lacks the task {missing[0]!r}; give each task a group{nearest(missing[0], groups.index)}"
        )
    return [str(groups[name]) for name in names]


if __name__ == "__main__":
    sys.exit(run(PcaConfig, draw, sys.argv[1:], __file__))
