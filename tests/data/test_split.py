from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest

from bora_pyro.data.split import apply_split, record_of_column, split_by_group
from bora_pyro.data.splitters import AllTrain, ByColumn
from bora_pyro.data.tables import read_table
from bora_pyro.data.tasks import load_tasks
from bora_pyro.errors import InputError
from tests.data_fixtures import PRESIDENTS, table_rows, word_tokenizer

SPLITS = ("train", "validation", "test")


def split(rows, **options):
    return split_by_group(datasets.Dataset.from_list(rows), **options)


def texts(parts):
    return {name: part["text"][:] for name, part in parts.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_separated_and_no_document_lost(seed):
    rows = table_rows(groups=7, documents=3)
    parts, _, _ = split(rows, seed=seed)
    sides = {name: set(zip(part["task"][:], part["group"][:], strict=True)) for name, part in parts.items()}
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["validation"]
    assert not sides["test"] & sides["validation"]
    assert sorted(text for part in texts(parts).values() for text in part) == sorted(row["text"] for row in rows)


def test_every_task_draws_its_own_split():
    _, record, _ = split(table_rows("abcdefgh"))
    assert len({json.dumps([*groups.values()]) for groups in record["tasks"].values()}) > 1


@pytest.mark.parametrize(
    ("fractions", "counts"), [((0.6, 0.2, 0.2), (6, 2, 2)), ((0.5, 0, 0.5), (5, 0, 5)), ((1, 0, 0), (10, 0, 0))]
)
def test_fractions_are_met_where_groups_are_equal(fractions, counts):
    parts, _, _ = split(table_rows("ab", groups=10, documents=1), fractions=fractions)
    assert tuple(Counter(parts[name]["task"][:])["a"] for name in SPLITS) == counts


def test_split_is_seeded():
    rows = table_rows(groups=20)
    assert texts(split(rows, seed=3)[0]) == texts(split(rows, seed=3)[0])
    assert texts(split(rows, seed=3)[0]) != texts(split(rows, seed=4)[0])


def test_split_of_a_task_depends_on_nothing_else():
    _, alone, _ = split(table_rows("bc", groups=20))
    _, with_more, _ = split(table_rows("abcd", groups=20)[::-1])
    assert {task: with_more["tasks"][task] for task in "bc"} == alone["tasks"]


def test_record_reproduces_the_split():
    rows = table_rows(groups=9)
    parts, record, _ = split(rows, seed=5, fractions=(0.5, 0.25, 0.25))
    assert (record["seed"], record["fractions"]) == (5, [0.5, 0.25, 0.25])
    again = apply_split(datasets.Dataset.from_list(rows), json.loads(json.dumps(record)))
    assert texts(again) == texts(parts)


def test_record_leaves_out_unknown_tasks():
    _, record, _ = split(table_rows("ab"))
    parts = apply_split(datasets.Dataset.from_list(table_rows("abc")), record)
    assert set(parts["train"]["task"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("rows", "record", "message"),
    [
        (
            table_rows("ab", groups=6),
            None,
            r"group 'a speech 5' of task 'a' is not in the split record; use the table that was split",
        ),
        (table_rows("ab", groups=4), None, r"1 of 5 groups of task 'a' in the split record are not in the table"),
        (table_rows("a"), None, r"5 of 5 groups of task 'b'"),
        (table_rows("ab"), {}, r"no entry 'tasks'"),
        (table_rows("ab", groups=1), {"tasks": {"a": {"a speech 0": "trian"}}}, r"is in split 'trian' of the split record"),
    ],
)
def test_record_of_another_table_is_refused(rows, record, message):
    record = split(table_rows("ab"))[1] if record is None else record
    with pytest.raises(InputError, match=message):
        apply_split(datasets.Dataset.from_list(rows), record)


@pytest.mark.parametrize(
    ("groups", "sides", "notes"),
    [
        (3, set(SPLITS), []),
        (2, {"train", "test"}, ["1 task has no validation documents (too few groups to split): 'a'"]),
        (1, {"train"}, ["1 task has no validation and no test documents (too few groups to split): 'a'"]),
    ],
)
def test_task_with_few_groups_trains_first(groups, sides, notes):
    _, record, lines = split(table_rows("a", groups=groups, documents=3) + table_rows("b"))
    assert set(record["tasks"]["a"].values()) == sides
    assert lines == notes


def test_few_groups_are_said_of_a_split_that_was_made():
    rows = [{"task": task, "text": f"{task} {n}", "side": side} for task in "ab" for n, side in enumerate(["train", "test"])]
    line = "2 tasks have no validation documents: 'a', 'b'"
    for split in (ByColumn(), ByColumn(new_tasks=True)):
        data = load_tasks(datasets.Dataset.from_list(rows), word_tokenizer(), split_column="side", split=split)
        assert data.notes == [line]
    # new tasks of which no split was asked for
    assert load_tasks(datasets.Dataset.from_list(rows), word_tokenizer(), split=AllTrain()).notes == []


def test_small_tasks():
    rows = table_rows("ab") + table_rows("cd", groups=2, documents=1)
    with pytest.raises(
        InputError, match=r"task 'c' has 2 documents, fewer than 3 \(and so has 1 other task\); .*small_tasks=drop"
    ):
        split(rows)
    parts, record, notes = split(rows, small_tasks="drop")
    assert set(record["tasks"]) == {"a", "b"}
    assert notes == ["2 tasks with fewer than 3 documents left out: 'c', 'd'"]
    assert sum(map(len, parts.values())) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.5, 0.5)}, r"fractions are \(0\.5, 0\.5\); give three shares"),
        ({"fractions": (0.5, 0.2, 0.2)}, r"sum to 1"),
        ({"fractions": (0, 0.5, 0.5)}, r"train above 0"),
        ({"fractions": (1.5, -0.5, 0)}, r"not negative"),
        ({"seed": -1}, r"seed is -1; give a whole number"),
        ({"seed": 0.5}, r"seed is 0\.5; give a whole number"),
        ({"small_tasks": "dropp"}, r"small_tasks is 'dropp'; use 'error' or 'drop'; did you mean 'drop'\?"),
    ],
)
def test_bad_argument_gives_one_line(options, message):
    with pytest.raises(InputError, match=message):
        split(table_rows(), **options)


