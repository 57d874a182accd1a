"""The steps of an epoch: each document once, and tasks as often as makes the average exact."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.inference.steps import EpochSteps
from tests.tiny import tiny_split

COUNTS = (3, 0, 1, 4, 0, 7, 2)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("partition", [None, [range(7)], [[0, 1, 5], [2, 3, 4, 6]], [[5], [0, 1], [2, 3, 4, 6]]])
def test_over_an_epoch_documents_and_tasks_count_as_once(partition, accumulate):
    split = tiny_split(COUNTS)
    tasks = None if partition is None else [torch.tensor(list(share)) for share in partition]
    steps = EpochSteps(split, token_budget=16, accumulate=accumulate, seed=3, partition=tasks)
    documents, priors, common = torch.zeros(len(split)), torch.zeros(len(COUNTS)), 0.0
    for step in steps:
        assert step
        common += sum(batch.share for batch in step) / len(steps)
        for batch in step:
            documents[batch.index] += batch.scale * batch.share / len(steps)
            if batch.tasks is not None:
                priors[batch.tasks.index] += batch.tasks.weight * batch.share / len(steps)
                assert set(batch.task.tolist()) <= set(batch.tasks.index.tolist())
                assert batch.tasks.index[batch.row].tolist() == batch.task.tolist()
    torch.testing.assert_close(documents, torch.ones(len(split)))
    if partition is not None:
        torch.testing.assert_close(priors, torch.ones(len(COUNTS)))
    assert common == pytest.approx(1)


def test_each_process_builds_its_own_part_of_every_step():
    split, partition = tiny_split(COUNTS), [torch.tensor([5]), torch.tensor([0, 1, 2, 3, 4, 6])]
    together = EpochSteps(split, token_budget=16, seed=1, partition=partition)
    apart = [EpochSteps(split, token_budget=16, seed=1, partition=partition, mine=[rank]) for rank in range(2)]
    assert len(together) == len(apart[0]) == len(apart[1])
    assert any(len(step) == 1 for step in together)  # one process has no documents left
    for number, step in enumerate(together):
        own = [batch for part in apart for batch in part[number]]
        assert [batch.index.tolist() for batch in own] == [batch.index.tolist() for batch in step]
        assert [(batch.scale, batch.share) for batch in own] == [(batch.scale, batch.share) for batch in step]


def test_the_order_is_that_of_the_batches_of_the_split():
    split = tiny_split(COUNTS)
    steps = EpochSteps(split, token_budget=16, seed=5)
    assert [step[0].index.tolist() for step in steps] == [b.index.tolist() for b in split.batches(token_budget=16, seed=5)]
    assert all(step[0].tasks is None and step[0].scale == len(steps) for step in steps)
    with pytest.raises(IndexError):
        steps[len(steps)]


def test_many_tasks_without_documents_are_drawn_a_few_at_a_time():
    split, tasks = tiny_split((3, 2) + (0,) * 200), torch.arange(202)
    seen = set()
    for seed in range(3):
        steps = EpochSteps(split, token_budget=16, seed=seed, partition=[tasks])
        priors = torch.zeros(202)
        for [batch] in steps:
            documented = len(batch.task.unique())
            assert documented <= len(batch.tasks.index) <= documented + 3
            priors[batch.tasks.index] += batch.tasks.weight / len(steps)
        torch.testing.assert_close(priors[:2], torch.ones(2))
        assert float(priors[2:].sum()) == pytest.approx(200)  # those that were drawn stand for all
        seen |= set(priors[2:].nonzero()[:, 0].tolist())
    assert len(seen) > 10
