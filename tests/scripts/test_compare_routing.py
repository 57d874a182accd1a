"""Task inference beside a bag of words: measures in closed form, and the command."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch

from bora_pyro.data import TokenSplit
from tests.tiny_base import documents, map_run, quick_fit, script_main, write_table

main = script_main("compare_routing")
routing = sys.modules["compare_routing"]


def test_the_calibration_error():
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]], dtype=torch.float64)
    # bin of 0.95: half right; bin of 0.65: all right
    found = routing.ece(p.log(), torch.tensor([0, 1, 1, 1]))
    assert found == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)
    assert routing.ece(torch.tensor([[1.0, 0.0]], dtype=torch.float64).log(), torch.tensor([0])) == 0


def test_beginnings():
    split = TokenSplit.from_documents([[0, 5, 6, 7], [0, 8]], task=[1, 0], num_tasks=2)
    some = routing.beginnings(split, 3)
    assert [some.document(n).tolist() for n in range(2)] == [[0, 5, 6], [0, 8]]
    assert some.task.tolist() == [1, 0]


def test_the_command(tmp_path, capsys):
    options = quick_fit(tmp_path) | {"data": write_table(tmp_path / "more.csv", documents(number=20)), "epochs": 4}
    map_run(options | {"learning_rate": 0.1, "output_dir": tmp_path / "run"})
    assert main([str(tmp_path / "run"), "--lengths", "4,all", "--output", str(tmp_path / "routing.csv")]) == 0
    table = pd.read_csv(tmp_path / "routing.csv", dtype={"tokens": str})
    assert list(table["method"]) == ["bora", "bora, calibrated", "bag of words"] * 2
    assert set(table["documents"]) == {12}
    assert table["accuracy"].between(0, 1).all()
    assert (table["log_probability"] <= 0).all()
    # tasks have words of their own: who has seen them knows the task
    assert table.loc[(table["method"] == "bag of words") & (table["tokens"] == "all"), "accuracy"].item() == 1
    out = capsys.readouterr().out
    assert "the right task: " in out
    assert "averaged by p(d | tokens before): " in out
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: no run is given")
    assert main([str(tmp_path / "run"), "--lengths", "1"]) == 2
    assert "lengths has '1'" in capsys.readouterr().err
