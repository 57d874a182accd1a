"""The command `pool-adapters`: what it writes from a run's own adapters, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from bora_pyro.errors import InputError
from bora_pyro.exchange.load import read_peft
from bora_pyro.exchange.names import write_task_names
from bora_pyro.exchange.pooling.folder import adapter_names, read_adapters, read_documents
from bora_pyro.exchange.pooling.held_out import read_held_out
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.pool import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny_base import documents, map_run, quick_fit, write_table

main = COMMAND.main


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Folder of the adapters of independent tasks, and their base."""
    folder = tmp_path_factory.mktemp("fit")
    options = quick_fit(folder) | {"tau": 0, "learning_rate": 0.03, "output_dir": folder / "run"}
    map_run(options)
    numbers = {slug: row["train_documents"] for slug, row in RunFolder.open(folder / "run").read_metrics()["tasks"].items()}
    table = pd.DataFrame({"task": list(numbers), "documents": [3, 30, 300]})
    table.to_csv(folder / "numbers.csv", index=False)
    return folder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def arguments(fitted, out, *more):
    base = ["--base_model", str(fitted / "base"), "--output_dir", str(out), "--threads", "1"]
    return [str(fitted / "run" / "adapters"), *base, *more]


@pytest.mark.parametrize(
    "how", [["--documents", "numbers.csv"], ["--noise", "0.001"], ["--shrinkage", "0.5", "--space", "weights"]]
)
def test_a_runs_adapters_are_pooled(fitted, tmp_path, capsys, how):
    how = [str(fitted / word) if word.endswith(".csv") else word for word in how]
    assert main(arguments(fitted, tmp_path / "out", *how)) == 0
    tasks = ["ada", "borge-b", "cleo"]
    assert names(tmp_path / "out") == sorted([*tasks, "global-mean", "groups.csv", "pooling.json", "tasks.csv", "tasks.json"])
    stored = [(place / "tasks.json").read_bytes() for place in (tmp_path / "out", fitted / "run" / "adapters")]
    assert stored[0] == stored[1]
    stored = json.loads((tmp_path / "out" / "pooling.json").read_text())
    groups = pd.read_csv(tmp_path / "out" / "groups.csv")
    assert groups["group"].tolist() == list(stored["groups"])
    for task in tasks:
        adapter, before = read_peft(tmp_path / "out" / task), read_peft(fitted / "run" / "adapters" / task)
        assert (adapter.rank, adapter.scaling, adapter.base_model) == (2, 1.0, before.base_model)
        assert list(adapter.factors) == list(before.factors)
    out, _ = capsys.readouterr()
    assert out.startswith("by group:\n")
    assert out.endswith(f"pooled adapters: {tmp_path / 'out'}\n")
    assert main(arguments(fitted, tmp_path / "out", *how)) == 2
    assert "holds an earlier result; give --overwrite true" in capsys.readouterr().err
    assert main(arguments(fitted, tmp_path / "out", *how, "--overwrite", "true")) == 0


def test_held_out_documents_choose_the_share(fitted, tmp_path, capsys):
    texts = documents(number=4, seed=7)
    texts["task"] = texts["task"].replace({"Ada": "ada"})  # the folder's name does as well as the task's
    table = write_table(tmp_path / "later.csv", pd.concat([texts, documents(("Zoe",), number=1)]))
    words = arguments(fitted, tmp_path / "out", "--held_out", table)
    assert main(words) == 0
    stored = json.loads((tmp_path / "out" / "pooling.json").read_text())["options"]
    perplexities = {float(share): value for share, value in stored["held_out_perplexities"].items()}
    assert list(perplexities) == pytest.approx([n / 10 for n in range(11)])
    best = min(perplexities, key=perplexities.get)
    assert stored["estimator"] == f"FixedShrinkage({best:g})"
    assert f"  {best:.1f}  {perplexities[best]:.2f}  <- taken" in capsys.readouterr().out
    # as they are, the adapters are the run's, and with the whole way gone they are Θ for all: both are known otherwise
    run = load_run(fitted / "run", device="cpu")
    model, tasks = run.fitted.model, ["ada", "borge-b", "cleo"]
    split, counts = read_held_out(table, model.backbone, tasks)
    assert split.documents_per_task == [4, 4, 4]
    assert (counts.tasks, counts.documents, sum(counts.left_out.values())) == (3, {"held out": 12}, counts.rows - 12)
    theta, _ = run.fitted.weights()
    [as_they_are] = evaluate(model, split, theta)
    assert perplexities[0.0] == pytest.approx(as_they_are.perplexity(), rel=1e-5)
    with pytest.raises(InputError, match="has no document of x, y"):
        read_held_out(table, model.backbone, ["x", "y"])


