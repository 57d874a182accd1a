from __future__ import annotations

import json
import logging
import warnings

import datasets
import pytest

from bora_pyro.data import ByRecord, load_tasks, table
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from tests.data_fixtures import END, START, UNKNOWN, WORDS, SlowWords, table_rows, word_tokenizer

RED, GREEN, BLUE = 3, 4, 5


def encode(texts, tokenizer, **options):
    result = tokenise(table([{"task": "a", "text": text} for text in texts]), tokenizer, task_index={"a": 0}, **options)
    return [result.split.document(n).tolist() for n in range(len(result.split))], result


def load(rows, **options):
    return load_tasks(table(rows), word_tokenizer(), **{"group_column": "group", **options})


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_start_and_end_stand_once_whatever_the_tokenizer_adds(template):
    documents, _ = encode(["red green"], word_tokenizer(template=template))
    assert documents == [[START, RED, GREEN, END]]


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"bos": False}, [END, RED, GREEN, END]), ({"eos": False}, [START, RED, GREEN]), ({}, [START, RED, GREEN, END])],
)
def test_tokenizer_without_bos_or_eos(special, expected):
    assert encode(["red green"], word_tokenizer(**special))[0] == [expected]


def test_tokenizer_without_both_is_refused():
    with pytest.raises(InputError, match=r"neither a bos nor an eos token.*set tokenizer\.bos_token"):
        encode(["red"], word_tokenizer(bos=False, eos=False))


@pytest.mark.parametrize("template", [None, "<s> $A </s>"])
def test_long_documents_are_cut_and_have_no_end(template):
    texts = ["red green blue", "red green", "  red   green blue one two three"]
    documents, result = encode(texts, word_tokenizer(template=template), max_tokens=4)
    assert documents == [[START, RED, GREEN, BLUE], [START, RED, GREEN, END], [START, RED, GREEN, BLUE]]
    assert result.num_cut == 2
    # The whole text where it is whole; up to the last token that is kept where it is cut.
    assert result.split.characters.tolist() == [len("red green blue"), len("red green"), len("  red   green blue")]


def test_tokenizer_without_offsets_counts_decoded_characters():
    documents, result = encode(["red green", "red green blue one"], SlowWords(), max_tokens=4)
    assert documents == [[START, RED, GREEN, END], [START, RED, GREEN, BLUE]]
    assert result.split.characters.tolist() == [len("red green"), len("red green blue")]


def test_documents_without_tokens_are_dropped():
    tokenizer = word_tokenizer()
    documents, result = encode(["red", "<s>", "</s>", "<s> </s>"], tokenizer)
    assert documents[0] == [START, RED, END]
    assert result.num_dropped == 3


def test_padding_uses_the_pad_token_where_there_is_one():
    tokenizer = word_tokenizer()
    assert encode(["red"], tokenizer)[1].split.pad_token_id == 0
    tokenizer.pad_token = "?"
    assert encode(["red"], tokenizer)[1].split.pad_token_id == UNKNOWN


def test_nothing_is_logged_and_progress_bars_stay_as_they_were(caplog, capfd):
    before = datasets.are_progress_bars_disabled()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        encode(["red " * 50], word_tokenizer(), max_tokens=256)  # longer than the model_max_length of 5
    assert caplog.records == []
    assert "Map" not in capfd.readouterr().err
    assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize("max_tokens", [1, 0, 2.5, True])
def test_bad_max_tokens(max_tokens):
    with pytest.raises(InputError, match=r"max_tokens is .*; give a whole number of 2 or more"):
        encode(["red"], word_tokenizer(), max_tokens=max_tokens)


def test_tasks_are_sorted_and_indexed():
    data = load(table_rows("cab"))
    assert data.tasks == ["a", "b", "c"]
    assert data.num_tasks == 3
    assert data.train.documents_per_task == [6, 6, 6]
    assert data.validation.documents_per_task == data.test.documents_per_task == [2, 2, 2]
    assert data.notes == []
    assert repr(data) == "TaskData(3 tasks: 'a', 'b', 'c'; documents: 18 train, 6 validation, 6 test)"


def test_cut_documents_are_noted():
    rows = table_rows("ab")
    long = sum(len(row["text"].split()) + 2 > 4 for row in rows)
    assert load(rows, max_tokens=4).notes == [f"{long} of 20 documents are longer than 4 tokens and were cut"]


def test_first_tasks_by_name():
    data = load(table_rows("dcba"), num_tasks=2)
    assert data.tasks == ["a", "b"]
    assert set(data.split_record["tasks"]) == {"a", "b"}


