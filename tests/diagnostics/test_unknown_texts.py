"""Texts that belong to no task: which task reads them, and what they score, against passes made one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from bora_pyro import InputError
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics.unknown_texts import SCORES, auroc_by_score, best_task, sample_texts, text_scores
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.mixture import predictive
from tests.tiny_base import toy_model, toy_split


def weights(model, *, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (model.num_tasks, *start.shape) for name, start in model.starts.items()}
    return {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model():
    return toy_model(rank=2)


@pytest.fixture(scope="module")
def split():
    return toy_split((4, 3, 2), seed=0)


def alone(split, n, task):
    return TokenSplit.from_documents([split.document(n).tolist()], task=[task], num_tasks=3, pad_token_id=1)


def test_the_best_task_is_the_one_of_the_highest_likelihood(model, split):
    theta = weights(model, seed=1)
    by_hand = [[evaluate(model, alone(split, n, d), theta)[0].log_likelihood.item() for d in range(3)] for n in range(len(split))]
    found = best_task(model, split, theta, token_budget=30)
    assert found.tolist() == np.argmax(by_hand, axis=1).tolist()
    assert len(set(found.tolist())) > 1
    assert found.tolist() != split.task.tolist()


def test_every_score_of_a_text_by_hand(model, split):
    centre, draws = weights(model, seed=1), [weights(model, seed=seed) for seed in (2, 3)]
    table = text_scores(model, split, centre, lambda: draws)
    assert table["task"].tolist() == best_task(model, split, centre).tolist()
    for n, row in table.iterrows():
        one = alone(split, n, int(row["task"]))
        predictions, (base,) = predictive(model, one, lambda: draws), evaluate(model, one, None)
        assert row["tokens"] == len(predictions.label)
        assert row["epistemic"] == pytest.approx(predictions.epistemic.mean().item(), rel=1e-4)
        assert row["total"] == pytest.approx(predictions.total.mean().item(), rel=1e-4)
        assert row["perplexity"] == pytest.approx(predictions.perplexity(), rel=1e-4)
        assert row["base_perplexity"] == pytest.approx(base.perplexity(), rel=1e-4)
        assert row["perplexity_ratio"] == pytest.approx(predictions.perplexity() / base.perplexity(), rel=1e-4)
    assert (table["epistemic"] > 0).all()
    # the tasks that the texts are said to be of are not looked at
    other = TokenSplit(split.tokens, split.lengths, task=split.task * 0, characters=split.characters, num_tasks=3)
    pd.testing.assert_frame_equal(text_scores(model, other, centre, lambda: draws), table)


def test_the_base_alone_has_the_ratio_one(model, split):
    theta = {name: start.expand(3, *start.shape) for name, start in model.starts.items()}
    table = text_scores(model, split, theta, lambda: [theta])
    assert table["perplexity_ratio"].tolist() == pytest.approx([1] * len(split))
    assert table["epistemic"].tolist() == [0] * len(split)
    assert table["task"].tolist() == [0] * len(split)  # the first of equals


def test_every_score_has_its_auroc():
    own = pd.DataFrame({name: [1.0, 2.0, 3.0] for name in SCORES})
    foreign = pd.DataFrame({name: [2.5 + n, 3.5 - 2 * n] for n, name in enumerate(SCORES)})
    auroc = auroc_by_score(own, foreign)
    assert auroc.index.tolist() == [*SCORES]
    pairs = {name: [np.sign(f - o) for f in foreign[name] for o in own[name]] for name in SCORES}
    assert auroc.tolist() == pytest.approx([np.mean([(1 + sign) / 2 for sign in pairs[name]]) for name in SCORES])
    assert auroc_by_score(own.drop(columns="epistemic"), foreign).index.tolist() == [*SCORES][1:]


def test_a_sample_of_texts_keeps_documents_whole(split):
    part = sample_texts(split, 4, seed=1)
    keys = [tuple(split.document(n).tolist()) for n in range(len(split))]
    places = [keys.index(tuple(part.document(n).tolist())) for n in range(4)]
    assert places == sorted(set(places))
    assert part.task.tolist() == split.task[places].tolist()
    assert part.characters.tolist() == split.characters[places].tolist()
    assert part.pad_token_id == split.pad_token_id
    torch.testing.assert_close(sample_texts(split, 4, seed=1).tokens, part.tokens)
    assert sample_texts(split, 100).tokens.tolist() == split.tokens.tolist()
    with pytest.raises(InputError, match="number of texts is 0; give a whole number from 1 up"):
        sample_texts(split, 0)
