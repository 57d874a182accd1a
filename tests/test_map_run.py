"""A fit from the command line to the run folder, and from the folder back to the same numbers."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bora_pyro import Backbone, InputError, load_tasks
from bora_pyro.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from bora_pyro.config import MapFitConfig
from bora_pyro.map_run import run_map_fit
from bora_pyro.memory import peak_memory_bytes
from bora_pyro.run_folder import RunFolder
from bora_pyro.saved_run import load_run
from bora_pyro.signals import StopSignals
from tests.tiny_base import SCRIPTS, documents, line, quick_fit, script_main, write_table

SLUGS = {"Ada": "ada", "Børge B.": "borge-b", "Cleo": "cleo"}
TIMES = ("fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes")
CONTRACT = {
    "test_perplexity", "base_test_perplexity", "validation_perplexity", "test_bits_per_character", "tau", "epochs",
    "fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes", "tasks",
}  # fmt: skip
CONTRACT_OF_TASK = {
    "name", "train_documents", "test_documents", "base_test_perplexity", "test_perplexity", "deviation_norm",
}  # fmt: skip
SHAPES = {"v_proj": ((2, 16), (16, 2)), "fc2": ((2, 32), (16, 2))}  # of A and B at rank 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit."""
    return quick_fit(tmp_path_factory.mktemp("inputs")) | {"learning_rate": 0.03}


@pytest.fixture(scope="module")
def main():
    return script_main()


def run(main, options, folder, **more):
    """Exit code 0, and what the run left."""
    assert main(line({**options, "output_dir": folder, **more})) == 0
    return RunFolder.open(folder)


def without_times(metrics):
    return {key: value for key, value in metrics.items() if key not in TIMES}


def data_of(options):
    tokenizer = Backbone.from_pretrained(options["base_model"]).tokenizer
    return load_tasks(options["data"], tokenizer, max_tokens=options["max_tokens"])


