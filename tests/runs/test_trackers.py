"""Trackers get the numbers that the run folder has, and nothing starts where one of them cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types

import pytest

from bora_pyro.errors import InputError
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import LOCK
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.trackers import TRACKERS, Tracking, check_packages, check_trackers, track
from bora_pyro.runs.trackers.tracking import POINTS
from tests.tiny_base import SCRIPTS, command_main, line, quick_fit, script_main

EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self):
        self.logged, self.concluded, self.closed = [], None, None

    def log(self, numbers, step):
        self.logged.append((step, dict(numbers)))

    def conclude(self, numbers, step):
        self.concluded = (step, dict(numbers))

    def close(self, *, failed):
        self.closed = failed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit, with several steps an epoch."""
    return quick_fit(tmp_path_factory.mktemp("inputs")) | {"learning_rate": 0.03, "token_budget": 32}


@pytest.fixture(scope="module")
def main():
    return command_main()


@pytest.fixture(scope="module")
def tracked(inputs, main, tmp_path_factory):
    """The folder of a fit that TensorBoard has tracked."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    assert main(line({**inputs, "trackers": "tensorboard", "output_dir": folder})) == 0
    return RunFolder.open(folder)


def scalars(folder):
    """{tag: {step: value}} of the event files, each step once."""
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(points)) == len(points) for points in found.values())
    return {tag: dict(points) for tag, points in found.items()}


def close(value):
    return pytest.approx(value, rel=1e-6)  # event files hold float32


def test_event_files_have_the_numbers_of_the_run_folder(tracked):
    found, log, metrics = scalars(tracked), tracked.read_log(), tracked.read_metrics()
    assert found["validation/perplexity"] == close({record["step"]: record["validation_perplexity"] for record in log})
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/tokens_per_second", "training_tokens_per_second"),
    ):
        assert [*found[tag]] == [*range(1, log[-1]["step"] + 1)]  # every step of a short fit
        assert {record["step"]: found[tag][record["step"]] for record in log} == close({r["step"]: r[key] for r in log})
    groups = {tag.removeprefix("tau/"): points for tag, points in found.items() if tag.startswith("tau/")}
    assert set(groups) == set(metrics["tau_by_group"])
    for group, points in groups.items():
        assert points == close({record["step"]: record["tau_path"][-1]["tau"][group] for record in log})
    numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)}
    assert {"test_perplexity", "base_test_perplexity", "tau", "fit_seconds", "peak_memory_bytes"} <= set(numbers)
    final = {tag.removeprefix("final/"): points for tag, points in found.items() if tag.startswith("final/")}
    assert final == {key: close({log[-1]["step"]: value}) for key, value in numbers.items()}


def test_a_resumed_fit_goes_on_in_its_event_files(main, inputs, tmp_path, monkeypatch):
    options = {**inputs, "epochs": 4, "checkpoint_every": 2, "trackers": "tensorboard", "output_dir": tmp_path / "run"}
    log = RunFolder.log

    def log_and_die(folder, record):
        log(folder, record)
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            main(line(options))
    assert main(line({**options, "resume": "true"})) == 0
    folder = RunFolder.open(tmp_path / "run")
    found, records = scalars(folder), folder.read_log()
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert found["validation/perplexity"] == close({record["step"]: record["validation_perplexity"] for record in records})
    assert [*found["train/loss"]] == [*range(1, records[-1]["step"] + 1)]


def test_a_posterior_is_tracked_too(tracked, tmp_path):
    posterior = command_main("posterior-fit")
    words = ["--epochs", "1", "--draws", "1", "--threads", "1", "--trackers", "tensorboard"]
    assert posterior([str(tracked.path), *words, "--output_dir", str(tmp_path / "posterior")]) == 0
    folder = RunFolder.open(tmp_path / "posterior")
    (record,) = folder.read_log()
    found = scalars(folder)
    assert found["validation/perplexity"] == close({record["step"]: record["validation_perplexity"]})
    mixture = folder.read_metrics()["mixture_test_perplexity"]
    assert found["final/mixture_test_perplexity"] == close({record["step"]: mixture})


def test_an_untracked_fit_leaves_no_trace(main, inputs, tmp_path, tracked):
    assert main(line({**inputs, "output_dir": tmp_path / "run"})) == 0
    folder = RunFolder.open(tmp_path / "run")
    assert not (folder.path / "tensorboard").exists()
    times = ("fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes")
    plain, other = ({k: v for k, v in run.read_metrics().items() if k not in times} for run in (folder, tracked))
    assert plain == other  # nor does tracking change the fit


def test_overwriting_a_run_takes_its_events_along(tracked, tmp_path):
    copy = shutil.copytree(tracked.path, tmp_path / "copy")
    with RunFolder.create(copy, overwrite=True):
        assert [entry.name for entry in copy.iterdir()] == [LOCK]


# How often


@pytest.mark.parametrize(("total", "every"), [(1, 1), (POINTS, 1), (POINTS + 1, 2), (25 * POINTS, 25)])
def test_steps_are_throttled_and_an_epochs_end_is_not(total, every):
    recorder = Recorder()
    last = total - 1 if total > 1 else 1
    with Tracking([recorder]) as tracking:
        for step in range(1, last + 1):
            tracking.step({"step": step, "total": total, "loss": float(step)})
        tracking.epoch({"step": last, "total": total, "loss": float(last), "validation_perplexity": 20.0})
    steps = [step for step, numbers in recorder.logged if "train/loss" in numbers]
    assert steps == sorted({*range(every, last + 1, every), last})
    assert len(steps) <= POINTS + 1
    assert all(numbers["train/loss"] == step for step, numbers in recorder.logged if "train/loss" in numbers)
    assert recorder.logged[-1] == (last, {"validation/perplexity": 20.0})


def test_what_is_no_number_is_left_out():
    recorder = Recorder()
    history = [{"step": 4}]
    with Tracking([recorder]) as tracking:
        tracking.conclude({"tau": "inf", "test_perplexity": 20, "notes": [], "tasks": {}, "ok": True, "none": None}, history)
    assert recorder.concluded == (4, {"final/test_perplexity": 20.0})
    assert recorder.closed is False


def test_trackers_are_closed_whatever_happens():
    recorders = [Recorder(), Recorder()]
    with pytest.raises(RuntimeError, match="out of memory"), Tracking(recorders):
        raise RuntimeError("out of memory")
    assert [recorder.closed for recorder in recorders] == [True, True]


# Weights & Biases, by a stand-in


class Wandb(types.ModuleType):
    """What of the package ``wandb`` is used."""

    class Error(Exception):
        """Its errors."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.refuse = [], [], [], None
        self.summary = {}

    def init(self, **options):
        if self.refuse:
            raise self.Error(self.refuse)
        self.started.append(options)
        return self

    def log(self, numbers, *, step):
        self.logged.append((step, numbers))

    def finish(self, *, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_the_numbers_of_the_run_folder(main, inputs, tmp_path, wandb):
    assert main(line({**inputs, "trackers": "wandb", "output_dir": tmp_path / "speeches"})) == 0
    folder = RunFolder.open(tmp_path / "speeches")
    (started,) = wandb.started
    assert (started["project"], started["name"], started["dir"]) == ("bora_pyro", "speeches", str(folder.path))
    assert started["config"] == folder.read_config()
    found = {}
    for step, numbers in wandb.logged:
        for name, value in numbers.items():
            found.setdefault(name, {})[step] = value
    log, metrics = folder.read_log(), folder.read_metrics()
    assert found["validation/perplexity"] == {record["step"]: record["validation_perplexity"] for record in log}
    for group in metrics["tau_by_group"]:
        assert found[f"tau/{group}"] == {record["step"]: record["tau_path"][-1]["tau"][group] for record in log}
    assert wandb.summary["final/test_perplexity"] == metrics["test_perplexity"]
    assert wandb.finished == [0]
    assert [step for step, _ in wandb.logged] == sorted(step for step, _ in wandb.logged)

    # resumed, it is the same run of the account; overwritten, it is another one
    assert main(line({**inputs, "trackers": "wandb", "output_dir": folder.path, "resume": "true", "epochs": 3})) == 0
    assert wandb.started[1]["id"] == started["id"]
    assert main(line({**inputs, "trackers": "wandb", "output_dir": folder.path, "overwrite": "true", "epochs": 1})) == 0
    assert wandb.started[2]["id"] != started["id"]


def test_wandb_hears_of_a_fit_that_failed(main, inputs, tmp_path, wandb, capsys):
    assert main(line({**inputs, "trackers": "wandb", "output_dir": tmp_path / "run", "learning_rate": 1e30})) == 2
    assert "is not finite" in capsys.readouterr().err
    assert wandb.finished == [1]


def test_wandb_that_cannot_begin_is_one_line(main, inputs, tmp_path, wandb, capsys):
    wandb.refuse = "api_key not configured\n(no-tty)"
    assert main(line({**inputs, "trackers": "tensorboard,wandb", "output_dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: wandb cannot start (api_key not configured (no-tty)); WANDB_MODE=offline needs neither network nor account, "
        "or leave wandb out of --trackers"
    )


# What cannot be used


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_stops_a_fit_before_it_begins(main, inputs, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, TRACKERS[name].package, None)
    assert main(line({**inputs, "trackers": name, "output_dir": tmp_path / "run"})) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: tracker {name!r} needs {name}, which is not installed")
    assert f"pip install 'bora_pyro[{TRACKERS[name].extra}]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("tensorboard,tensorboard", "given twice"),
        ("mlflow", "it is one of tensorboard, wandb"),
    ],
)
@pytest.mark.parametrize("script", ["map_fit", "posterior_fit"])
def test_names_that_no_tracker_has(tmp_path, capsys, script, value, match):
    run = ["runs/demo"] if script == "posterior_fit" else []
    assert script_main(script)([*run, "--trackers", value, "--output_dir", str(tmp_path / "run")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert match in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=match):
        check_trackers(value.split(","))


def test_a_tracked_run_is_read_back_without_the_package(tracked, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert load_run(tracked.path).config.trackers == ["tensorboard"]


def test_none_is_no_tracker(tmp_path):
    check_packages(None)
    with track(None, tmp_path, {}) as tracking:
        tracking.step({"step": 1, "total": 1, "loss": 1.0})
        tracking.conclude({"test_perplexity": 20.0}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_offline(inputs, tmp_path):
    folder, path = tmp_path / "run", os.pathsep.join([str(SCRIPTS.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, SCRIPTS / "map_fit.py", *line({**inputs, "trackers": "wandb", "output_dir": folder})],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [entry.name for entry in (folder / "wandb").iterdir() if entry.name.startswith("offline-run-")]
    assert len(runs) == 1
    assert runs[0].endswith((folder / "wandb" / "run_id.txt").read_text())
