"""Runs that end before their time: killed, told to stop, with a damaged checkpoint, on a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, fit
from bora_pyro.guides import ivon_guide, normal_guide
from bora_pyro.inference.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from bora_pyro.inference.fit import FitStopped
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.signals import StopSignals
from tests import killed_fit
from tests.forked import Forked, run_script
from tests.tiny import tiny_bora, tiny_data
from tests.tiny_base import command_main, line, quick_fit, without_times

KILLS = 36


def test_a_fit_that_is_killed_many_times_is_the_one_that_never_was(tmp_path):
    """SIGKILL at random moments, some within a write: no more than one interval is lost, and not a bit of the result."""
    done = Forked(tmp_path / "output", killed_fit.main, tmp_path / "run", KILLS).end(timeout=600)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert found["kills"] == KILLS >= 30
    assert found["inside"] >= 5  # a half-written file was left
    assert max(found["lost"]) <= 1  # here an interval is a step
    assert 0 in found["lost"]
    assert len({tuple(place) for place in found["places"]}) > KILLS / 2
    assert (found["code"], found["same"]) == (0, True)
    assert not [file for file in (tmp_path / "run" / "checkpoints").iterdir() if file.name.endswith(".tmp")]


def options(prior, guide=None, **more):
    model = tiny_bora(targets=["q_proj"], tasks=7, prior=prior)
    if guide is not None:
        more["guide"] = guide(model)
    return model, tiny_data((3, 0, 1, 4, 2, 9, 2)), {"epochs": 3, "token_budget": 12, "patience": 0, "seed": 2} | more


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
@pytest.mark.parametrize("guide", [None, normal_guide, ivon_guide], ids=["map", "normal", "ivon"])
@pytest.mark.parametrize("prior", [lambda: HierarchicalNormal(10.0), lambda: LearnedPrecision(start=10.0, every=3)])
def test_stopped_within_an_epoch_and_taken_up_again(tmp_path, prior, guide, drawn):
    def whole(**more):
        model, data, chosen = options(prior(), guide, task_subsampling=drawn, **more)
        return fit(model, data, **chosen)

    straight, seen = whole(), []
    with pytest.raises(FitStopped, match=r"stopped after step 5 of \d+, in epoch 1") as caught:
        whole(checkpoints=tmp_path, stop=lambda: len(seen) == 4, on_step=seen.append)
    assert caught.value.fitted.tasks == straight.tasks
    resumed = whole(checkpoints=tmp_path, on_step=seen.append)
    assert [report["step"] for report in seen] == list(range(1, len(seen) + 1))  # none twice, none left out
    assert without_times(resumed.history) == without_times(straight.history)
    for name, value in straight.sites().items():
        torch.testing.assert_close(resumed.sites()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
@pytest.mark.parametrize(("change", "message"), [
    ({"token_budget": 24}, "token_budget is 24, but checkpoint .* is within an epoch with token_budget 12; give that value"),
    ({"accumulate": 2}, "accumulate is 2, but checkpoint .* is within an epoch with accumulate 1; give that value"),
    ({"seed": 3}, "seed is 3, but checkpoint .* is within an epoch with seed 2; give that value"),
])  # fmt: skip
def test_the_steps_of_an_epoch_change_between_epochs_alone(tmp_path, change, message, drawn):
    def whole(**more):
        model, data, chosen = options(HierarchicalNormal(10.0), **{"task_subsampling": drawn, "checkpoints": tmp_path, **more})
        return fit(model, data, **chosen)

    seen = []
    with pytest.raises(FitStopped):
        whole(stop=lambda: len(seen) == 4, on_step=seen.append)
    with pytest.raises(InputError, match=message) as caught:
        whole(**change)
    assert "\n" not in str(caught.value)
    assert Checkpoints(tmp_path).newest().progress["within"]["steps"] == 5
    whole(epochs=1)
    changed = whole(**change)  # the first epoch is at its end
    assert [entry["epoch"] for entry in changed.history] == [1, 2, 3]


def test_a_checkpoint_that_is_older_than_what_it_says_of_its_steps(tmp_path):
    model, data, chosen = options(HierarchicalNormal(10.0), checkpoints=tmp_path)
    with pytest.raises(FitStopped):
        fit(model, data, stop=lambda: True, **chosen)
    [file] = tmp_path.iterdir()
    groups, progress = load_checkpoint(file)
    assert progress["within"].pop("steps_per_epoch") > 1
    for name in ("token_budget", "accumulate", "seed", "processes"):
        del progress["within"][name]
    save_checkpoint(file, groups, progress)
    assert len(fit(options(HierarchicalNormal(10.0))[0], data, **chosen).history) == 3


def test_the_newest_are_kept_and_a_damaged_one_is_passed_over(tmp_path, caplog):
    model, data, chosen = options(HierarchicalNormal(10.0), checkpoints=tmp_path, keep_checkpoints=3)
    straight = fit(model, data, **chosen)
    newest, older, oldest = Checkpoints(tmp_path).files()
    assert newest.name > older.name > oldest.name
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1  # one bit
    newest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        resumed = fit(options(HierarchicalNormal(10.0))[0], data, **chosen)
    [record] = caplog.records
    assert f"{str(newest)!r} cannot be read (it is cut short, or its bytes are not those" in record.getMessage()
    assert record.getMessage().endswith(f"going on from {older.name}")
    for name, value in straight.sites().items():
        torch.testing.assert_close(resumed.sites()[name], value, rtol=0, atol=0)
    for file in Checkpoints(tmp_path).files():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"there is no older one: start afresh with --overwrite true") as caught:
        fit(model, data, **chosen)
    assert "\n" not in str(caught.value)


def test_a_full_disk_ends_a_fit_in_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    model, data, chosen = options(HierarchicalNormal(10.0), checkpoints=tmp_path)
    straight, fsync, calls = fit(options(HierarchicalNormal(10.0))[0], data, **chosen | {"checkpoints": None}), os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:  # the second checkpoint's first: each syncs its file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room there") as caught:
            fit(model, data, **chosen)
    assert "\n" not in str(caught.value)
    assert len([*tmp_path.iterdir()]) == 1
    assert Checkpoints(tmp_path).newest().progress["epoch"] == 1
    resumed = fit(options(HierarchicalNormal(10.0))[0], data, **chosen)
    for name, value in straight.sites().items():
        torch.testing.assert_close(resumed.sites()[name], value, rtol=0, atol=0)


# The command


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_the_code_of_a_shell(tmp_path, number, code):
    inputs = quick_fit(tmp_path) | {"epochs": 400, "patience": 0, "device": "cpu", "output_dir": tmp_path / "run"}
    process = Forked(tmp_path / "output", run_script, "map_fit.py", line(inputs))
    deadline = time.monotonic() + 120
    while not Checkpoints(tmp_path / "run" / "checkpoints").files() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    ended, out, err = process.end()
    assert (ended, out) == (code, "")
    assert f"{number.name}: will save and stop after this step" in err
    last = err.splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith("; go on with --resume true")
    found = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert found.progress["steps"] == int(last.split()[3])
    assert "Traceback" not in err


def test_resume_auto_begins_goes_on_and_ends_as_one_run(tmp_path, monkeypatch):
    main, inputs = command_main(), quick_fit(tmp_path) | {"epochs": 4, "device": "cpu"}
    assert main(line(inputs | {"output_dir": tmp_path / "straight"})) == 0
    chosen = line(inputs | {"output_dir": tmp_path / "run", "resume": "auto"})
    asked = []

    def stop(signals):
        asked.append(signals)
        return len(asked) == 3

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "__call__", stop)
        assert main(chosen) == 130
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(chosen) == 0
    straight, resumed = RunFolder.open(tmp_path / "straight"), RunFolder.open(tmp_path / "run")
    assert without_times(resumed.read_metrics()) == without_times(straight.read_metrics())
    for name, value in straight.load_tensors("posterior").items():
        torch.testing.assert_close(resumed.load_tensors("posterior")[name], value, rtol=0, atol=0)
    assert resumed.read_config()["resume"] is False
    assert main(chosen) == 0  # finished already


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inputs = quick_fit(tmp_path) | {"output_dir": tmp_path / "file" / "run", "resume": "auto"}
    capsys.readouterr()  # transformers shows how it writes the tiny base
    assert command_main()(line(inputs)) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: output_dir ")
    assert Path(tmp_path / "file").read_text() == ""


def test_told_to_stop_in_the_last_validation(tmp_path, monkeypatch):
    """All steps are taken, but what is left to do is not done: it is done on resuming, to the same result."""
    options = quick_fit(tmp_path)
    assert command_main()(line({**options, "output_dir": tmp_path / "straight"})) == 0

    def told(*args, **more):
        fitted = fit(*args, **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return fitted

    monkeypatch.setattr("bora_pyro.runs.fitting.fit", told)
    assert command_main()(line({**options, "output_dir": tmp_path / "run"})) == 143
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.undo()
    assert command_main()(line({**options, "output_dir": tmp_path / "run", "resume": True})) == 0
    for name in ("posterior.safetensors", "split.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
