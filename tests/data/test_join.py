"""The documents of further tasks behind those of others: every token, prompt, piece and task is as it was."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.data.join import join_tasks


def data(tasks, split, **more):
    return TaskData(tasks, split, split, split, **more)


PLAIN = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2, characters=[9, 4], pad_token_id=3)
PROMPTS = TokenSplit.from_documents([[0, 8, 9, 5], [0, 4, 4]], task=[0, 0], num_tasks=1, read=[3, 2])
PIECES = TokenSplit.from_documents([[0, 8], [0, 9], [0, 5, 6]], task=[0, 0, 1], num_tasks=2, document_index=[4, 4, 9])


@pytest.mark.parametrize("first", [PLAIN, PROMPTS, PIECES])
@pytest.mark.parametrize("second", [PLAIN, PROMPTS, PIECES])
def test_every_document_is_as_it_was(first, second):
    one, two = ([f"{name}{d}" for d in range(split.num_tasks)] for name, split in (("a", first), ("b", second)))
    joined = join_tasks(data(one, first), data(two, second))
    assert joined.tasks == [*one, *two]
    for split in (joined.train, joined.validation, joined.test):
        assert split.num_tasks == first.num_tasks + second.num_tasks
        assert split.pad_token_id == first.pad_token_id
        assert split.num_documents == first.num_documents + second.num_documents
        assert split.documents_per_task == first.documents_per_task + second.documents_per_task
        assert torch.equal(split.predicted, torch.cat([first.predicted, second.predicted]))
        assert torch.equal(split.characters, torch.cat([first.characters, second.characters]))
        rows = [(part, n) for part in (first, second) for n in range(len(part))]
        for row, (part, n) in enumerate(rows):
            assert torch.equal(split.document(row), part.document(n))
            assert torch.equal(split.labels(row), part.labels(n))


def test_parts_of_longer_tensors_are_joined():
    """A subset shares the tokens of the whole, so that its documents do not follow one another."""
    part = PLAIN.subset(torch.tensor([1]))
    joined = join_tasks(data(["a", "b"], part), data(["c"], PROMPTS)).train
    assert [joined.document(n).tolist() for n in range(len(joined))] == [[0, 7], [0, 8, 9, 5], [0, 4, 4]]
    assert joined.task.tolist() == [0, 2, 2]


def test_a_task_has_one_place():
    with pytest.raises(InputError, match="task 'b' has documents already"):
        join_tasks(data(["a", "b"], PLAIN), data(["b"], PROMPTS))
