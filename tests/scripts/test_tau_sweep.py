"""The sweep: which runs it makes, which it takes over, what it leaves when something goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from threading import Thread

import datasets
import pandas as pd
import pytest
import yaml

from bora_pyro.diagnostics.sweep_table import read_sweep, runs
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.sweep import next_rates
from tests.tiny_base import documents, quick_fit, script, write_table

tau_sweep = script("tau_sweep")

# What map_fit.py does, without a fit: a run folder whose perplexities follow from τ, rate and seed. It notes each call in
# calls.txt, and fails or waits where the file `how.json` says so.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
import yaml

here = Path(__file__).parent
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = Path(given["--output_dir"]).name
with (here / "calls.txt").open("a") as file:
    file.write(f"{name} resume={given['--resume']} overwrite={given['--overwrite']}\\n")
how = json.loads((here / "how.json").read_text()).get(name, "")
config = yaml.safe_load(Path(given["--config"]).read_text()) | {
    "tau": float(given["--tau"]), "learning_rate": float(given["--learning_rate"]), "seed": int(given["--seed"]),
}
folder = Path(given["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("# bora_pyro run: the resolved configuration\\n" + yaml.safe_dump(config))
if how == "wait":
    (folder / "metrics.jsonl").write_text(str(os.getpid()))
    time.sleep(60)
if how == "kill":
    os.kill(os.getpid(), 9)
if how:
    sys.exit(f"a line\\nerror: {how}")
tau, rate, seed = config["tau"], config["learning_rate"], config["seed"]
best = 0.01 if tau == 0 else 0.03
score = 20 + seed + abs(rate - best) * 100 + {0: 3, 100: 0}.get(tau, 2)
task = {
    "train_documents": 3, "test_documents": 3, "base_test_perplexity": 50.0, "test_perplexity": score + 1, "deviation_norm": 1.0,
}
(folder / "metrics.json").write_text(json.dumps({
    "validation_perplexity": None if config.get("patience") == 0 else score, "test_perplexity": score + 1,
    "base_test_perplexity": 50.0, "tau": tau if tau < float("inf") else "inf", "learning_rate": rate, "seed": seed, "epochs": 2,
    "best_epoch": 2, "fit_seconds": 1.5, "training_tokens_per_second": 10.0, "peak_memory_bytes": 10,
    "tasks": {"ada": task | {"name": "Ada"}, "bo": task | {"name": "Bo"}},
}))
"""


