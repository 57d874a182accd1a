"""The command `ensemble`: its members are the fits of their seeds, and what reads posteriors reads its folder."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from bora_pyro.exchange.load import read_peft
from bora_pyro.predict.mixture import predictive
from bora_pyro.report.export import COMMAND as EXPORT
from bora_pyro.report.run_page import RunOptions, run_page
from bora_pyro.runs.calibrate import COMMAND as CALIBRATE
from bora_pyro.runs.diagnose import DiagnoseConfig, diagnose
from bora_pyro.runs.ensemble import COMMAND
from bora_pyro.runs.fold import COMMAND as FOLD_COMMAND
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import FOLD
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, line, map_run, quick_fit

main = COMMAND.main


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a quick fit with a learned τ, and an ensemble of two members with them."""
    folder = tmp_path_factory.mktemp("ensemble")
    options = quick_fit(folder) | {"learning_rate": 0.03, "seed": 5}
    assert main(line(options | {"members": 2, "output_dir": folder / "ensemble"})) == 0
    return folder, options


def test_a_member_is_the_fit_of_its_seed(given, tmp_path):
    folder, options = given
    joint = load_run(folder / "ensemble", device="cpu")
    for k, seeds in enumerate(({"seed": 5}, {"seed": 1005, "split_seed": 5})):
        alone = load_run(map_run(options | seeds | {"output_dir": tmp_path / str(k)}), device="cpu")
        member = load_run(folder / "ensemble" / "members" / str(k), device="cpu")
        assert alone.data.digest == joint.data.digest
        assert alone.fitted.tau_by_group() == member.fitted.tau_by_group()
        assert alone.fitted.best_epoch == member.fitted.best_epoch
        theta, of_ensemble = alone.fitted.weights()[0], joint.posterior().draw(k)
        for name, value in member.fitted.weights()[0].items():
            assert torch.equal(value, theta[name])
            torch.testing.assert_close(of_ensemble[name], value, rtol=1e-5, atol=1e-6)
    first, second = (joint.posterior().draw(k) for k in range(2))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_its_numbers(given):
    folder, _ = given
    run = load_run(folder / "ensemble", device="cpu")
    members = [load_run(folder / "ensemble" / "members" / str(k), device="cpu") for k in range(2)]
    draws = [member.fitted.weights()[0] for member in members]
    mixture = predictive(members[0].fitted.model, run.data.test, lambda: draws).perplexity()
    metrics = run.metrics
    assert metrics["mixture_test_perplexity"] == pytest.approx(mixture, rel=1e-4)
    assert metrics["draws"] == 2
    assert [row["seed"] for row in metrics["members"]] == [5, 1005]
    assert [row["test_perplexity"] for row in metrics["members"]] == [member.metrics["test_perplexity"] for member in members]
    best = min(members, key=lambda member: member.fitted.validation_score)
    assert metrics["test_perplexity"] == pytest.approx(best.metrics["test_perplexity"], rel=1e-5)
    assert metrics["validation_perplexity"] == best.metrics["validation_perplexity"]
    assert all("mixture_test_perplexity" in row and row["epistemic"] >= -1e-6 for row in metrics["tasks"].values())


def test_what_reads_posteriors_reads_its_folder(given, tmp_path, capsys):
    run = load_run(given[0] / "ensemble", device="cpu")
    path = str(run.folder.path)
    assert run.centre == "the best member"
    written = run.posterior().generate("red", "Ada", max_new_tokens=2)
    assert len(written.tokens) == 2
    assert CALIBRATE.main([path, "--output", str(tmp_path / "calibration"), "--threads", "1"]) == 0
    assert any("best_member" in column for column in pd.read_csv(tmp_path / "calibration" / "calibration.csv").columns)
    assert CALIBRATE.main([path, "--output", str(tmp_path / "no"), "--predict", "linearised"]) == 2
    assert "has no linear expansion" in capsys.readouterr().err
    diagnose(DiagnoseConfig(run=path, output=str(tmp_path / "diagnosis"), threads=1))
    page = run_page(path, RunOptions(adapters=False))
    assert [number.label for number in page.numbers][:2] == ["test perplexity, best member", "mixture of 2 members"]
    assert EXPORT.main([path, "--draws", "3", "--output_dir", str(tmp_path / "export")]) == 0
    draws = sorted(place.name for place in (tmp_path / "export").glob("ada--draw-*"))
    assert draws == ["ada--draw-0", "ada--draw-1"]  # the members
    assert "the best member" in (tmp_path / "export" / "ada" / "README.md").read_text()
    assert read_peft(run.folder.adapters / "ada").rank == 2