def test_small_tasks_are_dropped_before_the_first_are_taken():
    rows = table_rows("a", groups=1) + table_rows("bcd")
    assert load(rows, num_tasks=2, small_tasks="drop").tasks == ["b", "c"]
    # A small task that is not among the first does no harm.
    assert load(table_rows("ab") + table_rows("z", groups=1), num_tasks=2).tasks == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 4}, "num_tasks is 4; the data has 3 tasks, give 2 to 3"),
        ({"num_tasks": 1}, "num_tasks is 1; the data has 3 tasks, give 2 to 3"),
        ({"max_train_documents": 0}, "max_train_documents is 0; give a whole number from 1 up"),
        ({"max_eval_documents": -1}, "max_eval_documents is -1; give a whole number from 1 up"),
        ({"text_column": "txt"}, "no column 'txt'"),
    ],
)
def test_bad_argument_gives_one_line(options, message):
    with pytest.raises(InputError, match=message):
        load(table_rows("abc"), **options)


def documents(split):
    return {(*split.document(n).tolist(), int(split.task[n])) for n in range(len(split))}


def distinct_rows(groups):
    """Texts that stay distinct as tokens, so that sets of documents can be compared."""
    return [
        {"task": task, "text": f"{task} {WORDS[g // 6]} {WORDS[g % 6]}", "group": f"{task} {g}"}
        for task in "ab"
        for g in range(groups)
    ]


def test_learning_curve_is_nested_and_leaves_evaluation_alone():
    rows = distinct_rows(12)
    whole, three, one = load(rows), load(rows, max_train_documents=3), load(rows, max_train_documents=1)
    assert one.train.documents_per_task == [1, 1]
    assert three.train.documents_per_task == [3, 3]
    assert documents(one.train) < documents(three.train) < documents(whole.train)
    assert documents(one.test) == documents(whole.test)
    assert documents(one.validation) == documents(whole.validation)
    assert one.split_record == whole.split_record


def test_evaluation_documents_are_limited():
    data = load(table_rows("ab", groups=10), max_eval_documents=1)
    assert data.validation.documents_per_task == data.test.documents_per_task == [1, 1]
    assert data.train.documents_per_task == [12, 12]


def test_split_record_reproduces():
    rows = distinct_rows(12)
    first = load(rows, seed=1)
    again = load(rows, seed=2, split=ByRecord(json.loads(json.dumps(first.split_record))))
    assert again.split_record == first.split_record
    assert all(documents(getattr(again, name)) == documents(getattr(first, name)) for name in ("train", "validation", "test"))
    fewer = load(rows + table_rows("c"), split=ByRecord(first.split_record))
    assert fewer.tasks == ["a", "b"]
    assert fewer.notes == ["1 task that the split record does not have was left out"]


def test_record_of_fewer_tasks():
    first = load(table_rows("abc"))
    assert load(table_rows("abc"), split=ByRecord(first.split_record), num_tasks=2).tasks == ["a", "b"]


def test_ready_split():
    sides = {"3": "validation", "4": "test"}
    rows = [{**row, "split": sides.get(row["group"][-1], "train")} for row in table_rows("ab")]
    data = load(rows, split_column="split")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 4, 4]
    assert data.split_record["tasks"]["a"]["a speech 4"] == "test"


def test_ready_split_without_training_documents_is_refused():
    with pytest.raises(InputError, match=r"the given split has 20 test documents and none to train on; .*hub_split"):
        load([{**row, "split": "test"} for row in table_rows("ab")], split_column="split")


def test_empty_evaluation_splits():
    data = load(table_rows("ab"), fractions=(1, 0, 0))
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 0, 0)
    assert data.notes == ["2 tasks have no validation and no test documents: 'a', 'b'"]


class CountingTokenizer:
    """Passes everything on to a tokenizer, and counts how often it is asked to read texts."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "bora_pyro"


def test_the_same_texts_are_tokenised_once(cache):
    first, second = CountingTokenizer(word_tokenizer()), CountingTokenizer(word_tokenizer())
    documents, _ = encode(["red green", "blue"], first)
    assert first.calls == 1
    assert encode(["red green", "blue"], second)[0] == documents
    assert second.calls == 0
    assert len(list(cache.glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    ("texts", "options", "tokenizer"),
    [
        (["red greenblue", ""], {}, {}),  # the same letters, other documents
        (["red green", "blue"], {"max_tokens": 3}, {}),
        (["red green", "blue"], {}, {"eos": False}),
        (["red green", "blue"], {}, {"template": "<s> $A"}),
    ],
)
def test_other_texts_limits_or_tokenizers_are_tokenised_anew(cache, texts, options, tokenizer):
    encode(["red green", "blue"], word_tokenizer())
    counting = CountingTokenizer(word_tokenizer(**tokenizer))
    encode(texts, counting, **options)
    assert counting.calls == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert encode(["red green"], word_tokenizer())[0] == [[START, RED, GREEN, END]]
