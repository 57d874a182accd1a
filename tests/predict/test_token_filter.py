"""The filter by tokens: its limits are infer_task and a fixed mixture, and it finds where a task changes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, LoRA, Posterior, evaluate, fit, infer_task, normal_guide
from bora_pyro.data import TokenSplit
from bora_pyro.predict.infer_task import UNKNOWN
from bora_pyro.predict.token_filter import TokenLikelihoods, token_filter, token_likelihoods
from tests.tiny import tiny_bora, tiny_data, tiny_split
from tests.toy_members import model_with


@pytest.fixture(scope="module")
def fitted():
    model = tiny_bora(targets=["q_proj", "fc1"], prior=HierarchicalNormal(5.0), adapter=LoRA(rank=2))
    return fit(model, tiny_data(), epochs=4, token_budget=24, learning_rate=0.1, patience=0)


@pytest.fixture(scope="module")
def split():
    return tiny_split((3, 2, 4), seed=7)


@pytest.mark.parametrize("options", [{}, {"prior": "flat"}, {"prior": {"task 1": 2.0}}, {"unknown": 0.25}])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_without_switches_it_is_infer_task(fitted, split, options, budget):
    found = token_filter(fitted, split, switch_rate=0.0, token_budget=budget, unknown_samples=5, seed=1, **options)
    alike = infer_task(fitted, split, draws=5, seed=1, **options)
    assert found.tasks == alike.tasks
    torch.testing.assert_close(found.log_evidence, alike.log_evidence, rtol=1e-6, atol=1e-6)
    for smoothed, expected in zip(found.smoothed, alike.probabilities, strict=True):
        torch.testing.assert_close(smoothed, expected.expand_as(smoothed), rtol=1e-5, atol=1e-6)
    if "unknown" not in options:
        for path, best in zip(found.best_path, alike.best, strict=True):
            assert [found.tasks[d] for d in path.tolist()] == [best] * len(path)
    assert found.perplexity == pytest.approx(math.exp(-float(alike.log_evidence.sum()) / split.num_tokens))


def test_with_a_switch_at_every_token_it_is_a_fixed_mixture(fitted, split):
    found = token_filter(fitted, split, switch_rate=1.0)
    prior = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64) / 8
    for text, (log_prob, predicted) in enumerate(zip(found.log_prob, found.predicted, strict=True)):
        each = found.likelihoods.log_likelihood[text, : len(log_prob), 0]
        torch.testing.assert_close(log_prob, (each.exp() * prior).sum(1).log())
        torch.testing.assert_close(predicted, prior.expand_as(predicted))


def test_the_likelihoods_of_the_tokens_are_those_of_each_adapter(fitted, split):
    found = token_likelihoods(fitted, split)
    theta, _ = fitted.weights()
    for d in range(3):
        (scores,) = evaluate(fitted.model, split.replace(task=torch.full_like(split.task, d)), theta)
        torch.testing.assert_close(found.log_likelihood[:, :, 0, d].sum(1), scores.log_likelihood, rtol=1e-5, atol=1e-5)


def test_a_temperature_weighs_the_tasks_as_for_infer_task(fitted, split):
    found, alike = token_filter(fitted, split, switch_rate=0.0, temperature=4.0), infer_task(fitted, split, calibration=4.0)
    for smoothed, expected in zip(found.smoothed, alike.probabilities, strict=True):
        torch.testing.assert_close(smoothed, expected.expand_as(smoothed), rtol=1e-5, atol=1e-6)


def test_the_prompt_of_a_text_is_not_predicted(fitted):
    whole = tiny_split((0, 2, 0), seed=5, longest=9)
    documents = [[3, *whole.document(n).tolist(), 7, 8] for n in range(2)]
    split = TokenSplit.from_documents(documents, task=[1, 1], num_tasks=3, read=[2, 3])
    found, alike = token_filter(fitted, split, switch_rate=0.0), infer_task(fitted, split)
    torch.testing.assert_close(found.log_evidence, alike.log_evidence, rtol=1e-6, atol=1e-6)
    assert [len(row) for row in found.log_prob] == split.predicted.tolist()
    for text, segments in enumerate(found.segments):
        assert [segments[0].start, segments[-1].end] == [0, len(documents[text])]


@pytest.fixture(scope="module")
def spread():
    model = tiny_bora(targets=["q_proj", "fc1"], prior=HierarchicalNormal(5.0), adapter=LoRA(rank=2))
    return fit(model, tiny_data(), guide=normal_guide(model, scale=1.0), epochs=2, token_budget=24, learning_rate=0.1)


def test_draws_of_the_posterior_hold_for_a_whole_text(spread, split):
    """p(text) = mean over draws of p(text | draw), each with its own filter, and p(d_t | text) has the draws' weights."""
    found, posterior = token_filter(spread, split, switch_rate=0.1, draws=3, seed=2), Posterior(spread, seed=2)
    alone = []
    for k in range(3):
        part = found.likelihoods.log_likelihood[:, :, k : k + 1]
        likelihoods = TokenLikelihoods(found.tasks, part, torch.arange(3), found.chain.log_start, split)
        (scores,) = evaluate(spread.model, split.replace(task=torch.zeros_like(split.task)), posterior.draw(k))
        torch.testing.assert_close(part[..., 0].sum((1, 2)), scores.log_likelihood, rtol=1e-5, atol=1e-5)
        alone.append(likelihoods.at(0.1))
    evidence = torch.stack([one.log_evidence for one in alone])
    assert not torch.allclose(evidence[0], evidence[1])
    torch.testing.assert_close(found.log_evidence, evidence.logsumexp(0) - math.log(3))
    weights = evidence.softmax(0)
    for text, smoothed in enumerate(found.smoothed):
        expected = sum(weights[k, text] * alone[k].smoothed[text] for k in range(3))
        torch.testing.assert_close(smoothed, expected)


