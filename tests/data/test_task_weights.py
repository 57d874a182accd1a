"""Weights of tasks: where they come from, and that a weight of 2 is every document of the task twice."""

from __future__ import annotations

import json

import pytest
import torch
from pyro import poutine

from bora_pyro import CausalLM, HierarchicalNormal, fit
from bora_pyro.data import TaskData, TokenSplit, load_tasks, table
from bora_pyro.data.task_weights import task_weights
from bora_pyro.errors import InputError
from bora_pyro.files import safe_yaml as yaml_file
from bora_pyro.guides.curvature import diagonal_fisher, kronecker_fisher
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.steps import EpochSteps
from tests.data_fixtures import table_rows, word_tokenizer
from tests.tiny import random_weights, tiny_bora, tiny_split
from tests.tiny_base import toy_data, toy_model

COUNTS = (3, 1, 4)
WEIGHTS = torch.tensor([2.0, 1.0, 3.0])


def repeated(split):
    """Every document as often as its task weighs."""
    return split.subset(torch.arange(len(split)).repeat_interleave(WEIGHTS[split.task].long()))


def log_likelihood(model, batch, weights):
    trace = poutine.trace(model.likelihood).get_trace(model, weights, batch)
    trace.compute_log_prob()
    return trace.nodes["tokens"]["log_prob_sum"]


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_a_weight_of_two_is_every_document_twice(unit):
    split = tiny_split(COUNTS)
    plain, weighted = tiny_bora(likelihood=CausalLM(unit)), tiny_bora(likelihood=CausalLM(unit, task_weights=WEIGHTS))
    weights = random_weights(plain)
    [batch], [twice] = split.batches(token_budget=10_000), repeated(split).batches(token_budget=10_000)
    torch.testing.assert_close(log_likelihood(weighted, batch, weights), log_likelihood(plain, twice, weights))


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_mini_batches_are_unbiased_for_the_weighted_documents(unit):
    model, split = tiny_bora(likelihood=CausalLM(unit, task_weights=WEIGHTS)), tiny_split(COUNTS, seed=3)
    weights = random_weights(model)
    [everything] = split.batches(token_budget=10_000)
    expected = log_likelihood(model, everything, weights)
    batches = list(split.batches(token_budget=16, seed=0))
    assert len({len(batch.task) for batch in batches}) > 1
    torch.testing.assert_close(torch.stack([log_likelihood(model, batch, weights) for batch in batches]).mean(), expected)
    # where tasks are drawn, too, and steps have several batches
    steps = EpochSteps(split, token_budget=16, accumulate=2, seed=0, partition=[torch.tensor([0, 2]), torch.tensor([1])])
    sums = []
    for step in steps:
        total = torch.zeros(())
        for batch in step:
            rows = {name: value[batch.tasks.index] for name, value in weights.items()}
            total = total + batch.share * log_likelihood(model, batch, rows)
        sums.append(total)
    torch.testing.assert_close(torch.stack(sums).mean(), expected)


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_the_fisher_information_counts_them_as_often(unit):
    split = tiny_split(COUNTS)
    plain, weighted = tiny_bora(likelihood=CausalLM(unit)), tiny_bora(likelihood=CausalLM(unit, task_weights=WEIGHTS))
    theta = random_weights(plain)
    for information in (diagonal_fisher, kronecker_fisher):
        expected, found = information(plain, theta, repeated(split)), information(weighted, theta, split)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("task_subsampling", [False, True])
def test_a_fit_is_that_of_the_repeated_documents(unit, task_subsampling):
    data = toy_data((4, 3, 5))
    again = TaskData(data.tasks, repeated(data.train), data.validation, data.test)
    options = {
        "epochs": 4, "learning_rate": 0.02, "token_budget": 10_000, "patience": 0, "task_subsampling": task_subsampling,
    }  # fmt: skip
    prior = HierarchicalNormal(5.0)
    one = fit(toy_model(prior=prior, likelihood=CausalLM(unit, task_weights=WEIGHTS)), data, **options)
    other = fit(toy_model(prior=prior, likelihood=CausalLM(unit)), again, **options)
    plain = fit(toy_model(prior=prior, likelihood=CausalLM(unit)), data, **options)
    for name, value in other.sites().items():
        torch.testing.assert_close(one.sites()[name], value, rtol=1e-3, atol=1e-5)
    assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=1e-4)
    assert any(not torch.allclose(plain.sites()[name], value, rtol=1e-2) for name, value in other.sites().items())


def test_perplexities_are_not_weighted():
    split = tiny_split(COUNTS)
    plain, weighted = tiny_bora(), tiny_bora(likelihood=CausalLM(task_weights=WEIGHTS))
    assert evaluate(weighted, split, None)[0].perplexity() == evaluate(plain, split, None)[0].perplexity()


def test_weights_of_no_use_are_refused_and_others_shown():
    assert repr(CausalLM(task_weights=WEIGHTS)) == "CausalLM(unit='tokens', task_weights=1 to 3)"
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"task_weights are .*; give finite numbers above 0"):
            CausalLM(task_weights=torch.tensor([1.0, bad]))


