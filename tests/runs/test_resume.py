"""Going on with a run: the same one, with its own documents, base and steps, or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_pyro import InputError
from bora_pyro.inference.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.signals import StopSignals
from tests.tiny_base import command_main, documents, finished_run, line, quick_fit, without_times, write_table


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit."""
    return quick_fit(tmp_path_factory.mktemp("inputs")) | {"learning_rate": 0.03}


@pytest.fixture(scope="module")
def main():
    return command_main()


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch, epoch):
    """The next run dies once that epoch is in the log and before its checkpoint."""
    log = RunFolder.log

    def log_and_die(folder, record):
        log(folder, record)
        if record["epoch"] == epoch:
            raise Killed

    monkeypatch.setattr(RunFolder, "log", log_and_die)


@pytest.mark.parametrize(("every", "killed"), [(1, 3), (2, 4), (3, 2)])
def test_a_killed_run_is_resumed_to_what_it_would_have_been(main, inputs, tmp_path, monkeypatch, every, killed):
    options = {**inputs, "epochs": 5, "checkpoint_every": every}
    straight = finished_run(main, options, tmp_path / "straight")
    with monkeypatch.context() as patch:
        killed_at(patch, killed)
        with pytest.raises(Killed):
            main(line({**options, "output_dir": tmp_path / "run"}))
    assert len(RunFolder.open(tmp_path / "run").read_log()) == killed
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "true"]) == 0
    resumed = RunFolder.open(tmp_path / "run")
    assert [entry["epoch"] for entry in resumed.read_log()] == [1, 2, 3, 4, 5]  # one line an epoch, none twice
    assert without_times(resumed.read_metrics()) == without_times(straight.read_metrics())
    for name, value in straight.load_tensors("posterior").items():
        torch.testing.assert_close(resumed.load_tensors("posterior")[name], value, rtol=0, atol=0)


def test_resuming_a_finished_run_changes_nothing(main, inputs, tmp_path):
    first = finished_run(main, inputs, tmp_path / "run")
    metrics, log = first.read_metrics(), first.read_log()
    again = finished_run(main, inputs, tmp_path / "run", resume="true")
    assert again.read_log() == log
    assert without_times(again.read_metrics()) == without_times(metrics)
    assert again.read_metrics()["fit_seconds"] == metrics["fit_seconds"]


def test_a_finished_run_of_fewer_epochs_goes_on(main, inputs, tmp_path):
    first = finished_run(main, inputs, tmp_path / "run", epochs=2)
    log = first.read_log()
    again = finished_run(main, inputs, tmp_path / "run", epochs=4, learning_rate=0.01, resume="true")
    assert again.read_log()[:2] == log
    assert [entry["epoch"] for entry in again.read_log()] == [1, 2, 3, 4]
    assert again.read_metrics()["epochs"] == again.read_config()["epochs"] == 4
    assert again.read_log()[2]["learning_rate"] < 0.01  # the schedule of four epochs


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"tau": 1000.0}, {"likelihood_unit": "documents"}, {"seed": 1}, {"num_tasks": 2}, {"data": "other"}]
)
def test_resuming_as_another_run_is_refused_and_changes_nothing(main, inputs, tmp_path, capsys, change):
    if "data" in change:
        change = {"data": write_table(tmp_path / "other.csv", documents(seed=1))}
    finished_run(main, inputs, tmp_path / "run", epochs=1)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(line({**inputs, "output_dir": tmp_path / "run", "resume": "true", **change})) == 2
    (name, value) = next(iter(change.items()))
    message = capsys.readouterr().err
    assert message.startswith(f"error: {name} is {value!r}, but the run in ")
    assert "--resume true" in message
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_resuming_where_no_checkpoint_was_written_starts_anew(main, inputs, tmp_path, monkeypatch):
    straight = finished_run(main, inputs, tmp_path / "straight")
    with monkeypatch.context() as patch:
        killed_at(patch, 1)
        with pytest.raises(Killed):
            main(line({**inputs, "output_dir": tmp_path / "run"}))
    resumed = finished_run(main, inputs, tmp_path / "run", resume="true")
    assert [entry["epoch"] for entry in resumed.read_log()] == [1, 2]
    assert without_times(resumed.read_metrics()) == without_times(straight.read_metrics())