class Workshop:
    """A folder with a stand-in of map_fit.py, and the sweep's ``main`` within it."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.runs = folder, capsys, folder / "runs" / "sweep"
        (folder / "fit.yaml").write_text("epochs: 2\n")
        (folder / "map_fit.py").write_text(STAND_IN)
        self.how()

    def how(self, **runs):
        (self.folder / "how.json").write_text(json.dumps({name.replace("_", "-"): how for name, how in runs.items()}))

    def line(self, *more):
        return [
            "--fit_config", str(self.folder / "fit.yaml"), "--runs_dir", str(self.folder / "runs"), "--taus", "inf", "0", "1e2",
            "--output", str(self.folder / "out" / "sweep"), *more,
        ]  # fmt: skip

    def main(self, *more):
        """The exit code, and what was printed."""
        code = tau_sweep.main(self.line(*more))
        return code, self.capsys.readouterr()

    def calls(self):
        """The fits that were made since the last question, in order."""
        file = self.folder / "calls.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def names(self):
        return sorted(call.split()[0] for call in self.calls())

    def table(self):
        return read_sweep(self.folder / "out" / "sweep.csv")


@pytest.fixture
def shop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tau_sweep, "MAP_FIT", tmp_path / "map_fit.py")
    monkeypatch.setattr(tau_sweep.Sweep, "tokenise", lambda _: None)
    return Workshop(tmp_path, capsys)


CLIMBED = ["tau0-lr0.003-seed0", "tau0-lr0.01-seed0", "tau0-lr0.03-seed0", *(
    f"tau{tau}-lr{rate}-seed0" for tau in ("100", "inf") for rate in ("0.01", "0.03")
)]  # fmt: skip


def tried(rates, perplexity, search):
    """The rates that a search tries, in order."""
    scores, order = {}, []
    while new := next_rates(rates, scores, search):
        order += new
        scores |= {rate: perplexity[rate] for rate in new}
    return order


RATES = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("perplexities", "order"),
    [
        ([5, 4, 3, 2, 1], "345"),
        ([5, 4, 3, 2, 9], "345"),
        ([1, 2, 3, 4, 5], "3421"),
        ([9, 2, 3, 4, 5], "3421"),
        ([9, 8, 3, 4, 5], "342"),
        ([9, 8, 3, 2, 2.5], "345"),
        ([1, 2, 3, 3, 3], "3421"),  # no better is no reason to go on
        ([1, 2, math.inf, math.inf, 1], "3421"),
        ([9, math.inf, 3, math.inf, 1], "342"),
    ],
)
def test_the_climb_goes_up_first_and_stops_where_it_gets_worse(perplexities, order):
    assert "".join(tried(RATES, dict(zip(RATES, perplexities, strict=True)), "climb")) == order


@pytest.mark.parametrize("number", range(1, 6))
def test_the_climb_finds_the_one_minimum_that_the_grid_finds(number):
    rates = RATES[:number]
    for lowest in range(number):
        perplexity = {rate: abs(n - lowest) for n, rate in enumerate(rates)}
        climbed = tried(rates, perplexity, "climb")
        assert rates[lowest] in climbed
        assert len(set(climbed)) == len(climbed)
        assert sorted(tried(rates, perplexity, "grid")) == rates


def test_the_other_seeds_are_fitted_at_each_tau_s_best_rate(shop):
    code, printed = shop.main("--seeds", "2")
    assert code == 0
    best = ["tau0-lr0.01-seed1", "tau100-lr0.03-seed1", "tauinf-lr0.03-seed1"]
    assert shop.names() == sorted([*CLIMBED, *best])
    assert sorted(folder.name for folder in shop.runs.iterdir()) == sorted([*CLIMBED, *best])
    lines = printed.out.splitlines()
    assert lines[-5:] == [
        "| 0 | 0.01 | 23.50 ± 0.71 | 24.50 ± 0.71 | 0.490 ± 0.014 | 2 |",
        "| 100 | 0.03 | 20.50 ± 0.71 | 21.50 ± 0.71 | 0.430 ± 0.014 | 2 |",
        "| ∞ | 0.03 | 22.50 ± 0.71 | 23.50 ± 0.71 | 0.470 ± 0.014 | 2 |",
        "| base | | | 50.00 ± 0.00 | 1 | |",
        "validation chooses tau = 100",
    ]
    out = shop.folder / "out"
    assert sorted(file.name for file in out.iterdir()) == ["sweep.csv", "sweep.parquet", "sweep.png"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(runs(shop.table())) == 10
    assert read_sweep(out / "sweep.parquet").equals(shop.table())


def test_the_grid_tries_every_rate(shop):
    assert shop.main("--seeds", "1", "--search", "grid", "--jobs", "4")[0] == 0
    assert shop.names() == sorted(f"tau{tau}-lr{rate}-seed0" for tau in ("0", "100", "inf") for rate in ("0.003", "0.01", "0.03"))


def test_finished_runs_are_not_repeated_and_the_table_is_the_same(shop):
    shop.main("--seeds", "1")
    first = shop.table()
    shop.calls()
    code, printed = shop.main("--seeds", "1")
    assert (code, shop.calls()) == (0, [])
    assert "7 finished runs are taken over" in printed.out
    assert shop.table().equals(first)
    for file in (shop.folder / "out").iterdir():  # from the folders alone
        file.unlink()
    assert shop.main("--seeds", "1")[0] == 0
    assert shop.calls() == []
    assert shop.table().equals(first)


def test_runs_that_only_the_table_has_are_not_repeated(shop):
    shop.main("--seeds", "1")
    first = shop.table()
    (shop.folder / "runs").rename(shop.folder / "elsewhere")
    shop.calls()
    assert shop.main("--seeds", "1")[0] == 0
    assert shop.calls() == []
    assert shop.table().equals(first)


def test_another_tau_joins_the_table(shop):
    shop.main("--seeds", "1")
    shop.calls()
    line = shop.line("--seeds", "1")
    line[line.index("inf") : line.index("--output")] = ["0", "1000"]
    assert tau_sweep.main(line) == 0
    assert shop.names() == ["tau1000-lr0.01-seed0", "tau1000-lr0.03-seed0"]
    assert runs(shop.table()).tau.unique().tolist() == ["0", "100", "1000", "inf"]


def test_unfinished_and_damaged_runs_are_made_again(shop):
    shop.main("--seeds", "1")
    first = shop.table()
    for file in (shop.folder / "out").iterdir():
        file.unlink()
    (shop.runs / "tau100-lr0.01-seed0" / "metrics.json").write_text('{"test_perpl')
    (shop.runs / "tau100-lr0.03-seed0" / "metrics.json").write_text('{"test_perplexity": 1.0}')
    (shop.runs / "tau0-lr0.01-seed0" / "metrics.json").unlink()
    shop.calls()
    assert shop.main("--seeds", "1")[0] == 0
    assert sorted(shop.calls()) == [
        f"{name} resume=false overwrite=true" for name in ("tau0-lr0.01-seed0", "tau100-lr0.01-seed0", "tau100-lr0.03-seed0")
    ]
    assert shop.table().equals(first)


def checkpoint(folder):
    Checkpoints(folder / "checkpoints").save(1, {}, {})
    return folder / "checkpoints" / "step-00000001.safetensors"


def test_an_unfinished_run_goes_on_from_its_checkpoint(shop):
    shop.main("--seeds", "1")
    for tau, change in (("0", None), ("100", "config"), ("inf", "checkpoint")):
        folder = shop.runs / f"tau{tau}-lr0.01-seed0"
        (folder / "metrics.json").unlink()
        file = checkpoint(folder)
        if change == "config":  # what was begun is not what is asked for now
            RunFolder(folder).write_config(RunFolder(folder).read_config() | {"epochs": 9})
        if change == "checkpoint":
            file.write_bytes(file.read_bytes()[:20])
    for file in (shop.folder / "out").iterdir():
        file.unlink()
    shop.calls()
    assert shop.main("--seeds", "1")[0] == 0
    assert sorted(shop.calls()) == [
        "tau0-lr0.01-seed0 resume=true overwrite=false",
        "tau100-lr0.01-seed0 resume=false overwrite=true",
        "tauinf-lr0.01-seed0 resume=false overwrite=true",
    ]


def test_a_foreign_folder_is_named_before_anything_runs(shop):
    shop.main("--seeds", "1")
    foreign = shop.runs / "tau0-lr0.03-seed0"
    for file in [*foreign.iterdir(), *(shop.folder / "out").iterdir()]:
        file.unlink()
    (foreign / "thesis.tex").write_text("years of work")
    shop.calls()
    code, printed = shop.main("--seeds", "1")
    assert (code, shop.calls()) == (2, [])
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert "tau0-lr0.03-seed0 holds 'thesis.tex', which no run wrote" in printed.err
    assert (foreign / "thesis.tex").read_text() == "years of work"
    assert len(runs(shop.table())) == 6  # the others are in the table


def test_a_finished_run_with_other_options_is_not_thrown_away(shop):
    shop.main("--seeds", "1")
    shop.calls()
    (shop.folder / "fit.yaml").write_text("epochs: 3\n")
    code, printed = shop.main("--seeds", "1")
    assert (code, shop.calls()) == (2, [])
    assert "is a finished run with epochs 2 instead of 3; give another --output or --runs_dir" in printed.err
    assert "(so it is with 7 folders)" in printed.err
    assert len(list(shop.runs.glob("*/metrics.json"))) == 7


def test_a_fit_that_fails_is_named_and_the_others_go_on(shop):
    shop.how(**{"tau0-lr0.01-seed0": "the loss is not finite at step 3", "tau100-lr0.01-seed0": "kill"})
    code, printed = shop.main("--seeds", "2")
    assert code == 2
    errors = sorted(printed.err.splitlines())
    assert errors == [
        "error: 2 fits failed; the table has the others, and the same command tries them again",
        "error: the fit with tau 0, learning rate 0.01, seed 0 failed: the loss is not finite at step 3",
        "error: the fit with tau 100, learning rate 0.01, seed 0 failed: it was ended by signal 9",
    ]
    table = runs(shop.table())
    # a rate that failed counts as the worst: the search goes on from it
    assert {"tau0-lr0.03-seed0", "tau0-lr0.03-seed1", "tau100-lr0.03-seed1"} <= set(shop.names())
    assert len(table) == len(list(shop.runs.glob("*/metrics.json")))
    assert "| 0 | 0.03 |" in printed.out
    shop.how()
    assert shop.main("--seeds", "2")[0] == 0  # the same command mends it
    assert {"tau0-lr0.01-seed0 resume=false overwrite=true", "tau100-lr0.01-seed0 resume=false overwrite=true"} <= set(
        shop.calls()
    )


def test_a_sweep_of_failures_has_no_table(shop):
    shop.how(**{f"tau{tau}-lr{rate}-seed0": "no" for tau in (0, 100, "inf") for rate in ("0.003", "0.01", "0.03")})
    code, printed = shop.main()
    assert code == 2
    assert "9 fits failed" in printed.err
    assert not (shop.folder / "out").exists()


def test_without_validation_documents_the_first_run_is_kept(shop):
    (shop.folder / "fit.yaml").write_text("epochs: 2\npatience: 0\n")  # the stand-in then has no validation perplexity
    code, printed = shop.main("--seeds", "1", "--jobs", "1")
    assert code == 2
    assert printed.err == (
        "error: no run of the sweep has a validation perplexity, and nothing else may choose the learning rate and tau; "
        "fit with validation documents\n"
    )
    assert shop.names()[0] == "tau0-lr0.01-seed0"
    table = runs(shop.table())
    assert table[["tau", "learning_rate"]].to_numpy().tolist() == [["0", "0.01"]]
    assert table.test_perplexity.notna().all()


def test_an_output_that_is_no_table_is_left_alone(shop):
    (shop.folder / "out").mkdir()
    (shop.folder / "out" / "sweep.csv").write_text("tau,seed\n0,1\n")
    for path in ("cold", "warm"):
        code, printed = shop.main("--path", path)
        assert (code, shop.calls()) == (2, [])
        assert "lacks the columns" in printed.err
        assert "make it again with tau_sweep.py, move it away, or give another --output" in printed.err
    assert (shop.folder / "out" / "sweep.csv").read_text() == "tau,seed\n0,1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_fits_and_leaves_a_good_table(shop, number):
    shop.how(**{"tau100-lr0.01-seed0": "wait", "tauinf-lr0.01-seed0": "wait"})
    pids = [shop.runs / f"tau{tau}-lr0.01-seed0" / "metrics.jsonl" for tau in ("100", "inf")]

    def interrupt():
        deadline = time.monotonic() + 30
        while not all(file.exists() and file.stat().st_size for file in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        if time.monotonic() < deadline:  # else the sweep ends by itself, and the test fails
            os.kill(os.getpid(), number)

    watcher, begun, handler = Thread(target=interrupt), time.monotonic(), signal.getsignal(number)
    watcher.start()
    code, printed = shop.main("--seeds", "1")
    watcher.join()
    assert (code, printed.err) == (130, "error: interrupted; the same command goes on from here\n")
    assert time.monotonic() - begun < 30  # the fits wait for a minute
    for file in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert runs(shop.table())[["tau", "learning_rate"]].to_numpy().tolist() == [["0", "0.01"]]
    shop.how()
    shop.calls()
    assert shop.main("--seeds", "1")[0] == 0
    assert shop.names() == [name for name in CLIMBED if name != "tau0-lr0.01-seed0"]
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit_config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--taus", "0,many"], "taus has 'many'; give numbers from 0 up, inf or learned"),
        (["--taus", "0", "-1"], "tau is -1.0"),
        (["--taus", "100", "1e2"], "taus has only 100; a sweep needs two or more"),
        (["--taus", "100", "learned", "--path", "warm"], "taus has only 100 and learned; a sweep needs two or more numbers"),
        (["--learning_rates", "learned"], "learning_rates has 'learned'"),
        (["--learning_rates", "0"], "learning_rate is 0.0"),
        (["--seeds", "0"], "seeds is 0"),
        (["--jobs", "0"], "jobs is 0"),
        (["--warm_epochs", "0"], "warm_epochs is 0"),
        (["--search", "clim"], "search is 'clim'; allowed: climb, grid; did you mean 'climb'?"),
        (["--path", "hot"], "path is 'hot'"),
        (["--tau", "0"], "did you mean 'taus'?"),
    ],
)
def test_bad_options_end_with_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "documentation.yaml").write_text("epochs: 1\n")
    assert tau_sweep.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert [file.name for file in tmp_path.rglob("*")] == ["results", "documentation.yaml"]


def test_bad_options_of_the_fits_are_found_before_any_begins(shop):
    (shop.folder / "fit.yaml").write_text("epoch: 2\n")
    code, printed = shop.main()
    assert (code, shop.calls()) == (2, [])
    assert "unknown option 'epoch'; did you mean 'epochs'?" in printed.err


# the runs' folders


# with real fits


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
    assert tau_sweep.main(line) == 0
    assert made == [tokens()]  # the fits have neither written nor added any
    assert len(made[0]) >= 3
    table = read_sweep(tmp_path / "tiny.csv")
    assert table.task.tolist() == ["Ada", "Børge B.", "Cleo"] * 2
    assert table.deviation_norm[3:].tolist() == [0.0] * 3
    assert "validation chooses tau = " in capsys.readouterr().out
    assert tau_sweep.main(line) == 0  # what a real run wrote is taken over
    assert "2 finished runs are taken over" in capsys.readouterr().out
    assert len(made) == 1


def test_data_without_validation_documents_is_refused_before_a_fit(tiny, tmp_path, capsys):
    table = documents().assign(part=lambda rows: ["test" if n % 3 else "train" for n in range(len(rows))])
    options = yaml.safe_load(tiny.read_text()) | {"data": write_table(tmp_path / "split.csv", table), "split_column": "part"}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options))
    line = ["--fit_config", str(tmp_path / "fit.yaml"), "--runs_dir", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    for path in ("cold", "warm"):
        assert tau_sweep.main([*line, "--path", path]) == 2
        assert "error: there is no validation document" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_the_warm_path_leaves_a_table_and_a_figure_beside_the_cold_one(tiny, tmp_path, capsys):
    line = [
        "--fit_config", str(tiny), "--taus", "inf", "0", "100", "learned", "--seeds", "2", "--learning_rates", "0.03",
        "--path", "warm", "--warm_epochs", "1", "--output", str(tmp_path / "tiny"), "--runs_dir", str(tmp_path / "runs"),
    ]  # fmt: skip
    assert tau_sweep.main(line) == 0
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
