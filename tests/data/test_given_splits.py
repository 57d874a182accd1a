"""Splits that the data has are used; what they lack is cut from train, and test documents never train."""

from __future__ import annotations

import json
import re
from collections import Counter

import datasets
import pandas as pd
import pytest

from bora_pyro.data import AsGiven, ByColumn, ByRecord, ForNewTasks, load_tasks, table
from bora_pyro.data.counts import Counts
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError, shown
from tests.data_fixtures import WORDS, word_tokenizer

NAMES = {"train": "training", "validation": "dev", "test": "Test"}


def part(side, *, tasks="ab", number=10):
    return [
        {"task": task, "text": f"{side} {task} {n} {WORDS[n % 6]}", "doc_id": f"{side} {task} {n}"}
        for task in tasks
        for n in range(number)
    ]


def source(form, sides, **options):
    rows = {side: part(side, **options) for side in sides}
    if form == "column":
        return table([row | {"side": NAMES[side]} for side, found in rows.items() for row in found]), {"split_column": "side"}
    return datasets.DatasetDict({NAMES[side]: datasets.Dataset.from_list(found) for side, found in rows.items()}), {}


def load(data, **options):
    return load_tasks(data, word_tokenizer(), **options)


def sides_of(data):
    """The sides of the given split that each side of the split has documents of."""
    found = {name: Counter() for name in SPLITS}
    for groups in data.split_record["tasks"].values():
        for group, side in groups.items():
            found[side][group.split()[0]] += 1
    return {name: dict(counts) for name, counts in found.items()}


@pytest.mark.parametrize("form", ["column", "splits"])
@pytest.mark.parametrize(
    ("sides", "expected", "note"),
    [
        (
            SPLITS,
            {"train": {"train": 20}, "validation": {"validation": 20}, "test": {"test": 20}},
            "the split of the data is used: 20 train, 20 validation and 20 test documents",
        ),
        (
            ("train", "test"),
            {"train": {"train": 14}, "validation": {"train": 6}, "test": {"test": 20}},
            "the given split has train and test; 6 for validation were cut from train by group",
        ),
        (
            ("train", "validation"),
            {"train": {"train": 14}, "validation": {"validation": 20}, "test": {"train": 6}},
            "the given split has train and validation; 6 for test were cut from train by group",
        ),
    ],
)
def test_what_is_given_is_used_and_what_is_missing_is_cut_from_train(form, sides, expected, note):
    data, options = source(form, sides)
    found = load(data, **options)
    assert sides_of(found) == expected
    assert found.notes == ([] if form == "column" and sides == SPLITS else [note])
    assert found.counts.documents == {name: sum(counts.values()) for name, counts in expected.items()}
    again = load(data, split=ByRecord(json.loads(json.dumps(found.split_record))), **options)
    assert (again.digest, again.notes, again.split_record) == (found.digest, found.notes, found.split_record)
    # the seed moves what was cut, and nothing else
    other = load(data, seed=1, **options)
    assert sides_of(other) == expected
    assert (other.split_record["tasks"] == found.split_record["tasks"]) == (sides == SPLITS)


@pytest.mark.parametrize("form", ["column", "splits"])
def test_train_alone_is_split_as_a_table_without_splits(form):
    data, options = source(form, ["train"])
    found, plain = load(data, **options), load(table(part("train")))
    assert (found.digest, found.split_record["tasks"]) == (plain.digest, plain.split_record["tasks"])
    note = "the given split has train alone; validation and test were cut from it by group"
    assert found.notes == [note if form == "column" else "the Dataset has the split 'training' alone"]


@pytest.mark.parametrize("form", ["column", "splits"])
@pytest.mark.parametrize("sides", [["test"], ["validation", "test"]])
def test_no_side_but_train_ever_trains(form, sides):
    data, options = source(form, sides)
    with pytest.raises(InputError, match=r"^the given split has .*20 test documents and none to train on; .*hub_split"):
        load(data, **options)


def test_one_split_alone_is_split_by_group():
    data, _ = source("splits", SPLITS)
    found = load(data, hub_split="Test")
    assert sides_of(found) == {"train": {"test": 12}, "validation": {"test": 4}, "test": {"test": 4}}
    assert found.digest == load(table(part("test"))).digest


def test_a_folder_of_files_named_after_their_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for side, name in (("train", "train"), ("validation", "validation"), ("test", "test")):
        pd.DataFrame(part(side)).to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    found = load(folder)
    assert sides_of(found) == {name: {name: 20} for name in SPLITS}
    assert found.notes == ["the split of the data is used: 20 train, 20 validation and 20 test documents"]
    assert load(folder, streaming=True).digest == found.digest