def planted(rate=0.05, *, texts=40, tokens=100):
    """Tokens whose task switches at a known rate, with likelihoods that say much about it."""
    generator = torch.Generator().manual_seed(0)
    task = torch.zeros(texts, tokens, dtype=torch.int64)
    for text in range(texts):
        for t in range(tokens):
            anew = t == 0 or float(torch.rand((), generator=generator)) < rate
            task[text, t] = torch.randint(3, (), generator=generator) if anew else task[text, t - 1]
    # a token is evidence of its task with probability 0.8, and of another one otherwise
    wrong = torch.rand((texts, tokens), generator=generator) < 0.2
    other = (task + torch.randint(1, 3, (texts, tokens), generator=generator)) % 3
    seen = torch.where(wrong, other, task)
    log_p = torch.where(seen[..., None] == torch.arange(3), math.log(0.8), math.log(0.1)).double()
    split = TokenSplit.from_documents([[0] * (tokens + 1)] * texts, task=[0] * texts, num_tasks=3)
    prior = torch.full((3,), -math.log(3), dtype=torch.float64)
    return TokenLikelihoods(["a", "b", "c"], log_p[:, :, None], torch.arange(3), prior, split), task


def test_the_switch_rate_of_maximum_likelihood():
    likelihoods, task = planted()
    found = likelihoods.at()
    assert found.switch_rate == pytest.approx(0.05, rel=0.25)
    for rate in (0.0, 0.9 * found.switch_rate, 1.1 * found.switch_rate, 1.0):
        assert likelihoods.log_evidence(rate) < likelihoods.log_evidence(found.switch_rate)
    right = torch.stack([path == own for path, own in zip(found.best_path, task, strict=True)]).double().mean()
    smoothed = torch.stack(found.smoothed).argmax(-1)
    assert right > 0.9
    assert (smoothed == task).double().mean() > 0.9


def test_texts_of_one_task_have_the_switch_rate_0():
    likelihoods, _ = planted(rate=0.0)
    assert likelihoods.best_switch_rate() < 1e-3


def test_segments_follow_one_another():
    likelihoods, _ = planted()
    found = likelihoods.at(0.05)
    for path, segments in zip(found.best_path, found.segments, strict=True):
        assert segments[0].start == 0
        assert segments[-1].end == 101
        assert all(one.end == after.start and one.task != after.task for one, after in pairwise(segments))
        of_tokens = [segment.task for segment in segments for _ in range(max(segment.start, 1), segment.end)]
        assert of_tokens == [found.tasks[d] for d in path.tolist()]
        assert all(0 < segment.probability <= 1 for segment in segments)


def test_an_unknown_task_is_a_candidate(fitted, split):
    found = token_filter(fitted, split, switch_rate=0.1, unknown=0.3, unknown_samples=4)
    assert found.tasks == [*fitted.tasks, UNKNOWN]
    for smoothed, predicted in zip(found.smoothed, found.predicted, strict=True):
        assert smoothed.shape[1] == 4
        torch.testing.assert_close(smoothed.sum(1), torch.ones(len(smoothed), dtype=torch.float64))
        assert float(predicted[0, -1]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"switch_rate": 2.0}, "switch_rate is 2.0; give the probability of a switch before a token, from 0 to 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"unknown": 1.0}, "unknown is 1.0"),
        ({"unknown": 0.1, "unknown_samples": 0}, "unknown_samples is 0"),
        ({"prior": "flatt"}, "did you mean 'flat'"),
        ({"draws": 2}, "this fit is a point estimate"),
    ],
)
def test_bad_input(fitted, split, options, words):
    with pytest.raises(InputError, match=words) as caught:
        token_filter(fitted, split, **options)
    assert "\n" not in str(caught.value)


def test_what_has_no_answer(fitted, split):
    with pytest.raises(InputError, match="there is no text"):
        token_filter(fitted, tiny_split((0, 0, 0)))
    routed = fit(model_with("router"), tiny_data(), epochs=1)
    for what in (token_filter, infer_task):
        with pytest.raises(InputError, match=r"TokenMixture\(3\) reads a text by the adapters of all tasks, whatever its task"):
            what(routed, split)
