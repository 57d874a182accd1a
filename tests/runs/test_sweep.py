"""The runs of a sweep on disk: what makes two of them differ, and how they are found again."""

from __future__ import annotations

import math

import pytest

from bora_pyro import InputError
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.tau_sweep import Run
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.sweep import can_resume, difference, finished_rows


def asked(folder, **options):
    return MapFitConfig(**{"output_dir": str(folder), "tau": 100.0} | options)


def test_what_makes_two_runs_differ(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run")
    run.write_config({"tau": 100.0, "seed": 1, "epochs": 6, "threads": 4, "device": "cuda", "data": "speeches.csv"})
    monkeypatch.chdir(tmp_path)
    same = {"seed": 1, "data": str(tmp_path / "speeches.csv")}
    assert difference(asked(tmp_path / "run", **same, threads=1)) is None
    for option, words in (
        ({"tau": math.inf}, "tau 100.0 instead of inf"),
        ({"seed": 2}, "seed 1 instead of 2"),
        ({"data": "other.csv"}, "data speeches.csv instead of other.csv"),
        ({"rank": 4}, "rank 8 instead of 4"),  # older than the option: the default
    ):
        assert difference(asked(tmp_path / "run", **same | option)) == words


def test_folders_that_hold_no_finished_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("missing", "empty"):
        assert finished_rows(asked(tmp_path / name), tau="100", learning_rate="0.01") is None
        assert not can_resume(asked(tmp_path / name))
    with pytest.raises(InputError, match="is a file"):
        finished_rows(asked(tmp_path / "file"), tau="100", learning_rate="0.01")


def test_a_run_names_itself_and_its_folder():
    run = Run("inf", "0.01", 2)
    assert (str(run), run.folder) == ("tau inf, learning rate 0.01, seed 2", "tauinf-lr0.01-seed2")
