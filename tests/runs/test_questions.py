"""Accuracy among the options of a table: which documents are questions, and what a run's metrics say of them."""

from __future__ import annotations

import json

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.diagnostics.sweep_table import read_sweep, runs, summary, with_run, write_sweep
from bora_pyro.predict.multiple_choice import Question, choose
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.questions import questions_of
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.saved import load_run
from tests.tiny_base import line, quick_fit

OPTIONS = [" red", " one two", " north"]


def table(tasks=("Ada", "Børge B."), *, number=10):
    """Prompts whose right option differs between tasks; the options of every other row are JSON text, as in a .csv file."""
    return [
        {
            "task": task, "split": ("train", "train", "validation", "test", "test")[n % 5], "prompt": f"{n % 4} is",
            "completion": OPTIONS[(n + d) % 3], "options": OPTIONS if n % 2 else json.dumps(OPTIONS),
        }
        for d, task in enumerate(tasks)
        for n in range(number)
    ]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    more = {"data": write(folder / "rows.jsonl", table()), "split_column": "split", "options_column": "options"}
    return quick_fit(folder) | more | {"output_dir": str(folder / "run")}


@pytest.fixture(scope="module")
def metrics(options):
    return run_map_fit(parse_config(MapFitConfig, line(options)), quiet=True)


def test_the_test_documents_are_the_questions(options):
    config = parse_config(MapFitConfig, line(options))
    model, data = build_run(config, quiet=True)
    found = questions_of(config, model.backbone, data)
    rows = [row for row in table() if row["split"] == "test"]
    expected = [Question(row["prompt"], tuple(OPTIONS), OPTIONS.index(row["completion"]), row["task"]) for row in rows]
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_a_limit_of_documents_limits_the_questions(options):
    config = parse_config(MapFitConfig, line(options | {"max_eval_documents": 1}))
    model, data = build_run(config, quiet=True)
    assert sorted(question.task for question in questions_of(config, model.backbone, data)) == ["Ada", "Børge B."]


def test_the_accuracies_are_those_of_the_saved_adapters(options, metrics):
    run = load_run(options["output_dir"])
    rows = [row for row in table() if row["split"] == "test"]
    questions = [Question(row["prompt"], tuple(OPTIONS), OPTIONS.index(row["completion"]), row["task"]) for row in rows]
    for name, weights in (("base_test_accuracy", None), ("test_accuracy", run.fitted.weights()[0])):
        right = choose(run.fitted.model, questions, [weights], run.fitted.tasks).correct
        assert metrics[name] == pytest.approx(right.double().mean().item())
        for task in metrics["tasks"].values():
            own = torch.tensor([question.task == task["name"] for question in questions])
            assert task[name] == pytest.approx(right[own].double().mean().item())
    assert metrics["test_questions"] == len(questions) == 8


def test_a_sweep_table_keeps_the_accuracies(options, metrics, tmp_path):
    rows = rows_of_run(options["output_dir"], tau="100")
    without = rows.drop(columns=[name for name in rows if name.endswith("accuracy")]).assign(tau="10")
    write_sweep(with_run(rows, without), tmp_path / "sweep")
    for ending in ("csv", "parquet"):
        read = read_sweep(tmp_path / f"sweep.{ending}")
        found = runs(read).set_index("tau")
        assert found.test_accuracy["100"] == pytest.approx(metrics["test_accuracy"])
        assert found.test_accuracy.isna()["10"]
        by_task = read[read.tau == "100"].set_index("task").task_test_accuracy
        assert by_task.to_dict() == pytest.approx({task["name"]: task["test_accuracy"] for task in metrics["tasks"].values()})
        header, _, first, second, base = summary(read).splitlines()
        assert [row.split("|")[6].strip() for row in (header, first, second, base)] == [
            "accuracy", "–", f"{metrics['test_accuracy']:.3f}", f"{metrics['base_test_accuracy']:.3f}"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": ["only"]}, "give a list of two or more texts"),
        ({"options": "no JSON"}, "is not JSON"),
        ({"options": [" green", " blue"]}, "lacks the completion"),
    ],
)
def test_options_that_cannot_be_used(options, tmp_path, change, words):
    rows = table()
    rows[7] |= change
    config = parse_config(MapFitConfig, line(options | {"data": write(tmp_path / "rows.jsonl", rows)}))
    model, data = build_run(config, quiet=True)
    with pytest.raises(InputError, match=words) as error:
        questions_of(config, model.backbone, data)
    assert "line 8: column 'options'" in str(error.value)


def test_documents_without_prompts_have_no_options(options, tmp_path):
    rows = [{"task": row["task"], "split": row["split"], "text": row["completion"], "options": OPTIONS} for row in table()]
    config = parse_config(MapFitConfig, line(options | {"data": write(tmp_path / "rows.jsonl", rows)}))
    model, data = build_run(config, quiet=True)
    with pytest.raises(InputError, match="are no prompts with completions"):
        questions_of(config, model.backbone, data)


def test_a_question_longer_than_the_context_is_refused_before_the_fit(options, tmp_path):
    rows = table()
    rows[8] |= {"options": [rows[8]["completion"], " north" * 40]}
    changed = options | {"data": write(tmp_path / "rows.jsonl", rows), "output_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match="the base model reads 32 at most"):
        run_map_fit(parse_config(MapFitConfig, line(changed)), quiet=True)
    assert not (tmp_path / "run").exists()
