"""The hidden Markov model of the tasks of tokens, compared with sums over all paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.predict.task_chain import TaskChain

TOKENS, DRAWS, STATES = 4, 2, 3


def random_chain(rate, temperature=1.0):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(STATES, generator=generator, dtype=torch.float64).log_softmax(0)
    emissions = torch.randn((2, TOKENS, DRAWS, STATES), generator=generator, dtype=torch.float64) - 2
    return TaskChain(start, rate, temperature), emissions


def every_path(chain, emissions, *, tokens=TOKENS):
    """(draw, path) -> its joint log-probability with the first tokens of a text, by the definition of the model."""
    start, rate = chain.log_start.exp(), chain.switch_rate
    found = {}
    for draw, path in itertools.product(range(DRAWS), itertools.product(range(STATES), repeat=tokens)):
        p = start[path[0]] / DRAWS
        for before, after in itertools.pairwise(path):
            p = p * ((1 - rate) * (before == after) + rate * start[after])
        likelihood = sum(float(emissions[t, draw, s]) for t, s in enumerate(path)) / chain.temperature
        found[draw, path] = math.log(p) + likelihood if p > 0 else -math.inf
    return found


RATES = pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])


@RATES
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_filter_and_smoother_are_sums_over_all_paths(rate, temperature):
    chain, emissions = random_chain(rate, temperature)
    predicted, log_prob = chain.filter(emissions)
    smoothed = chain.smooth(emissions, predicted)
    for text in range(2):
        whole = every_path(chain, emissions[text])
        weights = torch.tensor(list(whole.values()), dtype=torch.float64).softmax(0)
        expected = torch.zeros_like(smoothed[text])
        for (draw, path), weight in zip(whole, weights, strict=True):
            for t, state in enumerate(path):
                expected[t, draw, state] += weight
        torch.testing.assert_close(smoothed[text].exp(), expected)
        for t in range(TOKENS):  # the state of token t from the tokens before it
            before = emissions[text].clone()
            before[t] = 0
            of_prefix = every_path(chain, before, tokens=t + 1)
            weights = torch.tensor(list(of_prefix.values()), dtype=torch.float64).softmax(0)
            expected = torch.zeros((DRAWS, STATES), dtype=torch.float64)
            for (draw, path), weight in zip(of_prefix, weights, strict=True):
                expected[draw, path[-1]] += weight
            torch.testing.assert_close(predicted[text, t].exp(), expected)
            mixed = (expected * emissions[text, t].exp()).sum().log()
            torch.testing.assert_close(log_prob[text, t], mixed)
    if temperature == 1:
        total = torch.tensor(list(every_path(chain, emissions[0]).values()), dtype=torch.float64).logsumexp(0)
        torch.testing.assert_close(log_prob[0].sum(), total)


@RATES
def test_the_path_is_the_most_probable_of_all(rate):
    chain, emissions = random_chain(rate, 0.3)
    path, draw = chain.path(emissions, torch.tensor([TOKENS, TOKENS - 1]))
    for text, tokens in ((0, TOKENS), (1, TOKENS - 1)):
        scores = every_path(chain, emissions[text], tokens=tokens)
        own = (int(draw[text]), tuple(path[text, :tokens].tolist()))
        assert scores[own] == pytest.approx(max(scores.values()))
    assert path[1, -1] == -1


@RATES
def test_the_end_of_a_shorter_text_changes_nothing(rate):
    chain, emissions = random_chain(rate)
    padded = torch.cat([emissions, torch.zeros(2, 3, DRAWS, STATES, dtype=torch.float64)], 1)
    (predicted, log_prob), (longer, more) = chain.filter(emissions), chain.filter(padded)
    assert torch.equal(longer[:, :TOKENS], predicted)
    torch.testing.assert_close(more.sum(1), log_prob.sum(1))
    torch.testing.assert_close(chain.smooth(padded, longer)[:, :TOKENS], chain.smooth(emissions, predicted))


def test_a_task_of_probability_0_is_nowhere():
    _, emissions = random_chain(0.2)
    chain = TaskChain(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64).log(), 0.2)
    predicted, log_prob = chain.filter(emissions)
    assert log_prob.isfinite().all()
    assert not chain.smooth(emissions, predicted)[..., 1].exp().any()
    assert not (chain.path(emissions, torch.tensor([TOKENS] * 2))[0] == 1).any()


@pytest.mark.parametrize(
    ("rate", "temperature", "words"),
    [(-0.1, 1.0, "switch_rate is -0.1"), (1.1, 1.0, "from 0 to 1"), (math.nan, 1.0, "switch_rate is nan"), (0.1, 0.0, "is 0.0")],
)
def test_bad_input(rate, temperature, words):
    with pytest.raises(InputError, match=words):
        TaskChain(torch.zeros(1), rate, temperature)