def test_its_members_are_folded(given, tmp_path, capsys):
    path = str(given[0] / "ensemble")
    assert FOLD_COMMAND.main([path, "--output_dir", str(tmp_path / "folded"), "--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("(a run of rank 4, which every command reads)\n")
    found, metrics = json.loads((tmp_path / "folded" / FOLD).read_text()), RunFolder.open(path).read_metrics()
    assert found["mixture_test_perplexity"] == pytest.approx(metrics["mixture_test_perplexity"], rel=1e-4)
    assert [row["run"] for row in found["members"]] == [f"{path}/members/0", f"{path}/members/1"]
    assert FOLD_COMMAND.main([path, f"{path}/members/1", "--output_dir", str(tmp_path / "other")]) == 2
    assert "members/1' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("adapt", ["--data", "new.csv"], "is an ensemble, whose members have a Θ each; adapt one of them, such as"),
        ("posterior-fit", ["--epochs", "1"], "is a posterior already; give the MAP fit that it began from"),
    ],
)
def test_what_needs_one_fit_says_so(given, tmp_path, capsys, name, words, message):
    assert command_main(name)([str(given[0] / "ensemble"), *words, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_it_goes_on_and_is_replaced(given, tmp_path, capsys):
    _, options = given
    out, options = tmp_path / "out", options | {"epochs": 1, "output_dir": tmp_path / "out"}
    assert main(line(options | {"members": 2})) == 0
    printed = capsys.readouterr()
    assert "2 members, an adapter for each of 3 tasks in each" in printed.out
    assert "member 2 of 2 (seed 1005)" in printed.err
    first = (out / "members" / "0" / "posterior.safetensors").read_bytes()
    # an interrupted ensemble: the second member and the result are missing
    (out / "members" / "1" / "metrics.json").unlink()
    (out / "metrics.json").unlink()
    before = load_run(out / "members" / "0", device="cpu").metrics
    assert main(line(options | {"members": 3, "resume": "true"})) == 0
    assert (out / "members" / "0" / "posterior.safetensors").read_bytes() == first
    assert load_run(out / "members" / "0", device="cpu").metrics == before
    assert load_run(out, device="cpu").fitted.guide.members == 3
    capsys.readouterr()
    for name, change, said in (
        ("map-fit", {"resume": "true"}, "is an ensemble of several fits; go on with bora ensemble --resume true"),
        ("ensemble", {}, "holds another run"),
        ("ensemble", {"resume": "true", "seed": 6}, "seed is 6"),
    ):
        assert command_main(name)(line(options | change)) == 2
        assert said in capsys.readouterr().err
    map_run(options | {"output_dir": tmp_path / "plain"})
    assert main(line(options | {"output_dir": tmp_path / "plain", "resume": "true"})) == 2
    assert "is no ensemble" in capsys.readouterr().err
    # nothing that no run wrote is deleted
    (out / "members" / "1" / "thesis.tex").write_text("years of work")
    assert main(line(options | {"members": 2, "overwrite": "true"})) == 2
    assert "holds 'members/1/thesis.tex', which no run wrote" in capsys.readouterr().err
    (out / "members" / "1" / "thesis.tex").unlink()
    map_run(options | {"overwrite": "true"})
    assert not (out / "members").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--members", "1"], "members is 1; give a whole number from 2 up"),
        (["--members", "101"], "members is 101; give a whole number of at most 100"),
        (["--members", "many"], "a whole number"),
        (["--seed", str(2**32 - 1000)], "seed is 4294969296"),
        (["--member", "3"], "unknown option 'member'; did you mean 'members'?"),
    ],
)
def test_bad_values_are_one_line(words, message, capsys, monkeypatch):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--output_dir", str(tmp_path / "out")]) == 2
    assert "is fitted by one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
