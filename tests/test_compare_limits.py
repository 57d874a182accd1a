"""The table of the hierarchy and its limits: which rate is chosen, what is averaged, what is not run again."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare_limits.py"
spec = importlib.util.spec_from_file_location("compare_limits", SCRIPT)
compare_limits = sys.modules["compare_limits"] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
spec.loader.exec_module(compare_limits)


def row(tau, rate, seed, validation, test, base=40.0):
    return dict(zip(compare_limits.COLUMNS, [tau, rate, seed, validation, test, base, 6, 5, 1.0, 10, 10], strict=True))


@pytest.fixture
def comparison(tmp_path):
    rows = [
        row("0", "0.01", 0, 21.0, 19.0),
        row("0", "0.03", 0, 20.0, 22.0),  # worse on the test split, better on the validation split: this one is chosen
        row("0", "0.03", 1, 99.0, 26.0),
        row("inf", "0.01", 0, 10.0, 10.0),
        row("inf", "0.03", 0, 11.0, 9.0),
        row("inf", "0.01", 1, 10.0, 20.0),
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    (tmp_path / "fit.yaml").write_text("epochs: 1\n")
    config = compare_limits.CompareConfig(
        taus=["0", "inf"],
        learning_rates=["0.01", "0.03"],
        output=str(tmp_path / "runs.csv"),
        fit_config=str(tmp_path / "fit.yaml"),
    )
    return compare_limits.Comparison(config)


def test_the_rate_is_chosen_on_the_first_seed_s_validation(comparison):
    assert comparison.best_rates() == {"0": "0.03", "inf": "0.01"}


def test_the_summary_averages_the_chosen_rate_over_seeds(comparison):
    assert comparison.summary().splitlines()[2:] == [
        "| 0 | 0.03 | 24.00 ± 2.83 | 0.600 ± 0.071 | 2 |",
        "| ∞ | 0.01 | 15.00 ± 7.07 | 0.375 ± 0.177 | 2 |",
        "| base | | 40.00 ± 0.00 | 1 | 2 |",
    ]


def test_runs_that_the_table_has_are_not_repeated(comparison, monkeypatch):
    started = []
    monkeypatch.setattr(comparison, "_run_one", started.append)
    comparison.run([("0", "0.01", 0), ("0", "0.01", 1)])
    assert started == [("0", "0.01", 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit_config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--taus", "0,many"], "'many'"),
        (["--seeds", "0"], "seeds is 0"),
        (["--tau", "0"], "did you mean 'taus'?"),
    ],
)
def test_bad_options_end_with_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "documentation.yaml").write_text("epochs: 1\n")
    assert compare_limits.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_fit_that_fails_is_named(comparison, capsys):
    Path(comparison.config.fit_config).write_text("epochs: 0\n")
    with pytest.raises(compare_limits.InputError, match=r"tau 0, learning rate 0.1, seed 0 failed: epochs is 0"):
        comparison.run([("0", "0.1", 0)])
