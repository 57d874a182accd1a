"""The notebooks: in step with their twins, stored with clean outputs, and running from start to end in their small setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

jupytext, nbformat = pytest.importorskip("jupytext"), pytest.importorskip("nbformat")
for package in ("nbclient", "ipykernel", "ipywidgets"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
TWINS = sorted(path for path in (ROOT / "notebooks").glob("*.py") if path.name != "execute.py")
each = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.stem)


def stored(twin):
    return nbformat.read(twin.with_suffix(".ipynb"), as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def kinds(cell):
    """What a reader gets to see of a cell: names of streams and types of data."""
    return {output.get("name") or tuple(sorted(output.get("data", {}))) for output in cell.outputs}


def test_there_are_notebooks():
    assert [twin.stem for twin in TWINS] == ["posterior", "prior_strength"]


@each
def test_the_twin_has_the_notebook_s_cells(twin):
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (jupytext.read(twin), stored(twin))]
    assert cells[0] == cells[1]


@each
def test_the_stored_notebook_ran_once_from_start_to_end(twin):
    notebook = stored(twin)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}


@each
def test_the_stored_outputs_have_no_noise(twin):
    assert twin.with_suffix(".ipynb").stat().st_size < 1.5e6
    notebook = stored(twin)
    texts = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    texts += [value for output in outputs(notebook) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} <= {"stdout"}
    # neither warnings nor places on the machine where it ran
    assert not [text for text in texts if re.search(r"\wWarning\b|(?<![\w.:/])/\w+/\w+|\b[A-Z]:\\\w", text)]


@each
def test_a_notebook_runs_from_start_to_end(twin, tmp_path, monkeypatch):
    monkeypatch.setenv("BORA_PYRO_NOTEBOOK", "small")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    from execute import executed

    # the stored one ran in its own folder
    notebook = executed(twin, folder=ROOT)
    assert [kinds(cell) for cell in code(notebook)] == [kinds(cell) for cell in code(stored(twin))]
