"""The attack's score by hand, and its area under the curve."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import Choice, InputError
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics.membership import membership_auroc, membership_scores
from bora_pyro.inference.evaluate import evaluate
from tests.tiny import random_weights, tiny_bora, tiny_questions


def test_the_score_of_a_document_is_that_of_all_its_pieces():
    model = tiny_bora(targets=["q_proj"])
    theta = random_weights(model)
    rows, index = [[0, 5, 6, 9], [0, 7, 8], [0, 11, 12]], [4, 7, 4]
    split = TokenSplit.from_documents(rows, task=[1, 0, 1], num_tasks=3, document_index=index, pad_token_id=1)
    base, adapted = (scores.log_likelihood for scores in evaluate(model, split, None, theta))
    gain = adapted - base
    expected = torch.stack([(gain[0] + gain[2]) / 5, gain[1] / 2])
    torch.testing.assert_close(membership_scores(model, split, theta), expected)
    assert float(expected.abs().max()) > 0.01


def test_the_area_under_the_curve():
    low, high = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4, 0.5])
    assert membership_auroc(high, low) == pytest.approx(5 / 6)
    assert membership_auroc(low, high) == pytest.approx(1 / 6)
    assert membership_auroc(low, low) == 0.5


def test_questions_are_refused():
    model = tiny_bora(targets=["q_proj"], likelihood=Choice())
    with pytest.raises(InputError, match="the documents are questions with options"):
        membership_scores(model, tiny_questions(), random_weights(model))