def test_one_task_is_refused():
    with pytest.raises(InputError, match=r"has 1 task, 'a'; BoRA shares between tasks and needs two or more.*peft"):
        split(table_rows("a"))


def test_texts_on_two_sides_are_counted_and_kept():
    rows = [{**row, "text": "Thank you."} if row["group"][2:] != "speech 0" else row for row in table_rows("ab")]
    parts, _, notes = split(rows)
    assert notes == ["1 text stands in more than one split (kept)"]
    assert sum(map(len, parts.values())) == len(rows)


def test_record_of_a_ready_split():
    rows = [{**row, "split": "test" if row["group"][2:] == "speech 1" else "train"} for row in table_rows("ab")]
    record = record_of_column(datasets.Dataset.from_list(rows))
    assert record["tasks"]["b"]["b speech 1"] == "test"
    rows[3]["split"] = "train"
    with pytest.raises(
        InputError, match=r"group 'a speech 1' of task 'a' is in test and in train; put the whole group on one side"
    ):
        record_of_column(datasets.Dataset.from_list(rows))


@pytest.mark.skipif(not PRESIDENTS.exists(), reason="the shared corpus is not here")
def test_presidents_keep_all_tasks():
    parts, record, notes = split_by_group(read_table(PRESIDENTS)[0])
    assert len(record["tasks"]) == 25
    assert set(record["tasks"]["William McKinley"].values()) == {"train"}
    assert sum("'William McKinley'" in note for note in notes) == 1
    assert len(set(parts["train"]["task"])) == 25
