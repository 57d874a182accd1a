"""A run folder: what it accepts, what it refuses to touch, and that it gives back what was put in."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch

from bora_pyro.errors import InputError
from bora_pyro.files.slugs import task_slugs
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import DIAGNOSTICS, REPORT, TRACKED
from tests.forked import SERVER, Forked


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "runs" / "one") as run:
        run.write_config({"tau": 100.0, "targets": ["q_proj"], "seed": 3})
    return run


def test_what_was_written_is_read_back(run):
    run.log({"epoch": 1, "loss": 3.5})
    run.log({"epoch": 2, "loss": 3.25, "name": "Språk"})
    run.write_metrics({"test_perplexity": 20.5, "deviation_norm": None})
    run.write_split({"seed": 3, "test": ["speech 1"]})
    found = RunFolder.open(run.path)
    assert found.read_config() == {"tau": 100.0, "targets": ["q_proj"], "seed": 3}
    assert found.read_log() == [{"epoch": 1, "loss": 3.5}, {"epoch": 2, "loss": 3.25, "name": "Språk"}]
    assert found.read_metrics() == {"test_perplexity": 20.5, "deviation_norm": None}
    assert found.read_split() == {"seed": 3, "test": ["speech 1"]}
    assert found.checkpoints.is_dir()
    assert found.adapters.is_dir()


def test_tensors_are_read_back_exactly(run):
    stacked = torch.arange(6.0).view(2, 3)
    tensors = {
        "first": stacked[0],
        "second": stacked[1],
        "shared": torch.ones(1).expand(4),
        "transposed": stacked.T,
        "half": stacked.to(torch.bfloat16),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    run.save_tensors("checkpoints/epoch-1", tensors, {"epoch": "1"})
    loaded = run.load_tensors("checkpoints/epoch-1")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())
    assert run.load_metadata("checkpoints/epoch-1") == {"epoch": "1"}


def test_no_half_file_is_left(run):
    run.write_metrics({"a": 1})
    with pytest.raises(TypeError):
        run.write_metrics({"a": object()})
    assert run.read_metrics() == {"a": 1}
    assert sorted(path.name for path in run.path.iterdir()) == ["adapters", "checkpoints", "config.yaml", "metrics.json"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for options in ({}, {"overwrite": True}):
        with RunFolder.create(tmp_path / "empty", **options) as run:
            assert run.path == tmp_path / "empty"
    assert list(run.path.iterdir()) == []


def keep_folder(path, connection):
    """Hold a run folder until the process is killed."""
    with RunFolder.create(path, resume=True):
        connection.send("taken")
        connection.recv()


def test_a_folder_is_kept_from_other_processes_until_the_run_ends(run, tmp_path):
    here, there = SERVER.Pipe()
    other = Forked(tmp_path / "output", keep_folder, run.path, there)
    assert here.recv() == "taken"
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="another process is at work there; wait until it ends") as caught:
            RunFolder.create(run.path, **options)
        assert "\n" not in str(caught.value)
    assert run.read_config()["seed"] == 3
    os.kill(other.pid, signal.SIGKILL)  # without a farewell
    assert other.end().code == -signal.SIGKILL
    with RunFolder.create(run.path, resume=True):
        pass
    assert not (run.path / ".lock").exists()


def test_a_full_disk_is_named_and_nothing_is_lost(run, monkeypatch):
    run.write_metrics({"a": 1})
    run.save_tensors("posterior", {"a": torch.zeros(1)})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, write in (
        ("fsync", lambda: run.write_metrics({"a": 2})),
        ("fsync", lambda: run.save_tensors("posterior", {"a": torch.ones(1)})),
        ("replace", lambda: run.write_config({"seed": 4})),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room there") as caught:
                write()
        assert "\n" not in str(caught.value)
    assert (run.read_metrics(), run.read_config()["seed"], run.load_tensors("posterior")["a"].item()) == ({"a": 1}, 3, 0.0)
    assert not [entry for entry in run.path.iterdir() if entry.name.endswith(".tmp")]


def test_another_run_is_refused_with_the_remedies(run):
    with pytest.raises(InputError, match=r"another run; give --overwrite true .* --resume true .* another --output_dir"):
        RunFolder.create(run.path)
    assert run.read_config()["seed"] == 3


def test_overwrite_deletes_the_run(run):
    run.log({"a": 1})
    run.write_split({})
    run.save_tensors("posterior", {"a": torch.zeros(1)})
    (run.adapters / "ada").mkdir()
    (run.path / DIAGNOSTICS).mkdir()
    (run.path / DIAGNOSTICS / "shrinkage.csv").write_text("task\n")
    (run.path / REPORT).write_text("<!doctype html>")
    for name in TRACKED:
        (run.path / name).mkdir()
        (run.path / name / "events").write_text("")
    (run.path / ".metrics.json.tmp").write_text("left by a killed run")
    with RunFolder.create(run.path, overwrite=True):
        pass
    assert list(run.path.iterdir()) == []


def test_resume_keeps_the_run_and_drops_a_half_line(run):
    run.log({"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_log() == [{"step": 1}]
    with RunFolder.create(run.path, resume=True) as resumed:
        resumed.log({"step": 2})
    assert resumed.read_log() == [{"step": 1}, {"step": 2}]


def test_a_log_that_has_another_name_too_is_neither_cut_nor_appended_to(run, tmp_path):
    for step in (1, 2):
        run.log({"step": step})
    log, other = run.path / "metrics.jsonl", tmp_path / "other"
    with log.open("a") as file:
        file.write('{"step": 3, "lo')
    os.link(log, other)  # as in a copy of the run by hard links
    before = other.read_bytes()
    with RunFolder.create(run.path, resume=True) as resumed:
        assert resumed.read_log() == [{"step": 1}, {"step": 2}]
        resumed.cut_log(1)
        resumed.log({"step": 4})
    assert resumed.read_log() == [{"step": 1}, {"step": 4}]
    assert other.read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("files", [["notes.txt"], ["config.yaml"], ["config.yaml", "setup.py"]])
def test_foreign_files_are_never_touched(tmp_path, files, options):
    for name in files:
        (tmp_path / name).write_text("mine: true\n")
    if options == {"resume": True} and "config.yaml" in files:
        match = "which no run wrote"
    else:
        match = "no run to resume" if options.get("resume") else "which no run wrote"
    with pytest.raises(InputError, match=match):
        RunFolder.create(tmp_path, **options)
    with pytest.raises(InputError, match=match):
        RunFolder(tmp_path).check_free(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_overwrite_refuses_a_run_with_foreign_files_in_it(run):
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds .thesis\.tex., which no run wrote"):
        RunFolder.create(run.path, overwrite=True)
    assert (run.path / "thesis.tex").exists()
    RunFolder.create(run.path, resume=True)


@pytest.mark.parametrize(
    "name",
    [
        "adapters/notes.md", "adapters/ada/thesis.tex", "diagnostics/thesis.tex", "checkpoints/best.safetensors",
        "important.safetensors", ".env.tmp", "diagnostics/more/forest.png",
    ],
)  # fmt: skip
def test_overwrite_refuses_what_no_run_wrote_wherever_it_stands(run, name):
    for file in ("adapters/ada/adapter_config.json", "diagnostics/forest.png", "checkpoints/step-00000004.safetensors", name):
        (run.path / file).parent.mkdir(parents=True, exist_ok=True)
        (run.path / file).write_text("years of work")
    with pytest.raises(InputError, match="which no run wrote"):
        RunFolder(run.path).check_free(overwrite=True)
    with pytest.raises(InputError, match="which no run wrote"):
        RunFolder.create(run.path, overwrite=True)
    assert (run.path / name).read_text() == "years of work"
    (run.path / name).unlink()
    if "more" in name:
        (run.path / name).parent.rmdir()
    RunFolder.create(run.path, overwrite=True)
    assert not (run.path / "adapters").exists()


def test_a_command_that_cannot_resume_does_not_speak_of_it(run):
    with pytest.raises(InputError, match="give --overwrite true to replace it, or another --output_dir"):
        RunFolder.create(run.path, resume=None)


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_resume(tmp_path, exists):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    with pytest.raises(InputError, match="holds no run to resume"):
        RunFolder.create(path, resume=True)
    assert path.exists() is exists


def test_paths_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file; give another --output_dir"):
        RunFolder.create(file, overwrite=True)
    for path in (file / "run", tmp_path / ("x" * 300), tmp_path / "nul\0l"):
        for take in (lambda path: RunFolder(path).check_free(), RunFolder.create):
            with pytest.raises(InputError, match="give another --output_dir"):
                take(path)


def test_check_leaves_the_disk_alone(tmp_path, run):
    RunFolder(tmp_path / "new" / "run").check_free()
    assert not (tmp_path / "new").exists()
    RunFolder(run.path).check_free(overwrite=True)
    RunFolder(run.path).check_free(resume=True)
    assert run.read_config()["seed"] == 3
    with pytest.raises(InputError, match="another run"):
        RunFolder(run.path).check_free()


def test_open_says_what_is_missing(tmp_path, run):
    with pytest.raises(InputError, match="does not exist"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        RunFolder.open(tmp_path)
    with pytest.raises(InputError, match="not finished"):
        RunFolder.open(run.path).read_metrics()
    with pytest.raises(InputError, match="does not exist"):
        run.load_tensors("posterior")


@pytest.mark.parametrize("content", ['{"test_perplexity": 2', "", "[1]"])
def test_damaged_metrics(run, content):
    (run.path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.json .* --resume true"):
        run.read_metrics()


@pytest.mark.parametrize("content", ["tau: [1", "- 1\n", ""])
def test_damaged_config(run, content):
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml .*; fit again"):
        RunFolder.open(run.path)


def test_damaged_tensors(run):
    (run.path / "posterior.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="is damaged"):
        run.load_tensors("posterior")
    with pytest.raises(InputError, match="is damaged"):
        run.load_metadata("posterior")


def test_metrics_are_plain_json(run):
    run.write_metrics({"name": "Språk", "tasks": {"a": [float("inf"), 1.0]}, "loss": float("nan")})
    plain = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    assert plain == {"name": "Språk", "tasks": {"a": [None, 1.0]}, "loss": None}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Abid Q. Raja", "abid-q-raja"),
        ("Åse Wisløff Nilssen", "ase-wisloff-nilssen"),
        ("../../etc/passwd", "etc-passwd"),
        ("a/b\\c", "a-b-c"),
        ("  spaced\tout \n", "spaced-out"),
        ("Straße", "strasse"),
        ("½ fi", "1-2-fi"),
        ("東京", "task"),
        ("", "task"),
        ("..", "task"),
        ("x" * 200, "x" * 80),
    ],
)
def test_slug_of_one_task(name, slug):
    assert task_slugs([name]) == {name: slug}


def test_slugs_never_collide():
    names = ["A", "a", "a-2", "a 2", "?", "!", "x" * 90, "x" * 91, "theta"]
    slugs = task_slugs(names, reserved=["theta"])
    assert list(slugs) == names
    assert len(set(slugs.values())) == len(names)
    assert slugs["a"] == "a-2"
    assert slugs["!"] == "task-2"
    assert slugs["x" * 91] == "x" * 78 + "-2"
    assert slugs["theta"] == "theta-2"
    assert max(map(len, slugs.values())) <= 80
