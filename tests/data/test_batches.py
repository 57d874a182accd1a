from __future__ import annotations

from collections import Counter

import pytest
import torch

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from tests.tiny import tiny_split

BUDGETS = [1, 7, 20, 64, 10_000]
SEEDS = [None, 0, 1]


def make_split(num_documents=60, *, pad_token_id=0):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (num_documents,), generator=generator).tolist()
    documents = [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]
    task = torch.randint(0, 4, (num_documents,), generator=generator).tolist()
    return documents, task, TokenSplit.from_documents(documents, task=task, num_tasks=5, pad_token_id=pad_token_id)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_scale_times_batch_is_unbiased_for_the_split(budget, seed):
    documents, _, split = make_split()
    # Whole numbers that grow with the length, in float64: the identity then holds exactly.
    x = torch.tensor([len(document) ** 2 + n for n, document in enumerate(documents)], dtype=torch.float64)
    batches = split.batches(token_budget=budget, seed=seed)
    estimates = [batch.scale * x[batch.index].sum() for batch in batches]
    assert sum(estimates) / len(batches) == x.sum()


def test_documents_over_batch_size_would_be_biased():
    documents, _, split = make_split()
    x = torch.tensor([len(document) for document in documents], dtype=torch.float64)
    batches = split.batches(token_budget=40)
    estimates = [split.num_documents / len(batch.index) * x[batch.index].sum() for batch in batches]
    assert sum(estimates) / len(batches) > 1.1 * x.sum()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_document_once_and_within_the_budget(budget, seed):
    documents, task, split = make_split()
    batches = list(split.batches(token_budget=budget, seed=seed))
    assert Counter(n for batch in batches for n in batch.index.tolist()) == Counter(range(len(documents)))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.index) == 1
        assert batch.scale == len(batches)
        assert batch.task.tolist() == [task[n] for n in batch.index.tolist()]


@pytest.mark.parametrize("pad_token_id", [0, 7])
def test_padding_mask_and_labels(pad_token_id):
    split = TokenSplit.from_documents([[1, 2, 7], [1, 7]], task=[1, 0], num_tasks=2, pad_token_id=pad_token_id)
    [batch] = split.batches()
    assert batch.index.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[1, 7, pad_token_id], [1, 2, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 7, -100], [-100, 2, 7]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels, batch.task, batch.index)} == {
        torch.int64
    }


def test_rows_are_the_documents():
    documents, _, split = make_split(pad_token_id=99)
    predicted = 0
    for batch in split.batches(token_budget=50, seed=0):
        for ids, mask, labels, n in zip(batch.input_ids, batch.attention_mask, batch.labels, batch.index.tolist(), strict=True):
            assert ids[mask == 1].tolist() == documents[n] == split.document(n).tolist()
            assert labels[labels != -100].tolist() == documents[n][1:]
            assert set(ids[mask == 0].tolist()) <= {99}
        predicted += int((batch.labels != -100).sum())
    assert predicted == split.num_tokens == sum(len(document) - 1 for document in documents)


def epoch(split, seed):
    return [batch.index.tolist() for batch in split.batches(token_budget=60, seed=seed)]


def test_epochs_are_seeded_and_differ_in_their_batches():
    split = make_split()[2]
    assert epoch(split, 1) == epoch(split, 1)
    assert epoch(split, None) == epoch(split, None)
    # Not only in their order: other documents meet.
    assert {frozenset(batch) for batch in epoch(split, 1)} != {frozenset(batch) for batch in epoch(split, 2)}


def test_without_a_seed_documents_come_by_length():
    documents, _, split = make_split()
    lengths = [len(documents[n]) for batch in epoch(split, None) for n in batch]
    assert lengths == sorted(lengths)


def test_little_is_padding():
    split = make_split(2000)[2]
    batches = list(split.batches(token_budget=400, seed=0))
    assert sum(int(batch.attention_mask.sum()) for batch in batches) / sum(batch.input_ids.numel() for batch in batches) > 0.9


def test_batches_are_a_sequence():
    batches = make_split()[2].batches(token_budget=40)
    assert len(batches) > 3
    assert torch.equal(batches[-1].index, list(batches)[-1].index)
    assert [batch.index.tolist() for batch in batches[1:3]] == [batches[1].index.tolist(), batches[2].index.tolist()]
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_counts():
    split = TokenSplit.from_documents([[1, 2, 3], [1, 2], [1, 2]], task=[2, 0, 2], num_tasks=4, characters=[9, 5, 6])
    assert (split.num_documents, len(split), split.num_tokens) == (3, 3, 4)
    assert split.documents_per_task == [1, 0, 2, 0]
    assert split.characters.tolist() == [9, 5, 6]


def test_empty_split():
    split = TokenSplit.from_documents([], task=[], num_tasks=2)
    assert (split.num_documents, split.num_tokens, split.documents_per_task) == (0, 0, [0, 0])
    assert list(split.batches()) == list(split.batches(seed=0)) == []


def test_to_device():
    [batch] = TokenSplit.from_documents([[1, 2]], task=[0], num_tasks=1).batches()
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.index.device.type == "meta"
    assert moved.scale == batch.scale


def test_bad_arguments_give_one_line():
    with pytest.raises(InputError, match="token_budget is 0; give the tokens of one batch"):
        make_split()[2].batches(token_budget=0)
    with pytest.raises(InputError, match="document 1 has 1 tokens; give at least 2"):
        TokenSplit.from_documents([[1, 2], [1]], task=[0, 0], num_tasks=1)
    with pytest.raises(InputError, match="task indices run from 0 to 1; with 1 tasks use 0 to 0"):
        TokenSplit.from_documents([[1, 2], [1, 2]], task=[0, 1], num_tasks=1)
    with pytest.raises(InputError, match="disagree; give one length, task and character count a document"):
        TokenSplit.from_documents([[1, 2], [1, 2]], task=[0], num_tasks=1)


@pytest.mark.parametrize("tokens", [1, 7, 12, 20, 40, 1000])
def test_the_parts_of_a_batch_are_its_documents_and_count_as_much(tokens):
    [batch] = tiny_split((3, 1, 4)).batches(token_budget=10_000)
    parts = batch.parts(tokens)
    assert torch.cat([part.index for part in parts]).tolist() == batch.index.tolist()
    assert torch.cat([part.task for part in parts]).tolist() == batch.task.tolist()
    assert sum(part.share for part in parts) == pytest.approx(1)
    for part in parts:
        assert part.scale * part.share == pytest.approx(batch.scale)
        assert len(part.index) == 1 or part.input_ids.numel() <= tokens + part.input_ids.shape[1] - 1
        assert part.input_ids.shape[1] == int(part.attention_mask.sum(-1).max())  # no more padding than it needs
        for row, n in enumerate(part.index.tolist()):
            place = batch.index.tolist().index(n)
            length = int(batch.attention_mask[place].sum())
            assert part.input_ids[row, :length].tolist() == batch.input_ids[place, :length].tolist()
            assert part.labels[row, :length].tolist() == batch.labels[place, :length].tolist()