def test_a_share_of_zero_is_not_cut():
    data, options = source("column", ["train", "test"])
    assert len(load(data, split=AsGiven(fractions=(0.8, 0, 0.2)), **options).validation) == 0
    assert len(load(data, split=ByColumn(), **options).validation) == 0


@pytest.mark.parametrize("form", ["column", "splits"])
def test_a_group_on_two_sides_of_a_given_split_is_one_line(form):
    rows = {side: [row | {"chapter": f"{'xy'[n % 2]}{side}"} for n, row in enumerate(part(side))] for side in SPLITS}
    rows["train"][2]["chapter"] = rows["test"][15]["chapter"] = "c" * 3000  # of tasks a and b
    options = {"group_column": "chapter"}
    if form == "column":
        data = table([row | {"side": side} for side, found in rows.items() for row in found])
        options["split_column"] = "side"
    else:
        data = datasets.DatasetDict({side: datasets.Dataset.from_list(found) for side, found in rows.items()})
    with pytest.raises(
        InputError, match=r"is in train \(task 'a'\) and in test \(task 'b'\); put the whole group on one"
    ) as error:
        load(data, **options)
    assert len(str(error.value)) < 300


def test_a_doc_id_that_nobody_named_may_mean_another_document_in_another_task():
    rows = [row | {"doc_id": str(n)} for side in SPLITS for n, row in enumerate(part(side, tasks="a"))]
    rows += [row | {"doc_id": str(n + 5)} for n, row in enumerate(part("train", tasks="b"))]
    rows = [row | {"doc_id": f"{row['doc_id']} {row['text'].split()[0]}"} for row in rows]
    rows[-1]["doc_id"] = rows[-20]["doc_id"]
    rows = [row | {"side": row["text"].split()[0]} for row in rows]
    found = load(table(rows), split_column="side")
    assert [note for note in found.notes if "doc_id" in note] == [
        "1 value of doc_id is in several tasks, on different sides of the given split (kept; group_column doc_id would refuse it)"
    ]
    with pytest.raises(InputError, match=r"is in .* \(task 'a'\) and in train \(task 'b'\)"):
        load(table(rows), split_column="side", group_column="doc_id")


# Tasks of which nothing is left to train on


def test_a_task_that_never_trains_is_refused_or_dropped():
    data = table([*part("train", tasks="ab"), *part("test", tasks="abc")])
    data = data.add_column("side", [row["text"].split()[0] for row in data])
    with pytest.raises(InputError, match=r"^task 'c' has no training document in the given split; .*small_tasks=drop"):
        load(data, split_column="side")
    found = load(data, split_column="side", small_tasks="drop")
    assert found.tasks == ["a", "b"]
    assert "1 task without a training document left out: 'c'" in found.notes
    assert found.counts.left_out == {"of tasks without a training document": 10}


def long_prompts(tasks):
    """Documents whose prompt alone fills 8 tokens."""
    return [{"task": task, "q": "red " * 9, "a": WORDS[n]} for task in tasks for n in range(5)]


def test_a_task_whose_documents_are_all_too_long_is_refused_or_dropped():
    rows = [{"task": task, "q": "red", "a": WORDS[n]} for task in "ab" for n in range(5)] + long_prompts(["c", "d" * 3000])
    options = {"prompt_column": "q", "completion_column": "a", "max_tokens": 8}
    with pytest.raises(InputError) as error:
        load(table(rows), **options)
    assert re.match(
        r"task 'c' has no training document left: none of its 3 training documents has a token to predict within max_tokens 8 "
        r"\(nor has 1 other task\); raise max_tokens, or leave such tasks out with small_tasks=drop",
        str(error.value),
    )
    found = load(table(rows), small_tasks="drop", **options)
    plain = load(table(rows[:10]), **options)
    assert (found.tasks, found.digest, found.split_record) == (plain.tasks, plain.digest, plain.split_record)
    name = shown("d" * 3000)
    note = f"2 tasks of which no training document has a token to predict within 8 left out: 'c', {name}"
    assert note in found.notes
    assert found.counts.left_out == {"of tasks without a training document": 10}
    with pytest.raises(InputError, match=r"^the data has no task left \(2 tasks of which|^no training document is left"):
        load(table(long_prompts("cd")), small_tasks="drop", **options)
    one = rows[:5] + long_prompts("cd")
    with pytest.raises(InputError, match=r"^the data has 1 task, 'a' left \(2 tasks of which no training document .*Give more"):
        load(table(one), small_tasks="drop", **options)


