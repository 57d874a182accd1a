from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.predict.mixture import TokenPredictions, predictive
from tests.tiny import random_weights, tiny_bora, tiny_split


@pytest.fixture(scope="module")
def case():
    model, split = tiny_bora(), tiny_split((3, 1, 4))
    return model, split, [random_weights(model, seed=seed) for seed in range(3)]


def by_hand(model, split, weights):
    """Probabilities of every token, (tokens, vocabulary), document by document, and the tokens themselves."""
    probabilities, labels = [], []
    for n in range(len(split)):
        ids = split.document(n)[None]
        one = {name: value[split.task[n]][None] for name, value in weights.items()}
        change = model.change(one, torch.zeros(1, dtype=torch.int64))
        with torch.no_grad():
            probabilities.append(model.backbone.logits(ids, change)[0, :-1].softmax(-1))
        labels.append(ids[0, 1:])
    return torch.cat(probabilities), torch.cat(labels)


def test_a_mixture_by_hand(case):
    model, split, draws = case
    found = predictive(model, split, lambda: draws, token_budget=20)
    parts = [by_hand(model, split, weights) for weights in draws]
    p, label = torch.stack([part[0] for part in parts]), parts[0][1]
    mean, entropy = p.mean(0), -(p * p.log()).sum(-1)
    of_label = mean.gather(1, label[:, None])[:, 0]
    one_hot = torch.nn.functional.one_hot(label, mean.shape[1])
    assert torch.equal(found.label, label)
    torch.testing.assert_close(found.log_prob, of_label.log(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.confidence, mean.max(1).values)
    assert torch.equal(found.correct, mean.argmax(1) == label)
    torch.testing.assert_close(found.brier, (mean - one_hot).square().sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.total, -(mean * mean.log()).sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.aleatoric, entropy.mean(0), atol=1e-5, rtol=1e-5)
    assert bool((found.epistemic > 0).all())
    assert torch.equal(found.document, torch.repeat_interleave(torch.arange(len(split)), split.lengths - 1))
    assert torch.equal(found.task, split.task[found.document])


def test_log_likelihood_is_that_of_evaluate(case):
    model, split, draws = case
    found = predictive(model, split, lambda: draws, token_budget=20)
    scores = evaluate(model, split, *draws)
    torch.testing.assert_close(
        found.log_likelihood, torch.stack([score.log_likelihood for score in scores]), rtol=1e-5, atol=1e-4
    )
    expected = torch.stack([score.log_likelihood for score in scores]).logsumexp(0) - math.log(3)
    torch.testing.assert_close(found.log_predictive(), expected, rtol=1e-5, atol=1e-4)
    single = predictive(model, split, lambda: draws[:1])
    assert single.perplexity() == pytest.approx(scores[0].perplexity(), rel=1e-5)
    assert single.perplexity(2) == pytest.approx(scores[0].perplexity(2), rel=1e-5)
    assert single.epistemic.abs().max() == 0


def test_batches_do_not_matter(case):
    model, split, draws = case
    whole, parts = (predictive(model, split, lambda: draws, token_budget=budget) for budget in (10_000, 9))
    for name in (field.name for field in fields(TokenPredictions) if field.name != "log_likelihood"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.log_likelihood, parts.log_likelihood, rtol=1e-5, atol=1e-4)


def test_one_draw_is_held_at_a_time(case):
    model, split, _ = case
    alive, most = set(), 0

    class Counted(dict):
        def __del__(self):
            alive.discard(id(self))

    def draws():
        nonlocal most
        for seed in range(6):
            weights = Counted(random_weights(model, seed=seed))
            alive.add(id(weights))
            most = max(most, len(alive))
            yield weights
            del weights

    predictive(model, split, draws, token_budget=20)
    # the one in use, and the one that is being made
    assert most <= 2


def test_a_task_without_documents_and_no_draw(case):
    model, _, draws = case
    split = tiny_split((3, 0, 4))
    assert predictive(model, split, lambda: draws).perplexity(1) is None
    with pytest.raises(InputError, match=r"0 draws given; a prediction needs 1 or more"):
        predictive(model, split, lambda: [])
    with pytest.raises(InputError, match=r"there are no documents to predict"):
        predictive(model, tiny_split((0, 0, 0)), lambda: draws)