def perplexity(model, split, task=None):
    """Perplexity by plain transformers, one document at a time."""
    total, tokens = 0.0, 0
    for n in range(len(split)):
        if task is None or split.task[n] == task:
            ids = split.document(n)[None]
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss.double()) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def loaded_peft(base, folder):
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed: theirs to settle
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize(
    ("more", "sites"),
    [
        ({"tau": 0}, ["theta"]),
        ({"tau": "inf"}, ["prior_mean"]),
        ({"tau": 1000}, ["prior_mean", "theta_decentered"]),
        ({"tau": 1000, "likelihood_unit": "documents", "accumulate": 2}, ["prior_mean", "theta_decentered"]),
        ({"tau": 5, "prior_form": "centered"}, ["prior_mean", "theta"]),
        (
            {"tau": 5, "prior_form": "centered", "scale_learning_rate_with_tau": "true", "learning_rate": 0.005},
            ["prior_mean", "theta"],
        ),
        (
            {"tau": 5, "adapter": "lora_frozen_a", "gradient_checkpointing": "true", "alpha": 3},
            ["prior_mean", "theta_decentered"],
        ),
        ({"tau": 0, "adapter": "lora_frozen_a"}, ["theta"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_run_folder_from_end_to_end(main, inputs, tmp_path, more, sites):
    folder = run(main, inputs, tmp_path / "run", **more)
    frozen = more.get("adapter") == "lora_frozen_a"
    assert sorted(entry.name for entry in folder.path.iterdir()) == [
        "adapters", "checkpoints", "config.yaml", "metrics.json", "metrics.jsonl", "posterior.safetensors", "split.json",
    ]  # fmt: skip
    assert len(Checkpoints(folder.checkpoints).files()) == len([*folder.checkpoints.iterdir()]) == 2

    config = folder.read_config()
    assert MapFitConfig(**config).output_dir == str(folder.path)
    assert set(config) == set(vars(MapFitConfig()))
    assert (config["tau"], config["targets"]) == (float(more["tau"]), ["v_proj", "fc2"])

    log = folder.read_log()
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert (folder.path / "metrics.jsonl").read_text().count("\n") == 2

    metrics = json.loads((folder.path / "metrics.json").read_text())
    assert set(metrics) >= CONTRACT
    assert metrics["tau"] == ("inf" if more["tau"] == "inf" else more["tau"])
    assert metrics["epochs"] == 2
    assert metrics["validation_perplexity"] == min(entry["validation_perplexity"] for entry in log)
    assert metrics["validation_perplexity"] == log[metrics["best_epoch"] - 1]["validation_perplexity"]
    assert metrics["fit_seconds"] == round(log[-1]["seconds"], 2) > 0
    assert metrics["training_tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 2**27
    assert metrics["predicted_memory_bytes"] > 2**27
    assert {slug: task["name"] for slug, task in metrics["tasks"].items()} == {slug: name for name, slug in SLUGS.items()}
    for task in metrics["tasks"].values():
        assert set(task) >= CONTRACT_OF_TASK
        assert (task["train_documents"], task["test_documents"]) == (6, 2)
        assert (task["deviation_norm"] == 0) == (more["tau"] == "inf")

    # the posterior: one tensor a site, with the dimensions of tasks and layers in front
    tensors = folder.load_tensors("posterior")
    expected = {}
    for slot, shapes in SHAPES.items():
        for letter, shape in zip("AB", shapes, strict=True):
            name = f"{slot}.lora_{letter}"
            if frozen and letter == "A":
                expected[f"fixed.{name}"] = (2, *shape)
                continue
            for site in sites:
                head, _, tail = site.partition("_decentered") if site.startswith("theta") else (site, "", "")
                expected[f"{head}.{name}{'_decentered' if site.endswith('_decentered') else tail}"] = (
                    (2, *shape) if site == "prior_mean" else (3, 2, *shape)
                )
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert json.loads(folder.load_metadata("posterior")["tasks"]) == list(SLUGS)

    # the adapters, in plain transformers and PEFT: the same perplexities
    data = data_of(inputs)
    assert folder.read_split() == data.split_record
    base = Backbone.from_pretrained(inputs["base_model"]).model
    assert sorted(entry.name for entry in folder.adapters.iterdir()) == sorted([*SLUGS.values(), "global-mean", "tasks.json"])
    assert json.loads((folder.adapters / "tasks.json").read_text()) == {slug: name for name, slug in SLUGS.items()}
    assert metrics["base_test_perplexity"] == pytest.approx(perplexity(base, data.test), rel=1e-5)
    logarithm = 0.0
    for d, slug in enumerate(SLUGS.values()):
        scores = metrics["tasks"][slug]
        assert scores["base_test_perplexity"] == pytest.approx(perplexity(base, data.test, d), rel=1e-5)
        adapted = loaded_peft(base, folder.adapters / slug)
        assert scores["test_perplexity"] == pytest.approx(perplexity(adapted, data.test, d), rel=1e-5)
        assert scores["test_perplexity"] != scores["base_test_perplexity"]
        tokens = int((data.test.lengths[data.test.task == d] - 1).sum())
        logarithm += math.log(scores["test_perplexity"]) * tokens / data.test.num_tokens
    assert metrics["test_perplexity"] == pytest.approx(math.exp(logarithm), rel=1e-6)
    characters = sum(data.test.characters.tolist())
    bits = math.log2(metrics["test_perplexity"]) * data.test.num_tokens / characters
    assert metrics["test_bits_per_character"] == pytest.approx(bits, rel=1e-6)

    # Θ, and what of a task is its own
    mean = load_file(folder.adapters / "global-mean" / "adapter_model.safetensors")
    loaded_peft(base, folder.adapters / "global-mean")
    for slug in SLUGS.values():
        of_task = load_file(folder.adapters / slug / "adapter_model.safetensors")
        norm = math.sqrt(sum(float((of_task[name] - mean[name]).square().sum()) for name in mean))
        assert metrics["tasks"][slug]["deviation_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-7)
    if "prior_mean" in sites:
        name = "base_model.model.model.decoder.layers.1.fc2.lora_B.weight"
        torch.testing.assert_close(mean[name], tensors["prior_mean.fc2.lora_B"][1], rtol=0, atol=0)


def test_config_file_and_line_the_line_wins(main, inputs, tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump({**inputs, "tau": 7.0, "epochs": 3, "output_dir": str(tmp_path / "run")}))
    assert main(["--config", str(file), "--epochs", "1"]) == 0
    folder = RunFolder.open(tmp_path / "run")
    config = folder.read_config()
    assert (config["tau"], config["epochs"], config["rank"]) == (7.0, 1, 2)
    assert len(folder.read_log()) == folder.read_metrics()["epochs"] == 1


@pytest.mark.parametrize("tau", [50, "inf"])
def test_the_configuration_of_a_run_gives_the_run_again(main, inputs, tmp_path, tau):
    first = run(main, inputs, tmp_path / "first", tau=tau, seed=7, overwrite="true")
    second = tmp_path / "second"
    assert main(["--config", str(first.path / "config.yaml"), "--output_dir", str(second)]) == 0
    second = RunFolder.open(second)
    assert without_times(first.read_metrics()) == without_times(second.read_metrics())
    assert second.read_config() == first.read_config() | {"output_dir": str(second.path)}
    for name, value in first.load_tensors("posterior").items():
        torch.testing.assert_close(value, second.load_tensors("posterior")[name], rtol=0, atol=0)
    # it says nothing of overwriting: without a new folder the run is safe
    assert main(["--config", str(first.path / "config.yaml")]) == 2
    other = run(main, inputs, tmp_path / "other", tau=tau, seed=8)
    assert other.read_metrics()["test_perplexity"] != first.read_metrics()["test_perplexity"]
    assert other.read_split() != first.read_split()


def test_overwrite_replaces_the_whole_run(main, inputs, tmp_path, capsys):
    first = run(main, inputs, tmp_path / "run", epochs=2)
    before = {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()}
    assert main(line({**inputs, "output_dir": first.path})) == 2
    assert "--overwrite true to replace it" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()} == before
    (first.adapters / "an-older-task").mkdir()
    again = run(main, inputs, tmp_path / "run", epochs=1, overwrite="true")
    assert len(again.read_log()) == again.read_metrics()["epochs"] == 1
    assert not (again.adapters / "an-older-task").exists()


# Going on


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
    straight = run(main, options, tmp_path / "straight")
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
    first = run(main, inputs, tmp_path / "run")
    metrics, log = first.read_metrics(), first.read_log()
    again = run(main, inputs, tmp_path / "run", resume="true")
    assert again.read_log() == log
    assert without_times(again.read_metrics()) == without_times(metrics)
    assert again.read_metrics()["fit_seconds"] == metrics["fit_seconds"]


def test_a_finished_run_of_fewer_epochs_goes_on(main, inputs, tmp_path):
    first = run(main, inputs, tmp_path / "run", epochs=2)
    log = first.read_log()
    again = run(main, inputs, tmp_path / "run", epochs=4, learning_rate=0.01, resume="true")
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
    run(main, inputs, tmp_path / "run", epochs=1)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(line({**inputs, "output_dir": tmp_path / "run", "resume": "true", **change})) == 2
    (name, value) = next(iter(change.items()))
    message = capsys.readouterr().err
    assert message.startswith(f"error: {name} is {value!r}, but the run in ")
    assert "--resume true" in message
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_resuming_where_no_checkpoint_was_written_starts_anew(main, inputs, tmp_path, monkeypatch):
    straight = run(main, inputs, tmp_path / "straight")
    with monkeypatch.context() as patch:
        killed_at(patch, 1)
        with pytest.raises(Killed):
            main(line({**inputs, "output_dir": tmp_path / "run"}))
    resumed = run(main, inputs, tmp_path / "run", resume="true")
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
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
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
    folder = run(main, inputs, tmp_path / "run", epochs=1)
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
    notes = run(main, options, tmp_path / "run", epochs=1).read_metrics()["notes"]
    assert notes == ["1 task with fewer than 3 documents left out: 'Bo'"]
    assert run(main, options, tmp_path / "run", epochs=2, resume="true").read_metrics()["notes"] == notes


def test_with_nothing_left_a_run_says_what_it_was(main, inputs, tmp_path, capsys):
    folder = run(main, inputs, tmp_path / "run", epochs=3)
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
    folder = run(main, inputs, tmp_path / "run", tau=100)
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
    assert "stands within an epoch of token_budget 64; give that until the epoch's end" in error
    assert main(line({**options, "epochs": 1, "resume": "true"})) == 0
    assert main(line({**options, "token_budget": 128, "resume": "true"})) == 0
    steps = [entry["step"] for entry in RunFolder.open(tmp_path / "run").read_log()]
    assert len(steps) == 2


def test_tasks_that_were_not_drawn_are_not_drawn_later(main, inputs, tmp_path, capsys):
    run(main, inputs, tmp_path / "run", epochs=1)
    error = refused(main, {**inputs, "output_dir": tmp_path / "run"}, capsys, task_subsampling="true")
    assert "is of a fit with task_subsampling false; give that, or start afresh" in error


# What a person sees


def test_the_script_in_a_process_of_its_own(inputs, tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, SCRIPTS / "map_fit.py", *line({**inputs, "output_dir": folder})],
        capture_output=True, text=True, cwd=tmp_path, encoding="utf-8", timeout=600,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    memory, *progress = done.stderr.splitlines()
    assert memory.startswith("memory: about ")
    assert [text.split("  ")[:2] for text in progress] == [
        [f"step {step}/{2 * step if epoch == 1 else step}", f"epoch {epoch}/2"]
        for epoch, step in enumerate((entry["step"] for entry in RunFolder.open(folder).read_log()), start=1)
    ]
    assert all(re.search(r"  \d[\d,]* tokens/s  validation perplexity [\d.]+  (τ [\d.]+  )?\d+:\d\d", text) for text in progress)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"run folder: {folder}"
    metrics = RunFolder.open(folder).read_metrics()
    assert lines[-2] == f"learned τ: {metrics['tau']:g} (geometric mean; by group in metrics.json)"
    assert f"{metrics['test_perplexity']:,.2f}" in lines[-3]
    assert [text.split()[0] for text in lines[3:6]] == ["Ada", "Børge", "Cleo"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_quiet_says_nothing(inputs, tmp_path, capsys):
    options = {**inputs, "targets": ["v_proj"], "epochs": 1, "max_tokens": 64}
    metrics = run_map_fit(MapFitConfig(output_dir=str(tmp_path / "run"), **options), quiet=True)
    assert capsys.readouterr() == ("", "")
    assert metrics["notes"] == ["max_tokens 64 is more than the base model reads; 32 is used"]
    assert metrics == RunFolder.open(tmp_path / "run").read_metrics()


def test_a_saved_adapter_names_its_base(main, inputs, tmp_path):
    folder = run(main, inputs, tmp_path / "run", epochs=1, alpha=6, tau="inf")
    config = json.loads((folder.adapters / "cleo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == inputs["base_model"]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["fc2", "v_proj"])
    with safe_open(folder.path / "posterior.safetensors", framework="pt") as file:
        assert "Pooled()" in file.metadata()["model"]
    assert all(path.is_dir() for path in folder.adapters.iterdir() if path.name != "tasks.json")


def test_peak_memory_of_this_process():
    before = peak_memory_bytes(torch.device("cpu"))
    assert 2**26 < before < 2**37
    block = torch.ones(2**25)  # 128 MiB
    assert peak_memory_bytes(torch.device("cpu")) >= before
    del block