def test_a_new_task_may_have_no_training_document():
    rows = [row | {"side": row["text"].split()[0]} for row in [*part("train", tasks="a"), *part("test", tasks="ab")]]
    found = load(table(rows), split_column="side", split=ForNewTasks())
    assert (found.tasks, found.train.documents_per_task) == (["a", "b"], [10, 0])


def test_new_tasks_take_the_split_of_the_data():
    data, _ = source("splits", ["train", "test"], tasks="a")
    found = load(data, split=ForNewTasks())
    assert sides_of(found) == {"train": {"train": 10}, "validation": {}, "test": {"test": 10}}
    assert "the split of the data is used: 10 train and 10 test documents" in found.notes
    assert sides_of(load(table(part("train", tasks="a")), split=ForNewTasks()))["train"] == {"train": 10}


def test_tasks_with_documents_but_no_token_on_a_side_are_named():
    rows = [
        {"task": task, "q": "red", "a": WORDS[n], "side": side}
        for task in "ab"
        for n, side in enumerate(["train", "train", "dev", "test"])
    ]
    rows[-2]["q"] = "red " * 9
    found = load(table(rows), split_column="side", prompt_column="q", completion_column="a", max_tokens=8)
    assert found.notes == [
        "1 document without a token to predict within 8 was dropped",
        "1 task has validation documents, but no token there to predict: 'b'",
    ]


def test_small_tasks_that_leave_nothing_are_the_cause():
    rows = part("train", tasks="abc", number=2)
    with pytest.raises(
        InputError, match=r"^the data has no task left \(3 tasks with fewer than 3 documents left out: 'a', 'b', 'c'\)"
    ) as error:
        load(table(rows), small_tasks="drop")
    assert "task_column" not in str(error.value)


# Every row is accounted for


def test_every_row_is_a_document_or_left_out_for_a_reason():
    rows = part("train", tasks="abc", number=10) + part("few", tasks="d", number=2)
    rows += [{"task": "a", "text": " "}, {"task": "", "text": "red"}, {"task": "b", "text": ""}]
    found = load(table(rows), small_tasks="drop", num_tasks=2, max_train_documents=4, max_eval_documents=1)
    assert found.counts == Counts(
        rows=35,
        tasks=2,
        documents={"train": 8, "validation": 2, "test": 2},
        tokens={name: getattr(found, name).num_tokens for name in SPLITS},
        left_out={
            "with empty text": 2,
            "with no task": 1,
            "of tasks with too few": 2,
            "of tasks beyond num_tasks": 10,
            "beyond max_train_documents": 4,
            "beyond max_eval_documents": 4,
        },
        columns=("task", "text", "doc_id"),
        used=("task", "text", "doc_id"),
        form="text",
    )
    assert sum(found.counts.documents.values()) + sum(found.counts.left_out.values()) == found.counts.rows
    assert str(found.counts).startswith(
        "35 rows read; 12 documents of 2 tasks: 8 train, 2 validation, 2 test (23 rows left out: 2 with"
    )


# A task's name may be as long as its author likes

LONG = "long " * 520


def one_task(rows):
    return [row | {"task": LONG} for row in rows]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (one_task(part("train", tasks="a")), {}),
        (one_task(part("train", tasks="a", number=2)) + part("train", tasks="bc"), {}),
        (one_task(part("train", tasks="a", number=2)), {"small_tasks": "drop"}),
        (one_task(part("train", tasks="a")) + part("train", tasks="b"), {"task_weights": {"longer " * 400: 1.0}}),
        (one_task(part("train", tasks="a")) + part("train", tasks="b"), {"task_weights": {LONG.strip(): -1.0}}),
        ([row | {"side": "te" + LONG} for row in part("train")], {"split_column": "side"}),
        (
            [row | {"side": "train" if n else "test", "doc_id": LONG} for n, row in enumerate(part("train"))],
            {"split_column": "side"},
        ),
    ],
)
def test_messages_on_long_names_are_short(rows, options):
    with pytest.raises(InputError) as error:
        load(table(rows), **options)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_notes_on_long_names_are_short():
    rows = one_task(part("train", tasks="a", number=2)) + part("train", tasks="bc")
    found = load(table(rows), small_tasks="drop")
    assert found.notes
    assert max(map(len, found.notes)) < 200
    with pytest.raises(InputError) as error:
        load(table(rows), split=ByRecord({"tasks": {LONG + "x": {"1": "train"}, "b": {}}}))
    assert len(str(error.value)) < 500
