"""The sweep where something goes wrong: fits that fail, signals, bad options and foreign files."""

from __future__ import annotations

import os
import signal
import time
from threading import Thread

import pytest

from bora_pyro.diagnostics.sweep_table import runs
from bora_pyro.runs import tau_sweep
from tests.runs.sweep_workshop import CLIMBED


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


def test_a_fit_that_fails_is_named_and_the_others_go_on(shop):
    shop.how(**{"tau0-lr0.01-seed0": "the loss is not finite at step 3", "tau100-lr0.01-seed0": "kill"})
    code, printed = shop.main("--seeds", "2")
    assert code == 2
    errors = sorted(printed.err.splitlines())
    assert errors == [
        "error: 2 fits failed; the table has the others; the same command tries the failed ones again",
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
    assert (code, printed.err) == (130, "error: interrupted; the same command resumes the sweep\n")
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
    assert tau_sweep.COMMAND.main(arguments) == 2
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