def test_the_whole_rank_and_another_base_name(fitted, tmp_path, capsys):
    moved = shutil.copytree(fitted / "base", tmp_path / "base")
    words = [str(fitted / "run" / "adapters"), "--base_model", str(moved), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--shrinkage", "0.5"]) == 2
    assert "is an adapter of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--shrinkage", "0.5", "--same_base", "false", "--rank", "full", "--tasks", "ada", "cleo"]) == 0
    assert 2 < read_peft(tmp_path / "out" / "ada").rank <= 4
    assert names(tmp_path / "out") == ["ada", "cleo", "global-mean", "groups.csv", "pooling.json", "tasks.csv", "tasks.json"]


def test_tasks_whose_names_make_one_folder_are_told_apart(fitted, tmp_path):
    folder = shutil.copytree(fitted / "run" / "adapters", tmp_path / "adapters")
    for before, after in (("ada", "task"), ("borge-b", "task-2")):
        (folder / before).rename(folder / after)
    backbone, rows = load_run(fitted / "run", device="cpu").fitted.model.backbone, ["東京", "cleo", "大阪"]
    table = write_table(tmp_path / "later.csv", pd.DataFrame({"task": rows, "text": ["red", "red red", "red red red"]}))
    numbers = write_table(tmp_path / "numbers.csv", pd.DataFrame({"task": rows, "documents": [2, 3, 1]}))
    (folder / "tasks.json").unlink()
    tasks = list(read_adapters(folder))
    for read in (lambda: read_held_out(table, backbone, tasks), lambda: read_documents(numbers, tasks)):
        with pytest.raises(InputError, match="the folder of the task '東京' is not known: it may be any of task, task-2"):
            read()
    write_task_names(folder, {"task": "大阪", "task-2": "東京", "cleo": "Cleo"})
    split, _ = read_held_out(table, backbone, tasks, names=adapter_names(folder))
    lengths = dict(zip([tasks[d] for d in split.task.tolist()], split.lengths.tolist(), strict=True))
    assert lengths["task-2"] < lengths["cleo"] < lengths["task"]
    found = dict(zip(tasks, read_documents(numbers, tasks, adapter_names(folder)), strict=True))
    assert found == {"task": 1, "task-2": 2, "cleo": 3}
    assert list(read_adapters(folder, ["東京", "cleo"])) == ["task-2", "cleo"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words[1:], "no folder is given; name the folder of the adapters"),
        (lambda words: ["gone", *words[1:], "--noise", "1"], "gone is no folder; give one in which each adapter"),
        (lambda words: words, "give one of --held_out, --documents, --noise and --shrinkage: "),
        (lambda words: [*words, "--noise", "1", "--shrinkage", "1"], "give one of --held_out, --documents, --noise and "),
        (lambda words: [*words, "--shrinkage", "2"], "shrinkage 2.0 is not allowed; it is a share from 0 to 1, nearest: 1"),
        (lambda words: [*words, "--noise", "0"], "noise 0.0 is not allowed"),
        (lambda words: [*words, "--noise", "1", "--rank", "0"], "rank is 0; give a whole number from 1 up, or full"),
        (lambda words: [*words, "--noise", "1", "--rank", "all"], "--rank: 'all' cannot be used; give a whole number or full"),
        (lambda words: [*words, "--noise", "1", "--space", "delta"], "space is 'delta'; allowed: delta_w, weights"),
        (lambda words: [*words, "--noise", "1", "--tasks", "adda"], "* has no adapter 'adda', of 4; did you mean 'ada'?"),
        (lambda words: [*words, "--documents", "gone.csv"], "*gone.csv*"),
        (lambda words: [*words, "--noise", "1", "--base_model", "x"], "--base_model is given twice; give it once"),
        (lambda words: [*words[:3], *words[5:], "--noise", "1"], "no output_dir is given; name the folder to make"),
    ],
)  # fmt: skip
def test_bad_lines(fitted, tmp_path, capsys, change, message):
    assert main(change(arguments(fitted, tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert all(part in error for part in message.split("*"))
    assert not (tmp_path / "out").exists()
