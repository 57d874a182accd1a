"""The sweep: which rates it tries, which runs it makes, and which it takes over."""

from __future__ import annotations

import math

import pytest

from bora_pyro.diagnostics.sweep_table import read_sweep, runs, write_sweep
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.runs import tau_sweep
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.sweep import next_rates
from tests.runs.sweep_workshop import CLIMBED


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


def test_fits_with_other_options_do_not_join_the_table(shop):
    """Not even if their folders are gone. Of a table that does not say what its fits were, a note tells."""
    shop.main("--seeds", "1")
    first = (shop.folder / "out" / "sweep.csv").read_bytes()
    (shop.folder / "runs").rename(shop.folder / "elsewhere")
    shop.calls()
    code, printed = shop.main("--seeds", "1", "--precision", "bfloat16")
    assert (code, shop.calls()) == (2, [])
    assert "sweep.csv has fits with the usual precision instead of bfloat16; give another --output" in printed.err
    assert (shop.folder / "out" / "sweep.csv").read_bytes() == first
    table = shop.table()
    assert table.options.nunique() == 1
    write_sweep(table.drop(columns="options"), shop.folder / "out" / "sweep")  # as earlier versions wrote it
    code, printed = shop.main("--seeds", "2")
    assert code == 0
    assert "note: 7 of 7 fits of" in printed.err
    assert set(shop.table().options) == {"", table.options[0]}
    assert read_sweep(shop.folder / "out" / "sweep.parquet").equals(shop.table())
    (shop.folder / "out" / "sweep.csv").write_bytes(first.replace(b'"{', b'"'))
    code, printed = shop.main("--seeds", "1")
    assert code == 2
    assert "has options that are no JSON" in printed.err


def test_another_tau_joins_the_table(shop):
    shop.main("--seeds", "1")
    shop.calls()
    line = shop.line("--seeds", "1")
    line[line.index("inf") : line.index("--output")] = ["0", "1000"]
    assert tau_sweep.COMMAND.main(line) == 0
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


def test_a_finished_run_with_other_options_is_not_thrown_away(shop):
    shop.main("--seeds", "1")
    shop.calls()
    (shop.folder / "fit.yaml").write_text("epochs: 3\n")
    code, printed = shop.main("--seeds", "1")
    assert (code, shop.calls()) == (2, [])
    assert "sweep.csv has fits with epochs 2 instead of 3; give another --output" in printed.err
    (shop.folder / "out" / "sweep.csv").unlink()  # the folders alone say it too
    code, printed = shop.main("--seeds", "1")
    assert (code, shop.calls()) == (2, [])
    assert "is a finished run with epochs 2 instead of 3; give another --output or --runs_dir" in printed.err
    assert "(7 folders have such a problem)" in printed.err
    assert len(list(shop.runs.glob("*/metrics.json"))) == 7


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
