"""The sweep with real fits: tokens are made once, and the warm path leaves its own table."""

from __future__ import annotations

import datasets
import pandas as pd
import pytest
import yaml

from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.runs import tau_sweep
from tests.tiny_base import documents, quick_fit, write_table


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The YAML of a quick fit."""
    folder = tmp_path_factory.mktemp("tiny")
    options = quick_fit(folder) | {"targets": ["v_proj", "fc2"]}
    (folder / "fit.yaml").write_text(yaml.safe_dump(options))
    return folder / "fit.yaml"


def tokens():
    """The files of cached tokens, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in datasets.config.HF_DATASETS_CACHE.glob("bora_pyro/*")}


def test_a_sweep_of_real_fits_tokenises_once(tiny, tmp_path, capsys, monkeypatch):
    made = []
    tokenise = tau_sweep.Sweep.tokenise
    monkeypatch.setattr(tau_sweep.Sweep, "tokenise", lambda sweep: (tokenise(sweep), made.append(tokens())))
    line = [
        "--fit_config", str(tiny), "--taus", "0", "inf", "--learning_rates", "0.03", "--seeds", "1",
        "--runs_dir", str(tmp_path / "runs"), "--output", str(tmp_path / "tiny.png"),
    ]  # fmt: skip
    assert tau_sweep.COMMAND.main(line) == 0
    assert made == [tokens()]  # the fits have neither written nor added any
    assert len(made[0]) >= 3
    table = read_sweep(tmp_path / "tiny.csv")
    assert table.task.tolist() == ["Ada", "Børge B.", "Cleo"] * 2
    assert table.deviation_norm[3:].tolist() == [0.0] * 3
    assert "validation chooses tau = " in capsys.readouterr().out
    assert tau_sweep.COMMAND.main(line) == 0  # what a real run wrote is taken over
    assert "2 finished runs are taken over" in capsys.readouterr().out
    assert len(made) == 1


def test_data_without_validation_documents_is_refused_before_a_fit(tiny, tmp_path, capsys):
    # of a single training document of a task, no validation document can be cut
    table = documents().assign(part=lambda rows: ["test" if n % 10 else "train" for n in range(len(rows))])
    options = yaml.safe_load(tiny.read_text()) | {"data": write_table(tmp_path / "split.csv", table), "split_column": "part"}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options))
    line = ["--fit_config", str(tmp_path / "fit.yaml"), "--runs_dir", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    for path in ("cold", "warm"):
        assert tau_sweep.COMMAND.main([*line, "--path", path]) == 2
        assert "error: there is no validation document" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_warm_path_leaves_a_table_and_a_figure_beside_the_cold_one(tiny, tmp_path, capsys):
    line = [
        "--fit_config", str(tiny), "--taus", "inf", "0", "100", "learned", "--seeds", "2", "--learning_rates", "0.03",
        "--path", "warm", "--warm_epochs", "1", "--output", str(tmp_path / "tiny"), "--runs_dir", str(tmp_path / "runs"),
    ]  # fmt: skip
    assert tau_sweep.COMMAND.main(line) == 0
    table = pd.read_csv(tmp_path / "tiny_warm.csv", dtype={"tau": str})
    assert [*table.columns] == ["tau", "seed", "validation_perplexity", "test_perplexity", "fit_seconds", "seconds_so_far"]
    assert table.tau.tolist() == ["inf", "100", "0"] * 2
    assert table.seed.tolist() == [0, 0, 0, 1, 1, 1]
    for _, rows in table.groupby("seed"):
        assert rows.seconds_so_far.tolist() == pytest.approx(rows.fit_seconds.cumsum().tolist())
        assert rows.validation_perplexity.is_monotonic_decreasing
    lines = capsys.readouterr().out.splitlines()
    means = table.groupby("tau").validation_perplexity.mean()
    assert lines[-4].startswith(f"| ∞ | {means['inf']:.2f} |")
    assert lines[-1] == f"validation chooses tau = {means.round(4).loc[['inf', '100', '0']].idxmin()}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny_warm.csv", "tiny_warm.png"]
