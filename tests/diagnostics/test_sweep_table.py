"""The sweep table: from run folders, to disk and back, and what it chooses."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from bora_pyro import InputError
from bora_pyro.diagnostics.sweep_table import (
    COLUMNS,
    at_best_rates,
    best_rates,
    best_tau,
    number_text,
    read_sweep,
    runs,
    summary,
    sweep_table,
    with_run,
    write_sweep,
)
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results_table import rows_of_run

TASKS = ("NA", 'a "quoted", name', "Børge\nB.")


def rows(tau, rate, seed, validation, test, *, base=40.0, fitted=None, tasks=TASKS):
    """The rows of one run."""
    return [
        {
            "tau": tau, "learning_rate": rate, "seed": seed, "fitted_tau": float(tau) if fitted is None else fitted,
            "validation_perplexity": validation, "test_perplexity": test, "base_test_perplexity": base, "epochs": 6,
            "best_epoch": 5, "fit_seconds": 1 / 3, "training_tokens_per_second": 1e3, "peak_memory_bytes": 2**33, "task": task,
            "task_train_documents": 10 + n, "task_test_documents": 5, "task_base_test_perplexity": base,
            "task_test_perplexity": test + n, "deviation_norm": 0.1 * n,
        }
        for n, task in enumerate(tasks)
    ]  # fmt: skip


RUNS = [
    ("0", "0.01", 0, 21.0, 19.0),
    ("0", "0.03", 0, 20.0, 22.0),  # worse on the test split, better on the validation split: this rate is chosen
    ("0", "0.03", 1, 24.0, 26.0),
    ("0", "0.01", 1, 1.0, 1.0),  # a later seed chooses no rate
    ("inf", "0.01", 0, 10.0, 10.0),
    ("inf", "0.03", 0, 11.0, 9.0),
    ("inf", "0.01", 1, 30.0, 20.0),
]


@pytest.fixture
def table():
    return sweep_table(row for run in RUNS for row in rows(*run))


def metrics(tau="inf", **changes):
    tasks = {
        slug: {
            "name": name, "train_documents": 4, "test_documents": 2, "base_test_perplexity": 30.0, "test_perplexity": value,
            "deviation_norm": 0.5,
        }
        for slug, name, value in (("ada", "Ada", 12.5), ("bo", "Bo", None))
    }  # fmt: skip
    return {
        "validation_perplexity": 20.0, "test_perplexity": 21.0, "base_test_perplexity": 33.0, "tau": tau, "learning_rate": 0.01,
        "seed": 2, "epochs": 6, "best_epoch": 4, "fit_seconds": 9.5, "training_tokens_per_second": 100.0,
        "peak_memory_bytes": 12345, "tasks": tasks,
    } | changes  # fmt: skip


def run_folder(path, content):
    with RunFolder.create(path) as run:
        run.write_config({"tau": 1.0})
        run.write_metrics(content)
    return run


def test_the_rows_of_a_run_are_its_metrics(tmp_path):
    found = rows_of_run(run_folder(tmp_path / "run", metrics()))
    assert list(found.columns) == COLUMNS
    of_run = {
        "tau": "inf", "learning_rate": "0.01", "seed": 2, "fitted_tau": math.inf, "validation_perplexity": 20.0,
        "test_perplexity": 21.0, "base_test_perplexity": 33.0, "epochs": 6, "best_epoch": 4, "fit_seconds": 9.5,
        "training_tokens_per_second": 100.0, "peak_memory_bytes": 12345, "task_train_documents": 4, "task_test_documents": 2,
        "task_base_test_perplexity": 30.0, "deviation_norm": 0.5,
    }  # fmt: skip
    assert found.drop(columns=["task", "task_test_perplexity"]).to_dict("records") == [of_run, of_run]
    assert found["task"].tolist() == ["Ada", "Bo"]
    assert found["task_test_perplexity"].iloc[0] == 12.5
    assert math.isnan(found["task_test_perplexity"].iloc[1])


def test_a_learned_tau_is_known_by_its_groups(tmp_path):
    run_folder(tmp_path / "run", metrics(214.5, tau_by_group={"q_proj.lora_A": 214.5}))
    first = rows_of_run(tmp_path / "run").iloc[0]
    assert (first.tau, first.fitted_tau) == ("learned", 214.5)
    asked = rows_of_run(tmp_path / "run", tau="1e2", learning_rate="3e-2").iloc[0]
    assert (asked.tau, asked.learning_rate) == ("100", "0.03")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": None}, "has None in the column seed, which holds whole numbers; run the fit again"),
        ({"tasks": {}}, "has no row"),
        ({"tasks": {"ada": {"name": "Ada"}}}, "lacks 'deviation_norm'; run the fit again"),
        ({"tau": None}, "cannot be used"),
        ({"tasks": [1]}, r"has \[1\] for 'tasks'; run the fit again"),
        ({"seed": 10**30}, "in the column seed, which holds whole numbers"),
        ({"epochs": -(2**63) - 1}, "in the column epochs, which holds whole numbers"),
        ({"epochs": 1e300}, r"has 1e\+300 in the column epochs"),
    ],
)
def test_metrics_that_cannot_be_used(tmp_path, changes, words):
    run_folder(tmp_path / "run", metrics() | changes)
    with pytest.raises(InputError, match=words) as error:
        rows_of_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_run_that_is_not_finished(tmp_path):
    RunFolder.create(tmp_path / "run").write_config({})
    with pytest.raises(InputError, match="not finished"):
        rows_of_run(tmp_path / "run")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_table_comes_back_from_disk_exactly(table, tmp_path, ending):
    table.loc[0, "validation_perplexity"] = math.nan
    write_sweep(table, tmp_path / "new" / "v1.2")
    found = read_sweep(tmp_path / "new" / f"v1.2.{ending}")
    pd.testing.assert_frame_equal(found, table)
    assert found["fitted_tau"].max() == math.inf
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["v1.2.csv", "v1.2.parquet"]


def test_a_run_that_comes_again_replaces_its_rows(table):
    again = sweep_table(rows("0", "0.03", 1, 23.0, 25.0))
    found = with_run(table, again)
    assert len(found) == len(table)
    run = (found.tau == "0") & (found.learning_rate == "0.03") & (found.seed == 1)
    assert found[run].validation_perplexity.tolist() == [23.0] * len(TASKS)
    assert with_run(None, again).equals(again)


def test_runs_stand_in_the_order_of_tau_rate_and_seed():
    table = None
    for tau, rate in [("learned", "0.01"), ("inf", "0.01"), ("1000", "0.03"), ("1000", "0.003"), ("20", "0.01"), ("0", "0.01")]:
        table = with_run(table, sweep_table(rows(tau, rate, 0, 9.0, 9.0, fitted=5.0)))
    assert runs(table)[["tau", "learning_rate"]].to_numpy().tolist() == [
        ["0", "0.01"], ["20", "0.01"], ["1000", "0.003"], ["1000", "0.03"], ["inf", "0.01"], ["learned", "0.01"],
    ]  # fmt: skip
    assert table["task"].tolist() == list(TASKS) * 6


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", "1000"), ("0.0", "0"), ("1.50", "1.5"), ("inf", "inf"), ("1e-05", "1e-05"), ("learned", "learned")],
)
def test_a_number_has_one_text(text, number):
    assert number_text(text) == number
    if number != "learned":
        assert float(number_text(text)) == float(text)


def test_the_rate_is_chosen_on_the_first_seed_s_validation(table):
    assert best_rates(table) == {"0": "0.03", "inf": "0.01"}
    chosen = at_best_rates(table)
    assert {(row.tau, row.learning_rate, row.seed) for row in chosen.itertuples()} == {
        ("0", "0.03", 0), ("0", "0.03", 1), ("inf", "0.01", 0), ("inf", "0.01", 1),
    }  # fmt: skip
    assert len(chosen) == 4 * len(TASKS)


def test_tau_is_chosen_on_the_mean_validation(table):
    assert best_tau(table) == "inf"  # (10 + 30) / 2 against (20 + 24) / 2
    better = sweep_table(rows("0", "0.03", 1, 19.0, 99.0))  # (20 + 19) / 2
    assert best_tau(with_run(table, better)) == "0"
    learned = sweep_table(rows("learned", "0.01", 0, 1.0, 1.0, fitted=3.0))
    assert best_tau(with_run(table, learned)) == "inf"


def test_a_seed_that_one_tau_lacks_decides_nothing(table):
    harder = sweep_table(rows("0", "0.03", 2, 9e9, 9e9) + rows("100", "0.01", 0, 9.9, 9.0))
    assert best_tau(pd.concat([table, harder], ignore_index=True)) == "100"  # by seed 0, which all have


def test_one_tau_cannot_choose(table):
    for one in ("0", "inf"):
        with pytest.raises(InputError, match=rf"a sweep with one tau cannot choose, .* only tau {one}; give two or more"):
            best_tau(with_run(table[table.tau == one], sweep_table(rows("learned", "0.01", 0, 9.0, 9.0, fitted=5.0))))


@pytest.mark.parametrize("choose", [best_rates, best_tau, at_best_rates, summary])
def test_without_validation_nothing_is_chosen(table, choose):
    table["validation_perplexity"] = math.nan
    with pytest.raises(InputError, match="no run of the sweep has a validation perplexity"):
        choose(table)


def test_a_rate_without_a_score_is_not_chosen(table):
    table.loc[(table.tau == "0") & (table.learning_rate == "0.03"), "validation_perplexity"] = math.nan
    assert best_rates(table)["0"] == "0.01"


def test_the_summary_averages_the_chosen_rate_over_seeds(table):
    for fitted, seed in ((100.0, 0), (400.0, 1)):
        table = with_run(table, sweep_table(rows("learned", "0.01", seed, 12.0, 10.0, fitted=fitted)))
    table = with_run(table, sweep_table(rows("100", "0.01", 0, 9.0, 8.0)))
    assert summary(table).splitlines()[2:] == [
        "| 0 | 0.03 | 22.00 ± 2.83 | 24.00 ± 2.83 | 0.600 ± 0.071 | 2 |",
        "| 100 | 0.01 | 9.00 | 8.00 | 0.200 | 1 |",
        "| ∞ | 0.01 | 20.00 ± 14.14 | 15.00 ± 7.07 | 0.375 ± 0.177 | 2 |",
        "| learned, 200 | 0.01 | 12.00 ± 0.00 | 10.00 ± 0.00 | 0.250 ± 0.000 | 2 |",
        "| base | | | 40.00 ± 0.00 | 1 | |",
    ]


def spoilt(table, tmp_path, change):
    write_sweep(table, tmp_path / "sweep")
    file = tmp_path / "sweep.csv"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-30], "is cut short at line"),
        (lambda text: text[:-1], "is cut short at line"),
        (lambda text: text[: text.index('Børge\nB."') + 7], "cannot be read|is cut short"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-2]), "is cut short: the run with tau inf, .* has 2 of 3 tasks"),
        (lambda text: "", "is empty"),
        (lambda text: text.splitlines(keepends=True)[0], "has no row"),
        (lambda text: text.replace("tau,learning_rate", "tau,rate", 1), "lacks the column learning_rate"),
        (lambda text: "tau,seed\n0,1\n", "lacks the columns learning_rate, fitted_tau, .*, deviation_norm"),
        (lambda text: text.replace("21.0", "many", 1), "has 'many' in the column validation_perplexity, which holds numbers"),
        (lambda text: text.replace("0,0.01,0,", "0,0.01,half,", 1), "has 'half' in the column seed, which holds whole numbers"),
        (lambda text: text.replace("0,0.01,0,", "0,0.01,0.5,", 1), "has '0.5' in the column seed"),
        (lambda text: text + text.splitlines(keepends=True)[1], "has the run with tau 0, learning rate 0.01, seed 0 twice"),
        (lambda text: text.replace("seed", "tau", 1), "names a column twice"),
    ],
)
def test_a_csv_that_is_no_whole_table(table, tmp_path, change, words):
    file = spoilt(table, tmp_path, change)
    with pytest.raises(InputError, match=words) as error:
        read_sweep(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_csv_cut_anywhere_is_never_read_as_a_shorter_table(table, tmp_path):
    write_sweep(table, tmp_path / "sweep")
    file = tmp_path / "sweep.csv"
    whole = file.read_bytes()
    header, a_run = whole.index(b"\n") + 1, len(TASKS)
    ends = [n + 1 for n in range(header, len(whole)) if whole[n : n + 1] == b"\n"]
    for size in range(0, len(whole), 23):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_sweep(file)
    # where whole runs are left, the table is a shorter one, and a good one
    file.write_bytes(whole[: ends[(a_run + 1) * 2 - 1]])  # one name holds a line's end
    assert len(read_sweep(file)) == 2 * a_run


def test_other_files_that_are_no_table(table, tmp_path):
    write_sweep(table, tmp_path / "sweep")
    parquet = tmp_path / "sweep.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-100])
    (tmp_path / "bytes.csv").write_bytes(b"tau\xff\xfe\n")
    (tmp_path / "table.json").write_text(json.dumps({}))
    for name, words in (
        ("sweep.parquet", "cannot be read"),
        ("bytes.csv", "cannot be read"),
        ("table.json", "unknown ending; give the .csv or the .parquet"),
        ("nowhere.csv", "does not exist"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read_sweep(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_write_that_fails_leaves_the_old_table(table, tmp_path, monkeypatch):
    write_sweep(table, tmp_path / "sweep")
    before = (tmp_path / "sweep.csv").read_bytes()

    def full(frame, path, **_):
        path.write_text("half a ta")
        raise OSError("no space left")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(InputError, match="no space"):
        write_sweep(table.head(3), tmp_path / "sweep")
    assert (tmp_path / "sweep.csv").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sweep.csv", "sweep.parquet"]
