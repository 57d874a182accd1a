"""Texts of tasks that a fit has not seen: the measure in closed form, and the command."""

from __future__ import annotations

import re
import sys

import pandas as pd
import pytest
import torch
import yaml

from tests.tiny_base import documents, quick_fit, script_main, write_table

main = script_main("compare_unknown")
auroc = sys.modules["compare_unknown"].auroc


def test_the_area_under_the_curve():
    low, high = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4, 0.5])
    assert auroc(low, high) == pytest.approx(5 / 6)
    assert auroc(high, low) == pytest.approx(1 / 6)
    assert auroc(low, low) == 0.5  # ties count half
    assert auroc(torch.zeros(3), torch.zeros(2)) == 0.5


def test_the_command(tmp_path, capsys):
    options = quick_fit(tmp_path) | {"epochs": 2}
    options["data"] = write_table(tmp_path / "four.csv", documents(("Ada", "Børge B.", "Cleo", "Dora"), number=20))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    output = tmp_path / "unknown.csv"
    words = ["--fit_config", str(tmp_path / "fit.yaml"), "--left_out", "2", "--seeds", "2", "--lengths", "4,all"]
    words += ["--threads", "1", "--output", str(output)]
    assert main(words) == 0
    table = pd.read_csv(output, dtype={"tokens": str})
    assert list(table["method"]) == ["prior predictive", "doubt", "bag of words"] * 4
    assert set(table["documents"]) == {8}
    assert set(table["documents_unknown"]) == {8}
    assert table["auroc"].between(0, 1).all()
    said = table[table["method"] == "prior predictive"]
    assert said[["false_alarms", "found"]].stack().between(0, 1).all()
    # tasks have words of their own: who has seen none of them doubts
    assert (table.loc[(table["method"] == "bag of words") & (table["tokens"] == "all"), "auroc"] > 0.6).all()
    before = output.read_bytes()
    capsys.readouterr()
    assert main(words) == 0
    assert output.read_bytes() == before
    assert capsys.readouterr().err == ""  # nothing was fitted again
    assert main([*words, "--draws", "3"]) == 2
    assert "rows with draws 8 instead of 3; give another --output, or move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--lengths", "1"], "lengths has '1'"),
        (["--unknown", "1"], "unknown is 1"),
        (["--left_out", "0"], "left_out is 0"),
        (["--fit_config", "missing.yaml"], "fit_config missing.yaml does not exist"),
        (["--left_out", "21"], "tasks have 1 training documents or more and all three splits"),
    ],
)
def test_bad_input(change, words, capsys, tmp_path):
    assert main([*change, "--output", str(tmp_path / "unknown.csv")]) == 2
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])
