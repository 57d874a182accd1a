"""Streaming and plain reading agree on everything, whatever the container: rows, tasks, splits, tokens, notes, and refusals."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bora_pyro.data import AsGiven, load_tasks
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError
from tests.data_fixtures import WORDS, word_tokenizer

NAMES = {"train": "train", "validation": "dev", "test": "test"}


@pytest.fixture(scope="module", autouse=True)
def cache_of_the_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
rows = st.fixed_dictionaries(
    {
        "task": st.sampled_from(["a", "b", "c", "007", "NA", " b", ""]),
        "text": st.one_of(texts, st.sampled_from(["", " ", 'red "one", two', "red\none", "æ \u2028 two"])),
        "chapter": st.sampled_from(["", "1", "2", "3", "4", "5", "6", "x" * 80]),
        "side": st.sampled_from(["train", "training", "dev", "Test"]),
    }
)
options = st.fixed_dictionaries(
    {"small_tasks": st.sampled_from(["drop", "error"]), "long_documents": st.sampled_from(["cut", "split"])},
    optional={
        "group_column": st.just("chapter"),
        "num_tasks": st.just(2),
        "max_train_documents": st.just(2),
        "prompt_column": st.just("chapter"),
        "split_column": st.just("side"),
        "seed": st.integers(0, 2),
    },
)


def written(folder, container, rows):
    """The rows in a container; a folder of splits has every third row in dev and every third in test."""
    frame = pd.DataFrame(rows)
    if container == "frame":
        return frame
    if container == "dataset":
        return datasets.Dataset.from_pandas(frame)
    thirds = {side: [*rows[n::3]] for n, side in enumerate(SPLITS)}
    if container == "dict":
        return datasets.DatasetDict({NAMES[side]: datasets.Dataset.from_list(part or rows[:1]) for side, part in thirds.items()})
    place = folder / container
    if container == "saved":
        datasets.Dataset.from_pandas(frame).save_to_disk(place)
    elif container == "folder":
        place.mkdir()
        for side, part in thirds.items():
            (place / f"{NAMES[side]}.jsonl").write_text("\n".join(map(json.dumps, part or rows[:1])))
    elif container.endswith(".jsonl"):
        place.write_text("\n".join(map(json.dumps, rows)))
    elif container.endswith(".json"):
        place.write_text(json.dumps(rows))
    elif container.endswith(".parquet"):
        frame.to_parquet(place)
    else:
        frame.to_csv(place, index=False, sep="\t" if "tsv" in container else ",")
    return place


def read(source, *, streaming, **options):
    """Everything that a fit sees of the documents, or the line that refuses them."""
    if "prompt_column" in options:
        options["completion_column"] = "text"
    try:
        data = load_tasks(source, word_tokenizer(), streaming=streaming, max_tokens=6, **options)
    except InputError as error:
        return str(error)
    documents = []
    for name in SPLITS:
        split = getattr(data, name)
        documents += [(name, int(split.task[n]), split.document(n).tolist(), split.labels(n).tolist()) for n in range(len(split))]
    return data.tasks, data.split_record, data.notes, data.counts, data.digest, documents


CONTAINERS = ["frame", "dataset", "dict", "saved", "folder", "t.csv", "t.tsv.gz", "t.jsonl", "t.json", "t.parquet"]


@pytest.mark.parametrize("container", CONTAINERS)
@given(st.lists(rows, min_size=1, max_size=24), options)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_streaming_and_plain_reading_agree(container, rows, options):
    with tempfile.TemporaryDirectory() as folder:
        source = written(Path(folder), container, rows)
        plain = read(source, streaming=False, **options)
        assert read(source, streaming=True, **options) == plain
        if isinstance(plain, str):
            assert "\n" not in plain
            assert len(plain) < 700
            return
        counts = plain[3]
        assert sum(counts.documents.values()) + sum(counts.left_out.values()) == counts.rows


@given(st.lists(rows, min_size=6, max_size=24), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_only_training_rows_train_and_groups_stay_whole(rows, seed):
    """Every row of the given test side is in test, and none of it in train, with groups that span tasks."""
    frame = pd.DataFrame(rows).assign(text=[f"{row['side'].lower()} {n}" for n, row in enumerate(rows)])
    try:
        data = load_tasks(
            frame, word_tokenizer(), split_column="side", group_column="chapter", small_tasks="drop", split=AsGiven(seed=seed)
        )
    except InputError:
        return
    sides = {}
    for groups in data.split_record["tasks"].values():
        for group, side in groups.items():
            assert sides.setdefault(group, side) == side
    given_sides = {}
    for n, row in enumerate(rows, start=1):
        if row["task"].strip() not in data.tasks:
            continue
        given_sides.setdefault(row["chapter"] or f"row {n}", row["side"].lower())
    for group, side in sides.items():
        assert side == {"test": "test", "dev": "validation"}.get(given_sides[group], side)
        assert given_sides[group].startswith("train") or side != "train"
