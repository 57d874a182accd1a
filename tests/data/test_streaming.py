"""Streaming: the same documents as without it, and no more memory for a larger corpus."""

from __future__ import annotations

import json
import tempfile
import threading

import datasets
import pandas as pd
import psutil
import pytest
import torch

from bora_pyro.data import ByRecord, load_tasks, table
from bora_pyro.data.streaming import TokenFile
from bora_pyro.errors import InputError
from tests.data_fixtures import CHAT, CHAT_TEMPLATE, WORDS, word_tokenizer
from tests.forked import Forked

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path_factory, monkeypatch):
    """Tables that `datasets.load_dataset` reads are cached with the test, not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(number=40):
    """Texts, prompts and chats of three tasks, some without text, some without a task, some twice."""
    found = []
    for n in range(number):
        words = [WORDS[(n * k + k) % 6] for k in range(n % 7 + 1)]
        text = "" if n % 13 == 5 else " ".join(words)
        chat = [] if n % 13 == 5 else [{**message, "content": " ".join(words)} for message in CHAT[: 2 + 2 * (n % 2)]]
        found.append(
            {"task": "" if n % 17 == 3 else "abc"[n % 3], "country": "xy"[n % 2], "text": text, "title": WORDS[n % 6],
             "doc_id": f"doc {n // 2}", "messages": chat}
        )  # fmt: skip
    return found


@pytest.fixture
def folder(tmp_path):
    """A folder of data files as a hub repository holds them, of two kinds of file and two splits."""
    path = tmp_path / "corpus"
    path.mkdir()
    all_rows = rows()
    for name, part in (("train-00000", all_rows[:14]), ("train-00001", all_rows[14:28]), ("test-00000", all_rows[28:])):
        datasets.Dataset.from_list(part).to_parquet(path / f"{name}.parquet")
    return path


def same(one, other):
    assert one.tasks == other.tasks
    assert one.split_record == other.split_record
    assert one.notes == other.notes
    assert one.digest == other.digest
    assert one.counts == other.counts
    for name in SPLITS:
        a, b = getattr(one, name), getattr(other, name)
        assert len(a) == len(b)
        for n in range(len(a)):
            assert a.document(n).tolist() == b.document(n).tolist()
            assert a.labels(n).tolist() == b.labels(n).tolist()
        for field in ("task", "characters", "predicted", "lengths"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        for x, y in zip(a.batches(token_budget=30, seed=1), b.batches(token_budget=30, seed=1), strict=True):
            assert torch.equal(x.labels, y.labels)
            assert torch.equal(x.input_ids, y.input_ids)
            assert torch.equal(x.index, y.index)


@pytest.mark.parametrize("long_documents", ["cut", "split"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text_column": ["title", "text"], "task_column": ["task", "country"]},
        {"prompt_column": "title", "completion_column": "text"},
        {"messages_column": "messages", "chat_template": CHAT_TEMPLATE, "max_tokens": 12},
        {"hub_split": "train"},
        {"num_tasks": 2, "max_train_documents": 3, "max_eval_documents": 1, "seed": 3},
        {"task_weights": {"b": 2.0}, "group_column": "text", "hub_split": "train"},
    ],
    ids=lambda options: " ".join(options),
)
def test_the_documents_are_those_of_the_other_reading(folder, options, long_documents):
    options = {"max_tokens": 6, "long_documents": long_documents, "small_tasks": "drop", **options}
    streamed = load_tasks(folder, word_tokenizer(), streaming=True, **options)
    plain = load_tasks(folder, word_tokenizer(), **options)
    assert len(plain.notes) > 1
    same(streamed, plain)
    # and again by the record, as a run is read back
    record = json.loads(json.dumps(plain.split_record))
    same(load_tasks(folder, word_tokenizer(), streaming=True, split=ByRecord(record), **options), plain)


def test_a_ready_split(tmp_path):
    for name in SPLITS:
        pd.DataFrame([{"task": task, "text": f"{name} {WORDS[n]}"} for task in "ab" for n in range(4)]).to_json(
            tmp_path / f"{name}.jsonl", orient="records", lines=True
        )
    for options in ({}, {"split_column": "split"}):
        plain = load_tasks(tmp_path, word_tokenizer(), **options)
        same(load_tasks(tmp_path, word_tokenizer(), streaming=True, **options), plain)
        assert [len(getattr(plain, name)) for name in SPLITS] == [8, 8, 8]


def test_saved_data_sets_and_those_in_memory(tmp_path):
    data = table([{"task": task, "text": f"{WORDS[n]} {WORDS[-n]}"} for task in "ab" for n in range(6)])
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    both = datasets.DatasetDict({"train": data, "val": data, "test": data})
    for source in (data, tmp_path / "saved", str(tmp_path / "both"), datasets.DatasetDict({"other": data}), both):
        same(load_tasks(source, word_tokenizer(), streaming=True), load_tasks(source, word_tokenizer()))


def test_tokens_lie_in_a_file_and_it_is_gone(folder, monkeypatch):
    made = []
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda make=tempfile.TemporaryFile, **o: made.append(o) or make(**o))
    data = load_tasks(folder, word_tokenizer(), streaming=True, small_tasks="drop")
    cache = datasets.config.HF_DATASETS_CACHE / "bora_pyro"
    assert cache in {options.get("dir") for options in made}
    assert list(cache.iterdir()) == []
    assert data.train.tokens.data_ptr() == data.test.tokens.data_ptr()  # one file for all splits
    assert data.train.tokens.dtype == torch.int32


def test_a_file_of_no_tokens():
    with TokenFile() as tokens:
        pass
    assert (len(tokens.tokens), tokens.observed) == (0, None)


@pytest.mark.parametrize("source", ["speeches.csv", "corpus/"])
def test_a_source_that_is_missing(source):
    with pytest.raises(InputError, match=f"file '{source}' does not exist"):
        load_tasks(source, word_tokenizer(), streaming=True)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz", "t.json", "t.parquet", "t.xlsx", "frame"])
def test_every_source_can_be_streamed(tmp_path, name):
    frame = pd.DataFrame([{"task": task, "text": f"{WORDS[n % 6]} {WORDS[-n % 5]}"} for task in "ab" for n in range(6)])
    path = tmp_path / name
    write = {
        "t.csv": lambda: frame.to_csv(path, index=False),
        "t.jsonl.gz": lambda: frame.to_json(path, orient="records", lines=True),
        "t.json": lambda: frame.to_json(path, orient="records"),
        "t.parquet": lambda: frame.to_parquet(path),
        "t.xlsx": lambda: frame.to_excel(path, index=False),
    }
    write.get(name, lambda: None)()
    source = frame if name == "frame" else path
    same(load_tasks(source, word_tokenizer(), streaming=True), load_tasks(source, word_tokenizer()))


def test_bad_rows_and_files_give_one_line(tmp_path):
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"task": task, "text": "red"}) for task in "ab" * 5]
    for content, message in (
        ([*lines, json.dumps({"task": ["a"], "text": "b"})], r"line 11: column 'task' is a list"),
        ([*lines, '{"task": "a"'], r"line 11: not JSON"),
        ([json.dumps({"speaker": "a", "text": "b"})], r"no column 'task' \(task_column\)"),
        ([json.dumps({"task": "a", "text": ""})], "has no document with a task and a text: 1 document with empty text"),
    ):
        file.write_text("\n".join(content))
        with pytest.raises(InputError, match=message) as caught:
            load_tasks(tmp_path, word_tokenizer(), streaming=True)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def measure(small, large, streaming):
    """Print by how many bytes the process grew while it read the larger corpus, after the smaller one."""
    datasets.disable_progress_bars()
    process = psutil.Process()
    load_tasks(small, word_tokenizer(), streaming=streaming, max_tokens=4096)
    before, peak, done = process.memory_info().rss, [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = load_tasks(large, word_tokenizer(), streaming=streaming, max_tokens=4096)
    done.set()
    watcher.join()
    print(json.dumps({"grown": peak[0] - before, "tokens": sum(getattr(data, name).num_tokens for name in SPLITS)}))


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    words = " ".join(WORDS[n % 6] for n in range(2000))
    for name, number in (("small", 200), ("large", 2000)):
        (tmp_path / name).mkdir()
        part = [{"task": "ab"[n % 2], "text": f"{words} {n}"} for n in range(number)]
        datasets.Dataset.from_list(part).to_parquet(tmp_path / name / "train.parquet", batch_size=50)
    grown = {}
    for streaming in (True, False):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"streaming {streaming}")
        done = Forked(tmp_path / "output", measure, str(tmp_path / "small"), str(tmp_path / "large"), streaming).end()
        assert done.code == 0, done.err
        grown[streaming] = json.loads(done.out)
    tokens = 4 * grown[True]["tokens"]  # bytes
    assert grown[True]["tokens"] == grown[False]["tokens"] > 4_000_000
    assert grown[True]["grown"] < 0.75 * tokens  # the tokens lie in a file: what grew are buffers, by 2 to 9 MB
    assert grown[False]["grown"] > 4 * tokens  # texts and tokens: so it would show
