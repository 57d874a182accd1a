"""Run a notebook from its py:percent file and store it with its outputs; ``make notebooks`` calls this.

    python notebooks/execute.py notebooks/prior_strength.py

The stored notebook is replaced only after every cell has run.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def executed(twin: Path, *, folder: Path | None = None) -> nbformat.NotebookNode:
    """Run a py:percent file as a notebook.

    Args:
        twin: the py:percent file.
        folder: working directory; default: the folder of the file.

    Returns:
        The notebook with its outputs.
    """
    notebook = jupytext.read(twin)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's ids are random and would change at every run
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder or twin.parent)}},
    )
    return client.execute()


def main(twins: list[Path]) -> None:
    """Run the files one after another and store their notebooks."""
    for twin in twins:
        notebook, stored = executed(twin), twin.with_suffix(".ipynb")
        temporary = stored.with_name(f".{stored.name}.tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, stored)
        print(f"{stored}: {len(notebook.cells)} cells, {stored.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
