"""Answers under a mixture of draws, and their calibration, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import Backbone, BoRA, CausalLM, InputError, LoRA
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics.calibration import by_task, calibration
from bora_pyro.likelihoods import AnswerScores, Choice
from bora_pyro.predict.answers import answers, of_scores, predictions
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.multiple_choice import choose
from tests.predict.test_multiple_choice import NAMES, QUESTIONS
from tests.tiny import random_weights, tiny_bora, tiny_questions, tiny_split
from tests.tiny_base import save_base


def scores_of(probabilities, labels, task):
    """Scores of questions with given probabilities of their options."""
    log_p = torch.tensor(probabilities, dtype=torch.float64).log()
    rows = torch.zeros(0)
    label, task = torch.tensor(labels), torch.tensor(task)
    return AnswerScores(rows, rows, rows, rows, log_p=log_p, options=log_p, label=label, question_task=task)


def test_the_measures_are_those_computed_by_hand():
    first = [[0.7, 0.3, 0.0], [0.45, 0.55, 0.0], [0.2, 0.3, 0.5], [0.9, 0.1, 0.0]]
    second = [[0.5, 0.5, 0.0], [0.35, 0.65, 0.0], [0.4, 0.1, 0.5], [0.92, 0.08, 0.0]]
    labels, task = [0, 0, 2, 1], [0, 1, 1, 1]
    found = of_scores([scores_of(draw, labels, task) for draw in (first, second)])
    mixture = [[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.3, 0.2, 0.5], [0.91, 0.09, 0.0]]
    torch.testing.assert_close(found.probabilities, torch.tensor(mixture, dtype=torch.float64))
    right = [0.6, 0.4, 0.5, 0.09]
    assert found.log_prob.exp().tolist() == pytest.approx(right)
    assert found.correct.tolist() == [True, False, True, False]
    brier = [0.4**2 + 0.4**2, 0.6**2 + 0.6**2, 0.3**2 + 0.2**2 + 0.5**2, 0.91**2 + 0.91**2]
    assert found.brier.tolist() == pytest.approx(brier)
    measured = calibration(found)
    assert (measured.tokens, measured.accuracy) == (4, 0.5)
    assert measured.nll == pytest.approx(-sum(map(math.log, right)) / 4)
    assert measured.brier == pytest.approx(sum(brier) / 4)
    # 15 bins: 0.6 and 0.6 are in one (one right, one wrong), 0.5 in another (right), 0.91 in a third (wrong)
    assert measured.ece == pytest.approx((2 * abs(0.6 - 0.5) + abs(0.5 - 1) + abs(0.91 - 0)) / 4, rel=1e-5)
    of_task = by_task(found, ["a", "b", "c"])
    assert of_task["tokens"].tolist() == [1, 3, 0]
    assert of_task["accuracy"].tolist()[:2] == pytest.approx([1, 1 / 3])
    assert of_task["brier"].tolist()[:2] == pytest.approx([brier[0], sum(brier[1:]) / 3])
    assert found.numbers(1) == {"nll": pytest.approx(-sum(map(math.log, right[1:])) / 3), "accuracy": pytest.approx(1 / 3)}
    assert found.numbers(2) == {"nll": None, "accuracy": None}


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_without_an_end_token_answers_are_those_of_choose(score, tmp_path):
    likelihood = Choice(score)
    model = BoRA(Backbone.from_pretrained(save_base(tmp_path)), 2, adapter=LoRA(rank=2), likelihood=likelihood)
    rows, columns = [], {"task": [], "read": [], "document_index": [], "correct": []}

    def ids(text):
        return model.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]

    for number, question in enumerate(QUESTIONS):
        for place, option in enumerate(question.options):
            rows.append([model.backbone.tokenizer.bos_token_id, *ids(question.prompt), *ids(option)])
            values = (NAMES.index(question.task), 1 + len(ids(question.prompt)), number, place == question.correct)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    split = TokenSplit.from_documents(rows, num_tasks=2, pad_token_id=1, **columns)
    draws = [None, random_weights(model), random_weights(model, seed=1)]
    found = answers(model, split, lambda: draws, token_budget=40)
    expected = choose(model, QUESTIONS, draws, NAMES, normalise={"sum": "none", "mean": "tokens"}[score])
    for name in ("probabilities", "log_prob", "confidence", "brier", "total", "aleatoric", "log_likelihood"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for name in ("task", "label", "answer", "correct"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_predictions_are_of_what_the_likelihood_observes():
    questions, documents = tiny_questions(), tiny_split()
    of_answers, of_tokens = tiny_bora(likelihood=Choice()), tiny_bora()
    assert len(predictions(of_answers, questions, lambda: [None]).label) == questions.num_documents
    assert len(predictions(of_tokens, documents, lambda: [None]).label) == documents.num_tokens
    with pytest.raises(InputError, match="answers need questions with options"):
        answers(of_answers, documents, lambda: [None])
    with pytest.raises(InputError, match="answers need questions with options"):
        answers(tiny_bora(likelihood=CausalLM()), questions, lambda: [None])
    with pytest.raises(InputError, match="has answers among options, not documents"):
        predictive(of_tokens, questions, lambda: [None])
    with pytest.raises(InputError, match="0 draws given"):
        answers(of_answers, questions, lambda: [])
