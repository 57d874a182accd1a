"""Temperature scaling: the temperature against a search by hand, and what it leaves as it is."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import BoRA, InputError
from bora_pyro.diagnostics.calibration import calibration
from bora_pyro.likelihoods import Choice
from bora_pyro.predict.answers import predictions
from bora_pyro.predict.temperature import predict_scaled, temperature_of
from tests.tiny import random_weights, tiny_bora, tiny_questions, tiny_split

KINDS = pytest.mark.parametrize("kind", ["tokens", "answers"])


def setting(kind):
    """A model, some held-out documents of it, and weights that are far from the base's."""
    if kind == "tokens":
        return tiny_bora(), tiny_split((3, 1, 4)), random_weights(tiny_bora())
    model, split = tiny_bora(likelihood=Choice()), tiny_questions((3, 1, 4))
    weights = random_weights(model)
    return model, with_answers(model, split, weights, right=5), weights


def with_answers(model, split, weights, *, right):
    """The questions with the model's guess as the answer of the first ``right``, and the next option as that of the others."""
    correct = torch.zeros_like(split.correct)
    guesses = predict_scaled(model, split, weights, 1.0).answer
    for number, (question, guess) in enumerate(zip(split.document_index.unique(), guesses, strict=True)):
        rows = (split.document_index == question).nonzero()[:, 0]
        correct[rows[(guess + (number >= right)) % len(rows)]] = True
    return split.replace(correct=correct)


@KINDS
def test_it_is_the_minimum_of_the_loss(kind):
    model, split, weights = setting(kind)
    found = temperature_of(model, split, weights, token_budget=40)
    losses = [calibration(predict_scaled(model, split, weights, found * factor)).nll for factor in (0.98, 1.0, 1.02)]
    assert losses[1] < min(losses[0], losses[2])
    # a parabola through the three has its minimum there too
    slope, curvature = losses[2] - losses[0], losses[0] - 2 * losses[1] + losses[2]
    assert abs(0.5 * slope / curvature) < 0.05
    assert abs(found - 1) > 0.05


@KINDS
def test_the_guesses_stay_and_the_probabilities_are_powers(kind):
    model, split, weights = setting(kind)
    one, two = (predict_scaled(model, split, weights, value) for value in (1.0, 2.0))
    assert one.correct.equal(two.correct)
    assert bool((two.confidence < one.confidence).all())
    if kind == "answers":
        expected = one.probabilities.sqrt()
        torch.testing.assert_close(two.probabilities, expected / expected.sum(-1, keepdim=True))
        assert two.log_likelihood.equal(one.log_likelihood)


def test_a_temperature_near_1_counts_for_a_base_in_bfloat16(monkeypatch):
    model, split, weights = setting("tokens")
    logits = BoRA.logits
    monkeypatch.setattr(BoRA, "logits", lambda model, batch, weights: logits(model, batch, weights).bfloat16())
    one, near = (predict_scaled(model, split, weights, value) for value in (1.0, 1.001))
    assert float((one.log_prob != near.log_prob).double().mean()) > 0.9
    again = predict_scaled(model, split, weights, 1.0005).log_prob
    torch.testing.assert_close(again, (one.log_prob + near.log_prob) / 2, rtol=0, atol=1e-5)


@KINDS
def test_a_mixture_is_pooled_and_then_scaled(kind):
    model, split, weights = setting(kind)
    other = random_weights(model, seed=5)
    pooled = predict_scaled(model, split, lambda: [weights, other], 1.0)
    torch.testing.assert_close(pooled.log_prob, predictions(model, split, lambda: [weights, other]).log_prob)
    if kind == "answers":
        two = predict_scaled(model, split, lambda: [weights, other], 2.0)
        expected = pooled.probabilities.sqrt()
        torch.testing.assert_close(two.probabilities, expected / expected.sum(-1, keepdim=True))
    found = temperature_of(model, split, lambda: [weights, other])
    losses = [calibration(predict_scaled(model, split, lambda: [weights, other], found * by)).nll for by in (0.98, 1.0, 1.02)]
    assert losses[1] < min(losses[0], losses[2])
    # two equal draws are one
    assert temperature_of(model, split, lambda: [weights, weights]) == pytest.approx(
        temperature_of(model, split, weights), rel=1e-3
    )


def test_labels_that_nothing_speaks_against_have_the_lowest_temperature():
    model, split, weights = setting("answers")
    split = with_answers(model, split, weights, right=8)
    assert temperature_of(model, split, weights) == pytest.approx(0.01)


def test_bad_input():
    model, split, weights = setting("tokens")
    for value in (0.0, math.inf, math.nan, -1.0):
        with pytest.raises(InputError, match=f"temperature is {value}; give a finite number above 0"):
            predict_scaled(model, split, weights, value)
    with pytest.raises(InputError, match="there are no held-out documents to find a temperature on"):
        temperature_of(model, split.subset(torch.arange(0)), weights)
