"""Tables that a figure cannot be drawn from, and outputs that cannot be: errors are one line."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.paper_figures.calls import OF_A_SWEEP, draw


@pytest.mark.parametrize("name", OF_A_SWEEP)
def test_a_sweep_that_is_missing(script, tmp_path, capsys, name):
    path = tmp_path / "none.parquet"
    assert draw(script(name), "--sweep", path, "--output", tmp_path / "out.png") == 2
    assert capsys.readouterr().err == f"error: sweep {path} does not exist; give the --output of tau_sweep.py\n"


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("pca_figure", "--gram", "make it with pca_figure.py --run RUN"),
        ("forms_figure", "--forms", "make it with compare_forms.py"),
        ("fidelity_table", "--fidelity", "make it with compare_variants.py"),
    ],
)
@pytest.mark.parametrize(
    ("content", "about"),
    [(None, "does not exist"), ("", "cannot be read"), ("a,b\n1,2\n", "lacks the column"), ("head", "has no row")],
)
def test_another_table_that_cannot_be_used(script, tmp_path, capsys, name, option, words, content, about):
    module, path = script(name), tmp_path / "table.csv"
    if content is not None:
        path.write_text(",".join(getattr(module, "COLUMNS", ["task"])) + "\n" if content == "head" else content)
    assert draw(module, option, path, "--output", tmp_path / "out.png") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: table {path} {about}")
    assert err.endswith(f"{words}\n")
    assert err.count("\n") == 1


def test_a_gram_table_that_is_not_square(script, tmp_path, capsys):
    (tmp_path / "gram.csv").write_text("task,ada,bo\nada,1,2\ncleo,2,1\n")
    assert draw(script("pca_figure"), "--gram", tmp_path / "gram.csv") == 2
    assert "is not a square table of numbers" in capsys.readouterr().err


def test_groups_that_lack_a_task(script, results, tmp_path, capsys):
    (tmp_path / "groups.csv").write_text("task,group\nada,x\nbo,y\ncloe,x\ndag,y\n")
    argv = ["--gram", results / "presidents_gram.csv", "--groups", tmp_path / "groups.csv", "--output", tmp_path / "out.png"]
    assert draw(script("pca_figure"), *argv) == 2
    assert "lacks the task 'cleo'; give each task a group; did you mean 'cloe'?" in capsys.readouterr().err


def test_an_output_of_an_unknown_kind(script, results, tmp_path, capsys):
    assert draw(script("figure1"), "--sweep", results / "presidents.csv", "--output", tmp_path / "out.pgn") == 2
    assert "give a .png, .pdf or .svg" in capsys.readouterr().err


def test_an_output_below_a_file(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert draw(script("model_figure"), "--output", tmp_path / "file" / "out.png") == 2
    assert capsys.readouterr().err.startswith("error: output ")


def test_a_variant_without_validation(script, results, tmp_path, capsys):
    table = pd.read_csv(results / "fidelity.csv")
    table.loc[table["variant"] == "norm_penalty", "validation_perplexity"] = np.nan
    table.to_csv(tmp_path / "f.csv", index=False)
    assert draw(script("fidelity_table"), "--fidelity", tmp_path / "f.csv", "--output", tmp_path / "t.md") == 2
    assert "variant 'norm_penalty' has no validation perplexity" in capsys.readouterr().err
