"""Documents of tasks that are spread over clients by proportions from a Dirichlet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bora_pyro import InputError, TaskData
from bora_pyro.data import TokenSplit
from bora_pyro.federated.spread import mixed, spread
from tests.tiny import tiny_data

SPLITS = ("train", "validation", "test")


def rows(split):
    return [split.document(n).tolist() for n in range(len(split))]


def test_each_document_is_at_one_client():
    data = tiny_data((20, 10, 30))
    found = spread(data, 4, 0.5, seed=3)
    assert found.tasks == ["client 1", "client 2", "client 3", "client 4"]
    for name in SPLITS:
        before, after = getattr(data, name), getattr(found, name)
        assert rows(after) == rows(before)
        assert after.num_tasks == 4
        assert sum(after.documents_per_task) == 60
    assert min(found.train.documents_per_task) > 0
    counts = found.train.documents_per_task
    assert found.notes[-1].startswith(
        f"the documents of 3 tasks are spread over 4 clients by Dirichlet(0.5): {min(counts)} to {max(counts)} training documents"
    )
    assert found.digest == spread(data, 4, 0.5, seed=3).digest != spread(data, 4, 0.5, seed=4).digest


def test_names_are_sorted_with_ten_clients_and_more():
    assert spread(tiny_data((40, 40, 40)), 10, 5.0).tasks == [f"client {n:02d}" for n in range(1, 11)]


def test_a_small_concentration_is_skewed_and_a_large_one_is_even():
    data = tiny_data((400, 400, 400))
    even, skewed = (spread(data, 3, concentration).train for concentration in (1e5, 0.05))
    assert mixed(data.train, even.task, 3) == 3
    # 1,200 draws with probability 1/3 each: the standard deviation is 16
    assert all(abs(count - 400) < 100 for count in even.documents_per_task)
    assert shares_of(data.train, skewed).max(1).values.mean() > 0.7


def test_validation_and_test_have_the_proportions_of_training():
    data = tiny_data((600, 600))
    found = spread(data, 3, 0.3, seed=1)
    train, *others = (shares_of(getattr(data, name), getattr(found, name)) for name in SPLITS)
    for shares in others:  # the standard deviation of a difference is below 0.03
        assert torch.allclose(shares, train, atol=0.12)
    assert (train.max(1).values - train.min(1).values).max() > 0.4


def shares_of(before, after):
    """The share of each task's documents at each client, (tasks, clients)."""
    counts = [torch.bincount(after.task[before.task == d], minlength=after.num_tasks) for d in range(before.num_tasks)]
    return torch.stack(counts) / torch.stack(counts).sum(1, keepdim=True)


def test_pieces_of_a_document_stay_together():
    pieces = {"document_index": [n // 2 for n in range(40)], "task": [n // 20 for n in range(40)], "num_tasks": 2}
    split = TokenSplit.from_documents([[0, n + 5] for n in range(40)], **pieces)
    found = spread(TaskData(["ada", "bob"], split, split, split), 3, 1.0).train
    assert found.num_documents == 20
    assert torch.equal(found.task[::2], found.task[1::2])


def test_an_empty_split_stays_empty():
    data = tiny_data((5, 5))
    nothing = replace(data, test=data.test.subset(torch.arange(0)))
    assert spread(nothing, 2, 1.0).test.documents_per_task == [0, 0]


@pytest.mark.parametrize(
    ("clients", "concentration", "message"),
    [
        (1, 0.5, "clients is 1; give a whole number from 2 up"),
        ("task", 0.5, "clients is 'task'; give a whole number"),
        (True, 0.5, "clients is True"),
        (2, 0.0, "dirichlet is 0; give a number between 0.001 and 1e"),
        (2, float("nan"), "dirichlet is nan"),
        (9, 0.5, "none of 100 draws gives each of 9 clients one of the 8 training documents"),
    ],
)
def test_what_is_refused(clients, concentration, message):
    with pytest.raises(InputError, match=message):
        spread(tiny_data((3, 1, 4)), clients, concentration)


def test_task_weights_are_refused():
    with pytest.raises(InputError, match="the tasks have weights"):
        spread(replace(tiny_data((3, 1, 4)), task_weights=torch.ones(3)), 2, 0.5)
