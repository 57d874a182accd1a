"""Input that cannot be used: one line that says what was given and what to do, exit code 2, and nothing on the disk."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bora_pyro.inference.checkpoint import load_checkpoint
from bora_pyro.runs.folder import RunFolder
from tests.forked import Forked, run_script
from tests.runs.input_tables import TWO_SMALL, frame
from tests.tiny_base import documents, line, write_table


def one_error(err):
    """The one line of the error, behind notes and nothing else."""
    *notes, error = err.splitlines()
    assert err.endswith("\n")
    assert all(note.startswith(("data: ", "note: ", "adapters: ", "memory: ")) for note in notes), err
    assert error.startswith("error: ")
    return error


def table(**changes):
    def write(folder):
        return {"data": write_table(folder / "table.csv", documents().assign(**changes))}

    return write


def content(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return {"data": str(folder / name)}

    return write


def rows(*cells):
    return content(
        "table.jsonl", "".join(json.dumps({"task": "ab"[n % 2], "text": c}) + "\n" for n, c in enumerate(cells)).encode()
    )


def config_file(text):
    def write(folder):
        (folder / "fit.yaml").write_text(text)
        return {"config": str(folder / "fit.yaml")}

    return write


def given(**options):
    return lambda folder: options


def columns(text):
    return lambda folder: {"data": write_table(folder / "table.csv", documents().rename(columns={"text": text}))}


CASES = {
    "missing file": (
        given(data="nowhere/in/sight/speeches.csv"),
        ["'nowhere/in/sight/speeches.csv' does not exist", "check the path"],
    ),
    "missing file, a near one": (
        lambda folder: {"data": write_table(folder / "speeches.csv")[:-5] + "z.csv"},
        ["does not exist", "did you mean 'speeches.csv'?"],
    ),
    "unknown ending": (content("speeches.doc", b""), ["speeches.doc'", ".csv, .tsv"]),
    "data that is a hub path": (given(data="no/such/data/set"), ["'no/such/data/set' does not exist", "check the path"]),
    "unknown built-in data": (
        given(data="builtin:documentations"),
        ["'builtin:documentations'", "did you mean 'builtin:documentation'?"],
    ),
    "missing column": (given(text_column="txt"), ["no column 'txt'", "task, text", "did you mean 'text'?"]),
    "missing task column": (given(task_column="Tasks"), ["no column 'Tasks' (task_column)", "did you mean 'task'?"]),
    "missing default column": (columns("speech"), ["no column 'text' (text_column)", "task, speech"]),
    "missing group column": (given(group_column="doc"), ["no column 'doc' (group_column)", "task, text"]),
    "missing split column": (given(split_column="split"), ["no column 'split' (split_column)", "task, text"]),
    "empty file": (content("table.csv", b""), ["table.csv' is empty", "give a header line"]),
    "empty table": (frame(lambda table: table[:0]), ["table.csv' has no rows", "give one document a row"]),
    "empty texts only": (table(text="  "), ["no document with a task and a text", "30 documents with empty text"]),
    "one task only": (table(task="Ada"), ["1 task, 'Ada'", "two or more", "task_column"]),
    "too few documents": (
        lambda folder: {"data": write_table(folder / "t.csv", pd.concat([documents((t,), number=n) for t, n in TWO_SMALL]))},
        ["task 'Bo' has 2 documents, fewer than 3 (and so has 1 other task)", "small_tasks=drop"],
    ),
    "one task after the small ones are dropped": (
        lambda folder: {
            "data": write_table(folder / "t.csv", pd.concat([documents((t,), number=n) for t, n in TWO_SMALL[:2]])),
            "small_tasks": "drop",
        },
        ["1 task, 'Ada'", "two or more"],
    ),
    "more tasks than there are": (given(num_tasks=9), ["num_tasks is 9", "give 2 to 3"]),
    "one task asked for": (given(num_tasks=1), ["num_tasks is 1", "give 2 to 3"]),
    "a number for a text": (rows("one", "two", 3), ["line 3: column 'text' is a int (3), not text"]),
    "a list for a text": (rows(["one"]), ["line 1: column 'text' is a list", "not text"]),
    "broken encoding": (
        content("table.csv", "task,text\na,Børge\n".encode("latin-1")),
        ["is not UTF-8: byte 0xf8", "save the file as UTF-8"],
    ),
    "broken gzip": (content("table.csv.gz", b"task,text\n"), ["is not a whole gzip file", "compress it again"]),
    "broken json": (content("table.jsonl", b'{"task": "a"\n'), ["line 1: not JSON", "one JSON object a line"]),
    "broken parquet": (content("table.parquet", b"PAR1"), ["is not a parquet file", "write it again"]),
    "a split that does not train": (
        lambda folder: {"data": write_table(folder / "t.csv", documents().assign(side="test")), "split_column": "side"},
        ["has 30 test documents and none to train on", "hub_split"],
    ),
    "unknown base": (given(base_model="./no/such/base"), ["'./no/such/base' cannot be loaded", "builtin:nano"]),
    "unknown built-in base": (given(base_model="builtin:nanoo"), ["'builtin:nanoo'", "did you mean 'builtin:nano'?"]),
    "a base that is an empty folder": (lambda folder: {"base_model": str(folder)}, ["cannot be loaded", "save_pretrained"]),
    "unknown target": (
        given(targets="v_proj,fc3"),
        ["'fc3' names no linear layer", "fc1, fc2, k_proj, out_proj, q_proj, v_proj", "did you mean 'fc2'?"],
    ),
    "unknown adapter": (given(adapter="lorra"), ["adapter is 'lorra'; allowed: ", "lora, lora_frozen_a", "did you mean 'lora'?"]),
    "unknown device": (given(device="gpu"), ["device is 'gpu'", "auto, cpu, cuda"]),
    "rank 0": (given(rank=0), ["rank is 0", "from 1 up"]),
    "rank -1": (given(rank=-1), ["rank is -1", "from 1 up"]),
    "rank 2.5": (given(rank=2.5), ["'2.5'", "whole number"]),
    "tau -1": (given(tau=-1), ["tau is -1", "0 (independent tasks)", "inf (one shared adapter)"]),
    "tau nan": (given(tau="nan"), ["tau is nan", "inf (one shared adapter)"]),
    "tau large": (given(tau="large"), ["'large' cannot be used", "a number, 0 (independent tasks)"]),
    "learning rate 0": (given(learning_rate=0), ["learning_rate is 0", "above 0"]),
    "documents longer than a batch": (given(max_tokens=512), ["token_budget is 256", "give token_budget 512 or more"]),
    "unknown choice": (
        given(prior_form="non-centered"),
        ["'non-centered'", "noncentered, centered", "did you mean 'noncentered'?"],
    ),
    "unknown quantisation": (
        given(quantization="3bit"),
        ["quantization is '3bit'; allowed: 4bit, 8bit", "did you mean '"],
    ),
    "unknown device map": (
        given(device_map="automatic"),
        ["device_map is 'automatic'; allowed: auto, balanced", "did you mean 'auto'?"],
    ),
    "unknown key on the line": (given(learning_rte=1), ["unknown option 'learning_rte'", "did you mean 'learning_rate'?"]),
    "unknown key in the file": (config_file("tau: 1\ntua: 2\n"), ["fit.yaml", "unknown option 'tua'", "did you mean 'tau'?"]),
    "wrong value in the file": (config_file("rank: many\n"), ["fit.yaml: rank: 'many'", "whole number"]),
    "broken config": (config_file("rank: [1\n"), ["fit.yaml, line 2"]),
    "missing config": (given(config="no/such/fit.yaml"), ["no/such/fit.yaml: No such file", "give a YAML file"]),
    "nothing to resume": (given(resume="true"), ["holds no run to resume", "leave --resume out"]),
    "overwrite and resume": (given(resume="true", overwrite="true"), ["both true", "give one of them"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(main, inputs, tmp_path, capsys, case):
    make, says = CASES[case]
    folder = tmp_path / "output" / "run"
    options = {**inputs, "output_dir": folder, **make(tmp_path)}
    if "config" in options:
        options.pop("rank")  # the line would win over the file
    assert main(line(options)) == 2
    captured = capsys.readouterr()
    error = one_error(captured.err)
    for text in says:
        assert text in error
    assert captured.out == ""
    assert not folder.parent.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_here(main, inputs, tmp_path, capsys, device):
    assert main(line({**inputs, "output_dir": tmp_path / "run", "device": device})) == 2
    assert f"device {device!r} is not available here; use --device auto" in one_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_name_for_the_hub_without_the_hub(main, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(line({**inputs, "output_dir": tmp_path / "run", "base_model": "no-such-base-anywhere"})) == 2
    error = one_error(capsys.readouterr().err)
    assert "base model 'no-such-base-anywhere' cannot be loaded: give builtin:nano, builtin:smollm2, a folder" in error
    assert not (tmp_path / "run").exists()


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_stays_untouched(main, inputs, tmp_path, capsys, overwrite):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    options = {**inputs, "output_dir": folder} | ({"overwrite": "true"} if overwrite else {})
    assert main(line(options)) == 2
    error = one_error(capsys.readouterr().err)
    assert "'thesis.txt', which no run wrote; give another --output_dir" in error
    assert files_of(tmp_path) == {(folder / "thesis.txt").relative_to(tmp_path): b"years of work"}


def test_a_folder_with_another_run_stays_untouched(main, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    options = {**inputs, "epochs": 1, "output_dir": folder}
    assert main(line(options)) == 0
    before = files_of(folder)
    for more in ({}, {"overwrite": "true", "data": "nowhere/at/all.csv"}, {"overwrite": "true", "targets": "fc3"}):
        capsys.readouterr()
        assert main(line({**options, **more})) == 2
        one_error(capsys.readouterr().err)
        assert files_of(folder) == before  # also where the run that would replace it cannot begin


@pytest.mark.parametrize("name", ["run", "run/inside"])
def test_an_output_folder_that_is_a_file(main, inputs, tmp_path, capsys, name):
    (tmp_path / "run").write_text("a file")
    assert main(line({**inputs, "output_dir": tmp_path / name})) == 2
    error = one_error(capsys.readouterr().err)
    assert str(tmp_path / name) in error
    assert "give another --output_dir" in error
    assert files_of(tmp_path) == {(tmp_path / "run").relative_to(tmp_path): b"a file"}


def test_a_loss_that_is_not_finite_keeps_the_last_good_epoch(main, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    options = {**inputs, "epochs": 1, "token_budget": 64, "output_dir": folder}
    assert main(line(options)) == 0
    [file] = (folder / "checkpoints").iterdir()
    good = load_file(file)
    capsys.readouterr()
    assert main(line({**options, "epochs": 3, "learning_rate": 1e30, "resume": "true"})) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the loss is not finite at step ")
    assert progress.pop(0).startswith("data: 30 rows read; ")
    assert progress.pop(0) == "adapters: on 4 layers: v_proj x 2, fc2 x 2"
    assert progress.pop(0).startswith("memory: about ")
    assert all(text.startswith("step ") for text in progress)
    assert "(epoch 2); the state of epoch 1 is kept. Use a smaller --learning_rate (now 1e+30; try 3e+29)" in error
    kept = load_file(file)
    assert list(kept) == list(good)
    for name, value in good.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=0)
    # a smaller rate goes on from there
    assert main(line({**options, "epochs": 3, "learning_rate": 1e-3, "resume": "true"})) == 0
    assert [entry["epoch"] for entry in RunFolder.open(folder).read_log()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_in_the_first_epoch(main, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(line({**inputs, "output_dir": folder, "learning_rate": 1e30})) == 2
    error = one_error(capsys.readouterr().err)
    assert "the state of epoch 0 is kept. Use a smaller --learning_rate" in error
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "metrics.json").exists()
    assert main(line({**inputs, "output_dir": folder, "learning_rate": 1e-3, "resume": "true"})) == 0


def test_a_checkpoint_that_was_cut_short(main, inputs, tmp_path, capsys):
    folder = tmp_path / "run"
    options = {**inputs, "epochs": 1, "output_dir": folder}
    assert main(line(options)) == 0
    [file] = (folder / "checkpoints").iterdir()
    assert load_checkpoint(file)[1]["epoch"] == 1
    file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert main(line({**options, "resume": "true"})) == 2
    error = one_error(capsys.readouterr().err)
    assert f"checkpoint {str(file)!r} cannot be read" in error
    assert "--overwrite true" in error


def test_the_script_in_a_process_of_its_own(inputs, tmp_path):
    options = {**inputs, "base_model": "./no/such/base", "output_dir": tmp_path / "here" / "run"}
    (tmp_path / "here").mkdir()
    done = Forked(tmp_path / "output", run_script, "map_fit.py", line(options), cwd=tmp_path / "here").end()
    assert (done.code, done.out) == (2, "")
    assert "'./no/such/base' cannot be loaded" in one_error(done.err)
    assert [entry.name for entry in (tmp_path / "here").iterdir()] == []
