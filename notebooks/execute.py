"""Run the py:percent twin of a notebook and store the notebook, outputs and all, beside it: what ``make notebooks`` does.

    python notebooks/execute.py notebooks/prior_strength.py

The stored notebook is replaced only when every cell has run.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def executed(twin: Path, *, folder: Path | None = None) -> nbformat.NotebookNode:
    """The twin as a notebook with outputs, run in ``folder`` (default: the twin's own)."""
    notebook = jupytext.read(twin)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws them at random, which would be a change at every run
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder or twin.parent)}},
    )
    return client.execute()


def main(twins: list[Path]) -> None:
    for twin in twins:
        notebook, stored = executed(twin), twin.with_suffix(".ipynb")
        temporary = stored.with_name(f".{stored.name}.tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, stored)
        print(f"{stored}: {len(notebook.cells)} cells, {stored.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