def stopped_at(monkeypatch, step):
    """The next run is told to stop after so many steps."""
    asked = []
    monkeypatch.setattr(StopSignals, "__call__", lambda signals: asked.append(signals) or len(asked) == step)


def files_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(main, options, capsys, **more):
    """A run that is resumed in vain, and leaves all as it was; returns why."""
    before = files_of(Path(options["output_dir"]))
    capsys.readouterr()
    assert main(line({**options, "resume": "true", **more})) == 2
    *before_it, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all(text.startswith("data: ") for text in before_it)
    assert files_of(Path(options["output_dir"])) == before
    return error


ALTERED = {
    "rows appended": (
        lambda rows: pd.concat([rows, documents(("Ada",), number=1, seed=5)]),
        r"group 'row 31' of task 'Ada' is not in the split record; use the table that was split",
    ),
    "a text replaced": (
        lambda rows: rows.assign(text=[*rows.text[:-1], "nine south south"]),
        r"checkpoint .* is of other documents: .*; use the data that it was fitted to, or start afresh with --overwrite true",
    ),
    "rows in another order": (lambda rows: rows[::-1], r"is not in the split record|is of other documents"),
    "a task appended": (lambda rows: pd.concat([rows, documents(("Dan",))]), None),
}


@pytest.mark.parametrize(("alter", "message"), ALTERED.values(), ids=ALTERED)
@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
def test_a_run_goes_on_with_its_own_documents_alone(main, inputs, tmp_path, monkeypatch, capsys, alter, message, finished):
    table = tmp_path / "documents.csv"
    options = {**inputs, "data": write_table(table), "output_dir": tmp_path / "run", "token_budget": 64, "tau": 100}
    with monkeypatch.context() as patch:
        if not finished:
            stopped_at(patch, 4)
        assert main(line(options)) == (0 if finished else 130)
    split = (tmp_path / "run" / "split.json").read_bytes()
    write_table(table, alter(documents()))
    if message is not None:
        assert re.search(message, refused(main, options, capsys, epochs=3))
        write_table(table)
    assert main(line({**options, "epochs": 3, "resume": "true"})) == 0  # a task that the run does not have is left out
    assert (tmp_path / "run" / "split.json").read_bytes() == split
    assert len(RunFolder.open(tmp_path / "run").read_log()) == 3


