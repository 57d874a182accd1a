"""Files of a run that say what is not so are named in one line: tensors, metrics, splits, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import load_checkpoint, save_checkpoint
from bora_pyro.inference.fit import fit
from bora_pyro.report.make_page import COMMAND
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.record import NUMBERS, NUMBERS_OF_RECORD, NUMBERS_OF_TASK
from bora_pyro.runs.saved import load_run
from tests.tiny_base import map_run, quick_fit, toy_data, toy_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    return map_run({**quick_fit(folder), "output_dir": folder / "run", "tau": 100, "device": "cpu"})


@pytest.fixture(scope="module")
def report():
    """``main`` of the script that makes pages."""
    return COMMAND.main


SITE = "prior_mean.fc2.lora_A"


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


def tensors(change):
    def write(file):
        with_metadata = RunFolder(file.parent).load_metadata(file.stem)
        save_file(change(load_file(file)), file, with_metadata)

    return write


def raw(data):
    return lambda file: file.write_bytes(data)


def entry(**about):
    about = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | about
    text = json.dumps({SITE: about}).encode()
    return raw(header(len(text), text) + b"\0" * 4)


LIES = {
    "an empty file": raw(b""),
    "a header longer than any file": raw(header(2**63)),
    "a header of 2^64 bytes": raw(header(2**64 - 1)),
    "a header longer than this file": raw(header(10**6)),
    "a header that is no JSON": raw(header(4, b"{{{{")),
    "a header that is no mapping": raw(header(2, b"[]")),
    "a tensor of more bytes than there are": entry(shape=[2**40], data_offsets=[0, 2**42]),
    "a tensor of more numbers than bytes": entry(shape=[2**40]),
    "a shape that overflows": entry(shape=[2**63, 2**63]),
    "offsets that cross": entry(data_offsets=[4, 0]),
    "an unknown type": entry(dtype="F31"),
    "a number for a name": raw(header(5, b'{1:1}')),
    "NaN": tensors(lambda found: found | {SITE: found[SITE] * float("nan")}),
    "infinity": tensors(lambda found: found | {SITE: found[SITE] + float("inf")}),
    "another shape": tensors(lambda found: found | {SITE: found[SITE].flatten()}),
    "no dimension": tensors(lambda found: found | {SITE: found[SITE].sum()}),
    "a type that no fit writes": tensors(lambda found: found | {SITE: found[SITE].to(torch.float8_e5m2)}),
    "one too many": tensors(lambda found: found | {"thta": found[SITE].clone()}),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_posterior_that_lies_is_named(finished, tmp_path, lie):
    run = shutil.copytree(finished, tmp_path / "run")
    LIES[lie](run / "posterior.safetensors")
    with pytest.raises(InputError, match=r"posterior(\.safetensors)? ?.*; run the fit again") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)
    assert str(run) in str(caught.value)


METRICS_LIES = [
    {"test_perplexity": "low"}, {"best_epoch": []}, {"validation_perplexity": {}}, {"tasks": 3}, {"tasks": None},
    {"tasks": {"ada": {"test_perplexity": 1.0}}}, {"tasks": {"ada": {"name": ["Ada"]}}}, {"tasks": {"ada": 3}},
    {"tasks": {"ada": {"name": "Ada", "test_perplexity": "x"}}}, {"tau": "abc"}, {"tau": -1}, {"tau_by_group": {"q": -1}},
    {"tau_by_group": [1]}, {"tau_by_group": {"$x^{": 1}}, {"fit_seconds": "1"}, {"peak_memory_bytes": "1"}, {"draws": True},
    {"gradient_norm": 3}, {"gradient_norm": {"ratio": "x"}},
    {"notes": 3}, {"notes": [3]}, {"notes": "abc"}, {"versions": "abc"}, {"versions": {"torch": 2}}, {"mean": {"ece": "x"}},
    {"test_perplexity": 10**400},
]  # fmt: skip


@pytest.mark.parametrize("change", METRICS_LIES, ids=lambda change: str(change)[:50])
def test_metrics_that_lie_are_named(finished, tmp_path, report, capsys, change):
    run = shutil.copytree(finished, tmp_path / "run")
    metrics = RunFolder(run).read_metrics() | change
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"metrics\.json has .*; run the fit again with --resume true") as caught:
        load_run(run)
    assert report([str(run), "--adapters", "false"]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_no_run_writes_are_named(finished, tmp_path, number):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(text.replace('"fit_seconds": ', f'"fit_seconds": {number}, "x": '))
    with pytest.raises(InputError, match=r"metrics\.json has -?(nan|inf) for 'fit_seconds'; run the fit again"):
        RunFolder(run).read_metrics()


LOG_LIES = [
    {"epoch": "a"}, {"step": []}, {"loss": "b"}, {"validation_perplexity": True}, {"learning_rate": {}}, {"seconds": "1"},
    {"training_tokens_per_second": "fast"}, {"epoch": float("nan")}, {"tau_path": 3}, {"tau_path": [3]}, {"tau_path": [{}]},
    {"tau_path": [{"step": "x", "tau": {"q": 1}}]}, {"tau_path": [{"step": 1, "tau": {"q": "x"}}]},
    {"tau_path": [{"step": 1, "tau": {"q": []}}]}, {"tau_path": [{"step": 1, "tau": {"q": [1, "x"]}}]},
    {"tau_path": [{"step": 1, "tau": {"q": 0}}]}, {"tau_path": [{"step": 1, "tau": {"$\\frac{": 1}}]}, 3, None, [],
]  # fmt: skip


@pytest.mark.parametrize("line", LOG_LIES, ids=str)
def test_a_log_that_lies_is_named(finished, tmp_path, report, capsys, line):
    run = shutil.copytree(finished, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \(line 3 h(as|olds) .*\); fit again") as caught:
        RunFolder(run).read_log()
    assert report([str(run), "--adapters", "false"]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_a_log_with_bytes_that_are_no_text_is_damaged(finished, tmp_path):
    """They are no damage in the last line, which a killed run can leave half written."""
    run = shutil.copytree(finished, tmp_path / "run")
    whole, log = RunFolder(run).read_log(), run / "metrics.jsonl"
    content = log.read_bytes()
    log.write_bytes(content + b'{"note": "\xc3')
    assert RunFolder(run).read_log() == whole
    log.write_bytes(content + b'{"note": "\xc3"}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \('utf-8' codec .*\); fit again"):
        RunFolder(run).read_log()


def test_what_is_not_known_is_no_lie(finished, tmp_path, report):
    """A page of a run in which every number that may be missing is, and of one with the largest and smallest there are."""
    run = shutil.copytree(finished, tmp_path / "run")
    metrics, log = RunFolder(run).read_metrics(), RunFolder(run).read_log()
    for value in (None, 0, 1e300):
        new = metrics | dict.fromkeys(NUMBERS, value) | {"mean": {"ece": value}, "tau": None, "notes": None, "versions": None}
        new["tasks"] = {slug: task | dict.fromkeys(NUMBERS_OF_TASK, value) for slug, task in metrics["tasks"].items()}
        (run / "metrics.json").write_text(json.dumps(new))
        records = [record | dict.fromkeys(NUMBERS_OF_RECORD, value) for record in log]
        records[-1]["tau_path"] = [{"step": step, "tau": {"a.b": [1e-44, 1e38], "c": 1e38, "shared": None}} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert report([str(run), "--adapters", "false"]) == 0


SPLIT_LIES = [{"tasks": 3}, {"tasks": {"Ada": 3}}, {"tasks": {"Ada": {"row 1": ["train"]}}}, {"tasks": {}}]


@pytest.mark.parametrize("change", SPLIT_LIES, ids=str)
def test_a_split_that_lies_is_named(finished, tmp_path, change):
    run = shutil.copytree(finished, tmp_path / "run")
    RunFolder(run).write_split(RunFolder(run).read_split() | change)
    with pytest.raises(InputError) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


@pytest.fixture
def in_time():
    """What waits for more than five seconds is an error."""

    def stop(number, frame):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "config.yaml": RunFolder.read_config,
    "metrics.json": RunFolder.read_metrics,
    "metrics.jsonl": RunFolder.read_log,
    "split.json": RunFolder.read_split,
    "posterior.safetensors": lambda folder: folder.load_tensors("posterior"),
    "posterior.safetensors, metadata": lambda folder: folder.load_metadata("posterior"),
    "step-00000001.safetensors": lambda folder: load_checkpoint(folder.path / "step-00000001.safetensors"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_a_run_is_not_waited_for(tmp_path, in_time, name):
    file = tmp_path / name.partition(",")[0]
    os.mkfifo(file)
    with pytest.raises(InputError, match=r"is (damaged|not finished)|cannot be read") as caught:
        READERS[name](RunFolder(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_run_with_pipes_is_neither_read_nor_hangs(finished, tmp_path, in_time):
    for name in ("config.yaml", "metrics.json", "metrics.jsonl", "split.json", "posterior.safetensors"):
        run = shutil.copytree(finished, tmp_path / name)
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(InputError):
            load_run(run)


def test_json_a_thousand_deep_is_named(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("metrics.jsonl", "split.json", "metrics.json"):  # the last is read first
        (run / name).write_text("[" * 100_000 + "\n")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            load_run(run)


def first(groups, group):
    return next(iter(groups[group]))


def change_tensor(group, change):
    def write(groups, progress):
        name = first(groups, group)
        groups[group][name] = change(groups[group][name])

    return write


def change_progress(**values):
    return lambda groups, progress: progress.update(values)


CHECKPOINT_LIES = {
    "NaN in the parameters": change_tensor("parameters", lambda value: value * float("nan")),
    "infinity in the best state": change_tensor("best", lambda value: value + float("inf")),
    "NaN in the optimiser": change_tensor("optimizer", lambda value: value * float("nan")),
    "another shape": change_tensor("parameters", lambda value: value.flatten()[:1]),
    "another shape in the optimiser": change_tensor("optimizer", lambda value: value.new_zeros(3)),
    "an optimiser of no parameter": lambda groups, progress: groups["optimizer"].update({"99.step": torch.zeros(())}),
    "an optimiser without a number": lambda groups, progress: groups["optimizer"].update({"x.step": torch.zeros(())}),
    "an optimiser without a moment": lambda groups, progress: groups["optimizer"].pop("0.exp_avg"),
    "an epoch that is a text": change_progress(epoch="3"),
    "an epoch that is true": change_progress(epoch=True),
    "a history that is none": change_progress(history=3),
    "a history of nothing": change_progress(history=[None]),
    "a history of other things": change_progress(history=[{"epoch": 1}]),
    "a best epoch that is a list": change_progress(best_epoch=[]),
    "no best epoch": lambda groups, progress: progress.pop("best_epoch"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The groups and the progress of a checkpoint, saved anew by each test."""
    folder = tmp_path_factory.mktemp("checkpoint")
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=folder)
    [file] = folder.iterdir()
    return file


@pytest.mark.parametrize("lie", CHECKPOINT_LIES)
def test_a_checkpoint_that_lies_is_named(checkpoint, tmp_path, lie):
    file = tmp_path / checkpoint.name
    groups, progress = load_checkpoint(checkpoint)
    save_checkpoint(file, groups, progress)
    fit(toy_model(), toy_data(), epochs=1, token_budget=10_000, checkpoints=tmp_path)  # as it is it can be used
    CHECKPOINT_LIES[lie](groups, progress)
    save_checkpoint(file, groups, progress)
    with pytest.raises(InputError, match=r"checkpoint '.*step-\d+\.safetensors' .*--overwrite true") as caught:
        fit(toy_model(), toy_data(), epochs=2, token_budget=10_000, checkpoints=tmp_path)
    assert "\n" not in str(caught.value)
