"""The table of compare_peers.py: which fits are done, which rate is chosen, and what is not done again."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.tiny_base import line, quick_fit, script

peers = script("compare_peers")
#: Best rate of each arm that is trained; the perplexity rises with the distance from it.
BEST = {"bora_learned": 0.01, "peft_one": 0.03, "peft_each": 0.1}
RATES = (0.01, 0.03, 0.1)


def row(arm, rate, seed):
    """A row as a fit writes it: the test perplexity of seed 0 at the best rate is 10 for bora_learned, and 20 for the others."""
    score = (10 if arm == "bora_learned" else 20) * 1.5 ** abs(math.log10(rate / BEST.get(arm.replace("_soup", "_each"), rate)))
    tasks = {name: {"documents": 3, "validation": score, "test": score + seed} for name in ("ada", "bo")}
    return {
        "arm": arm, "validation_perplexity": score, "test_perplexity": score + seed, "test_accuracy": None, "best_epoch": 2,
        "averaged": 1.0, "training_tokens": 100, "trainable_parameters": 8, "adapter_bytes": 1000, "seconds": 1.0, "rank": 2,
        "tau_A": 9.0, "tau_B": 8.0, "logit_difference": 1e-6, "documents_digest": f"digest {seed}", "tasks": tasks,
        "peak_memory_bytes": 2**30,
    }  # fmt: skip


class StandIn:
    """Fits that are done at once. ``calls`` has each as (arm, rate, seed); those in ``fail`` fail."""

    calls, fail = [], ()

    def __init__(self, program, jobs):
        assert Path(program[0]).name == "peer_fits.py"

    def start(self, words):
        given = dict(zip(words[::2], words[1::2], strict=True))
        run = given["--arm"], given["--learning_rate"], int(given["--seed"])
        StandIn.calls.append(run)
        arms = ["peft_each", "peft_soup", "peft_soup_delta"] if run[0] == "peft_each" else [run[0]]
        Path(given["--result"]).write_text(json.dumps([row(arm, float(run[1]), run[2]) for arm in arms]))
        future = Future()
        future.set_result("out of memory" if run in self.fail else None)
        return future

    def stop(self):
        pass


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """A function that runs the command on the stand-ins; returns its code, its fits and what it printed."""
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({name: v for name, v in quick_fit(tmp_path).items() if name != "threads"}))

    def run(*more, arms=("base", "bora_learned", "peft_one", "peft_each", "peft_soup"), fail=(), seeds=2):
        monkeypatch.setattr(script("arm_table"), "Fits", StandIn)
        monkeypatch.setattr(StandIn, "calls", [])
        monkeypatch.setattr(StandIn, "fail", fail)
        words = line({"fit_config": tmp_path / "fit.yaml", "output": tmp_path / "table.csv", "seeds": seeds})
        capsys.readouterr()
        code = peers.main([*words, "--rates", *map(str, RATES), "--arms", *arms, *more])
        return code, sorted(StandIn.calls), capsys.readouterr()

    return run


CLIMBED = sorted(
    [("base", "0.03", seed) for seed in (0, 1)]
    + [("bora_learned", rate, 0) for rate in ("0.03", "0.1", "0.01")] + [("bora_learned", "0.01", 1)]
    + [("peft_one", rate, 0) for rate in ("0.03", "0.1", "0.01")] + [("peft_one", "0.03", 1)]
    + [("peft_each", rate, 0) for rate in ("0.03", "0.1")] + [("peft_each", "0.1", 1)]
)  # fmt: skip


def test_rates_are_climbed_with_the_first_seed_and_no_fit_is_repeated(compare, tmp_path):
    code, calls, said = compare()
    assert code == 0
    assert calls == CLIMBED  # the soup comes with peft_each
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table) == peers.COLUMNS
    assert len(table) == len(CLIMBED) + 2 * 3  # two soups with each fit of peft_each
    assert "| peft_each | 0.1 | 20.00 ± 0.00 | 20.50 ± 0.71 |" in said.out
    assert "note: peft_each is best at the learning rate 0.1, an end of the grid 0.01 0.03 0.1" in said.out
    again, calls, repeated = compare()
    assert (again, calls) == (0, [])
    assert repeated.out == said.out[said.out.index("| arm |") :]


def test_a_fit_that_fails_is_named_and_tried_again(compare):
    failing = ("peft_one", "0.03", 0)
    code, _, said = compare(arms=["peft_one"], fail=[failing], seeds=1)
    assert code == 2
    assert said.err == (
        "error: the fit of peft_one, rate 0.03, seed 0 failed: out of memory\n"
        "error: 1 fits failed; the same command tries them again\n"
    )
    code, calls, _ = compare(arms=["peft_one"], seeds=1)
    assert code == 0
    assert failing in calls


def test_a_table_of_other_options_is_refused(compare, tmp_path):
    assert compare(arms=["base"], seeds=1)[0] == 0
    given = yaml.safe_load((tmp_path / "fit.yaml").read_text())
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(given | {"epochs": 3}))
    code, calls, said = compare(arms=["base"], seeds=1)
    assert (code, calls) == (2, [])
    assert (
        said.err
        == f"error: output {tmp_path / 'table.csv'} has rows with epochs 2 instead of 3; give another --output, or move it away\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "peft_too"], "arm 'peft_too' is not known; known: base,"),
        (["--rates", "0.1", "fast"], "rates has 0.1 fast; give finite numbers above 0"),
        (["--fit_config", "none.yaml"], "fit_config none.yaml does not exist"),
    ],
)
def test_bad_input(words, message, capsys):
    assert peers.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: " + message)
    assert said.count("\n") == 1