def test_a_run_goes_on_with_its_own_base_alone(main, inputs, tmp_path, capsys):
    base = shutil.copytree(inputs["base_model"], tmp_path / "base")
    options = {**inputs, "base_model": base, "output_dir": tmp_path / "run", "epochs": 1}
    assert main(line(options)) == 0
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"model.decoder.layers.0.fc1.weight": weights["model.decoder.layers.0.fc1.weight"] + 0.05},
              base / "model.safetensors", {"format": "pt"})  # fmt: skip
    error = refused(main, options, capsys, epochs=2)
    assert re.search(r"checkpoint .* is of another base model: its weights .*, or start afresh with --overwrite true", error)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert main(line({**options, "epochs": 2, "resume": "true", "precision": "bfloat16"})) == 0


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{")], ids=["gone", "damaged"])
def test_a_split_that_is_lost_is_made_again(main, inputs, tmp_path, capsys, damage):
    options = {**inputs, "output_dir": tmp_path / "run", "epochs": 1}
    folder = finished_run(main, inputs, tmp_path / "run", epochs=1)
    split = folder.read_split()
    damage(folder.path / "split.json")
    assert main(line({**options, "resume": "true"})) == 0
    assert folder.read_split() == split
    # where nothing says whether it would be the same one it is not guessed
    for file in Checkpoints(folder.checkpoints).files():
        groups, progress = load_checkpoint(file)
        del progress["data"]
        save_checkpoint(file, groups, progress)
    damage(folder.path / "split.json")
    assert "split.json cannot be read" in refused(main, options, capsys)


def test_notes_of_a_resumed_run_are_those_of_the_run(main, inputs, tmp_path):
    rows = pd.concat([documents(), documents(("Bo",), number=2)])
    options = {**inputs, "data": write_table(tmp_path / "t.csv", rows), "small_tasks": "drop"}
    notes = finished_run(main, options, tmp_path / "run", epochs=1).read_metrics()["notes"]
    assert notes == ["1 task with fewer than 3 documents left out: 'Bo'"]
    again = finished_run(main, options, tmp_path / "run", epochs=2, resume="true").read_metrics()["notes"]
    assert [note for note in again if "still falling" not in note] == notes


def test_with_nothing_left_a_run_says_what_it_was(main, inputs, tmp_path, capsys):
    folder = finished_run(main, inputs, tmp_path / "run", epochs=3)
    before = files_of(folder.path)
    capsys.readouterr()
    options = {**inputs, "output_dir": folder.path, "resume": "true", "learning_rate": 0.5, "token_budget": 128}
    assert main(line({**options, "epochs": 2, "precision": "bfloat16"})) == 0
    said = capsys.readouterr()
    assert (
        "note: nothing is left to fit: 3 epochs are done; what was fitted stays as it is, with the options of its config.yaml"
        in said.err
    )
    assert f"{json.loads(before[folder.path / 'metrics.json'])['test_perplexity']:,.2f}" in said.out
    assert files_of(folder.path) == before
    # a result that is lost is made again, and is that of the options that it was fitted with
    for name in ("metrics.json", "posterior.safetensors"):
        (folder.path / name).unlink()
    assert main(line({**options, "epochs": 2, "precision": "bfloat16"})) == 0
    after = files_of(folder.path)
    for name in ("config.yaml", "posterior.safetensors", "metrics.jsonl", "split.json"):
        assert after[folder.path / name] == before[folder.path / name], name
    assert without_times(folder.read_metrics()) == without_times(json.loads(before[folder.path / "metrics.json"]))


def test_a_finished_run_that_goes_on_is_not_finished(main, inputs, tmp_path, monkeypatch):
    folder = finished_run(main, inputs, tmp_path / "run", tau=100)
    with monkeypatch.context() as patch:
        stopped_at(patch, 1)
        options = {**inputs, "tau": 100, "output_dir": folder.path, "epochs": 4, "learning_rate": 0.01, "resume": "true"}
        assert main(line(options)) == 130
    assert folder.read_config()["epochs"] == 4
    with pytest.raises(InputError, match="is not finished: it has no metrics"):
        load_run(folder.path)
    assert main(line(options)) == 0
    assert (load_run(folder.path).metrics["epochs"], folder.read_metrics()["learning_rate"]) == (4, 0.01)


def test_batches_of_another_size_wait_for_the_next_epoch(main, inputs, tmp_path, monkeypatch, capsys):
    options = {**inputs, "output_dir": tmp_path / "run", "token_budget": 64, "tau": 100}
    with monkeypatch.context() as patch:
        stopped_at(patch, 2)
        assert main(line(options)) == 130
    error = refused(main, options, capsys, token_budget=128)
    assert "token_budget is 128, but checkpoint " in error
    assert "is within an epoch with token_budget 64; give that value until the epoch ends" in error
    assert main(line({**options, "epochs": 1, "resume": "true"})) == 0
    assert main(line({**options, "token_budget": 128, "resume": "true"})) == 0
    steps = [entry["step"] for entry in RunFolder.open(tmp_path / "run").read_log()]
    assert len(steps) == 2


def test_tasks_that_were_not_drawn_are_not_drawn_later(main, inputs, tmp_path, capsys):
    finished_run(main, inputs, tmp_path / "run", epochs=1)
    error = refused(main, {**inputs, "output_dir": tmp_path / "run"}, capsys, task_subsampling="true")
    assert "is of a fit with task_subsampling false; give that, or start afresh" in error
