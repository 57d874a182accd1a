"""Digests of documents: equal for the same documents wherever they lie, and different for any others."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import TaskData
from bora_pyro.data import TokenSplit, digest
from bora_pyro.data.digest import documents_digest

TASKS = ["ada", "bob"]
DOCUMENTS, OF = [[0, 5, 6, 7], [0, 8], [0, 9, 10], [0, 11, 12]], [0, 1, 1, 0]


def split(documents=DOCUMENTS, task=OF, *, read=None):
    return TokenSplit.from_documents(documents, task=task, num_tasks=2, read=read)


def of(one, tasks=TASKS, weights=None):
    return documents_digest(tasks, [one], weights)


@pytest.mark.parametrize("chunk", [1, 3, 5, 2**20])
def test_the_same_documents_wherever_they_lie(monkeypatch, chunk):
    whole = of(split())
    monkeypatch.setattr(digest, "CHUNK", chunk)
    assert of(split()) == whole
    # others lie between them, and they came in another order
    scattered = [DOCUMENTS[3], [0, 20, 21], DOCUMENTS[0], DOCUMENTS[2], [0, 22], DOCUMENTS[1]]
    apart = split(scattered, [0, 1, 0, 1, 0, 1]).subset(torch.tensor([2, 5, 3, 0]))
    assert apart.offsets.tolist() != split().offsets.tolist()
    assert of(apart) == whole
    # all but the first are predicted, in so many words
    assert of(split(read=[1] * 4)) == whole
    assert of(split(read=[2, 1, 2, 1])) == of(
        split(scattered, [0, 1, 0, 1, 0, 1], read=[1, 1, 2, 2, 1, 1]).subset(torch.tensor([2, 5, 3, 0]))
    )


OTHERS = {
    "another token": split([[0, 5, 6, 8], *DOCUMENTS[1:]]),
    "another task": split(task=[0, 1, 1, 1]),
    "another order": split().subset(torch.tensor([1, 0, 2, 3])),
    "one less": split(DOCUMENTS[:3], OF[:3]),
    "one more": split([*DOCUMENTS, [0, 5]], [*OF, 0]),
    "another bound": split([[0, 5, 6], [7, 0, 8], *DOCUMENTS[2:]]),  # the same tokens in a row
    "fewer predicted": split(read=[2, 1, 1, 1]),
    "none": split([], []),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_documents_have_another(other):
    assert of(other) != of(split())


def test_names_weights_and_sides_count():
    one, empty = split(), split([], [])
    found = [
        of(one),
        of(one, ["ada", "bo"]),
        of(one, weights=torch.tensor([1.0, 1.0])),
        of(one, weights=torch.tensor([1.0, 2.0])),
        documents_digest(TASKS, [one, empty]),
        documents_digest(TASKS, [empty, one]),
    ]
    assert len(set(found)) == len(found)
    assert all(len(text) == 64 for text in found)


def test_the_digest_of_tasks():
    one, other, last = split(), split(DOCUMENTS[:2], OF[:2]), split(DOCUMENTS[2:], OF[2:])
    data = TaskData(TASKS, one, other, last, task_weights=torch.tensor([1.0, 2.0]))
    assert data.digest == documents_digest(TASKS, [one, other, last], torch.tensor([1.0, 2.0]))
    assert data.digest != TaskData(TASKS, one, last, other, task_weights=torch.tensor([1.0, 2.0])).digest