FILES = {
    "w.csv": "task,weight\nAda,2\nBo,0.5\n",
    "w.tsv": "weight\ttask\n2\tAda\n0.5\tBo\n",
    "w.yaml": "Ada: 2\nBo: 0.5\n",
    "w.json": json.dumps({"Ada": 2, "Bo": 0.5}),
    "w.jsonl": '{"task": "Ada", "weight": 2}\n{"task": "Bo", "weight": 0.5}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_gives_the_same_weights(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    for given in (tmp_path / name, str(tmp_path / name), {"Ada": 2.0, "Bo": 0.5}):
        assert task_weights(given, ["Ada", "Bo", "Cleo"]).tolist() == [2.0, 0.5, 1.0]


@pytest.mark.parametrize("name", ["w.yaml", "w.json"])
def test_names_of_tasks_are_read_as_they_are_written(tmp_path, name):
    tasks = ["010", "8", "no", "1e3", "null", "2020-01-01", "1:30"]
    weights = {task: float(n) for n, task in enumerate(tasks, start=2)}
    text = json.dumps(weights) if name == "w.json" else "".join(f"{task}: {weight}\n" for task, weight in weights.items())
    (tmp_path / name).write_text(text.replace("null", '"null"') if name == "w.yaml" else text)
    assert task_weights(tmp_path / name, tasks).tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    (tmp_path / name).write_text('{"010": 5}' if name == "w.json" else "010: 5\n")
    assert task_weights(tmp_path / name, ["8", "010"]).tolist() == [1.0, 5.0]


def test_weights_of_more_tasks_than_a_configuration_has_room_for(tmp_path):
    tasks = [f"customer {n:06}" for n in range(8000)]
    file = tmp_path / "w.yaml"
    file.write_text("".join(f"{task}: 2\n" for task in tasks))
    assert file.stat().st_size > yaml_file.MAX_BYTES
    assert task_weights(file, [*tasks, "x"]).tolist() == [2.0] * 8000 + [1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.csv", "task,wait\nAda,2\n", r"has no column 'weight'; give columns task and weight; did you mean 'wait'"),
        ("w.csv", "task,weight\nAda,2\nAda,3\n", "has the task 'Ada' twice; give each once"),
        ("w.csv", "task,weight\nAda,much\n", "the weight of task 'Ada' is 'much'; give a finite number above 0"),
        ("w.jsonl", '{"task": 8, "weight": 2}\n{"task": "8", "weight": 3}\n', "has the task '8' twice; give each once"),
        ("w.yaml", "Ada: 0\n", "the weight of task 'Ada' is '0'; give a finite number above 0"),
        ("w.yaml", "Ada: true\n", "the weight of task 'Ada' is 'true'; give a finite number above 0"),
        ("w.yaml", "Ada: 2\nBo: 1\nAda: 3\n", "w.yaml', line 3: 'Ada' is given twice, first in line 1"),
        ("w.yaml", "Ada: &a 2\nBo: *a\n", "line 1: the anchor 'a' is not supported; write the value in its place"),
        ("w.yaml", "Ada: [2]\n", r"the weight of task 'Ada' is \['2'\]; give a finite number above 0"),
        ("w.yaml", "# nothing yet\n", "holds no weights; give one `task: weight` a line, or leave it out"),
        ("w.yaml", "Adda: 2\n", "there is no task 'Adda' in the data; did you mean 'Ada'"),
        ("w.yaml", "- Ada\n", "holds a list; give a mapping, one `key: value` a line"),
        ("w.json", "{", "cannot be read"),
        ("w.json", '{"Ada": 2, "Ada": 3}', r"cannot be read \(ValueError: 'Ada' is given twice\)"),
        ("w.json", '{"Ada": true}', "the weight of task 'Ada' is True; give a finite number above 0"),
        ("w.json", f'{{"Ada": 1{"0" * 400}}}', r"the weight of task 'Ada' is 10000+\.\.\.; give a finite number above 0"),
        ("w.json", "[" * 100_000, "cannot be read"),
        ("w.yaml", None, "cannot be read .*; give a .csv, .yaml or .json file"),
        ("w.csv", None, "cannot be read"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        task_weights(tmp_path / name, ["Ada", "Bo"])
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/zero.csv"])
def test_a_file_that_never_ends_is_not_read(path):
    with pytest.raises(InputError, match=f"task_weights '{path}' cannot be read"):
        task_weights(path, ["Ada"])


def test_weights_of_tasks_that_a_fit_leaves_out_do_no_harm():
    rows = table_rows("abc") + table_rows("z", groups=1)
    options = {"group_column": "group", "small_tasks": "drop"}
    data = load_tasks(table(rows), word_tokenizer(), **options, num_tasks=2, task_weights={"b": 2, "c": 3, "z": 4})
    assert data.task_weights.tolist() == [1.0, 2.0]
    assert load_tasks(table(rows), word_tokenizer(), **options).task_weights is None
    with pytest.raises(InputError, match="there is no task 'y' in the data"):
        load_tasks(table(rows), word_tokenizer(), **options, task_weights={"y": 2})


def test_a_split_s_documents_can_be_repeated():
    split = TokenSplit.from_documents([[0, 5], [0, 6, 7]], task=[0, 2], num_tasks=3)
    assert [repeated(split).document(n).tolist() for n in range(5)] == [[0, 5]] * 2 + [[0, 6, 7]] * 3
