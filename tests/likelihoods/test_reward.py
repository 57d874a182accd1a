"""The objective of rewards on toys: its value and gradient at the first step, and what counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from pyro import poutine

from bora_pyro import InputError
from bora_pyro.data import TokenSplit
from bora_pyro.data.rollout import Rollout
from bora_pyro.likelihoods.reward import RewardObjective, token_log_probs

START = 2  # the prompt; the texts have the tokens 0 and 1


class Bigram:
    """A model of two tokens: the next one depends on the last one, by a table of logits."""

    def __init__(self, table):
        self.table = table

    def lazy_logits(self, batch, weights):
        return self.table[batch.input_ids]


def table(seed=0):
    return torch.randn((3, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rollout(texts, advantage, *, task=None, scale=1.0):
    task = torch.zeros(len(texts), dtype=torch.int64) if task is None else task
    prompts = [torch.tensor([START])] * len(texts)
    texts = [torch.tensor(text) for text in texts]
    return Rollout.of(prompts, texts, task=task, advantage=torch.tensor(advantage), samples=len(texts), scale=scale)


def at_writing(batch, model):
    """The rollout as the model itself has written it."""
    return replace(batch, sampled_log_prob=token_log_probs(model, None, batch).detach())


def objective(likelihood, batch, model):
    trace = poutine.trace(likelihood).get_trace(model, None, batch)
    trace.compute_log_prob()
    [name] = trace.observation_nodes
    return trace.nodes[name]["log_prob_sum"]


def probability(logits, text):
    """p(text) of the bigram, as a number."""
    log_p, last, total = logits.log_softmax(-1), START, 0.0
    for token in text:
        total += float(log_p[last, token])
        last = token
    return torch.tensor(total).exp().item()


@pytest.mark.parametrize("ratio", ["token", "text"])
def test_the_gradient_is_that_of_the_expected_reward(ratio):
    texts = [list(text) for text in product((0, 1), repeat=3)]
    reward = [1.0, -2.0, 0.5, 3.0, 0.0, 1.5, -1.0, 2.0]
    logits = table().requires_grad_()
    # each text with its probability in place of 1/G: the mean over texts that the model writes
    share = torch.tensor([probability(logits.detach(), text) for text in texts])
    batch = replace(at_writing(rollout(texts, reward), Bigram(logits)), piece_share=share)
    objective(RewardObjective(ratio=ratio), batch, Bigram(logits)).backward()

    def expected(at):
        return sum(probability(at, text) * r for text, r in zip(texts, reward, strict=True))

    step = 1e-3
    for entry in product(range(3), range(2)):
        change = torch.zeros_like(logits)
        change[entry] = step
        difference = (expected(logits.detach() + change) - expected(logits.detach() - change)) / (2 * step)
        assert float(logits.grad[entry]) == pytest.approx(difference, abs=1e-3)


def test_at_the_first_step_the_loss_is_minus_the_mean_advantage():
    model, advantage = Bigram(table()), [1.0, -0.5, 2.0]
    batch = at_writing(rollout([[0, 1], [1], [1, 1, 0]], advantage), model)
    value = float(objective(RewardObjective(ratio="text"), batch, model))
    assert -value == pytest.approx(-sum(advantage) / 3)
    by_token = float(objective(RewardObjective(), batch, model))
    assert by_token == pytest.approx((2 * 1.0 - 0.5 + 3 * 2.0) / 3)
    likelihood = RewardObjective()
    objective(likelihood, batch, model)
    assert likelihood.counts.tolist() == [6, 0, 6, 0]


def test_equal_rewards_and_another_scale():
    logits = table().requires_grad_()
    batch = at_writing(rollout([[0, 1], [1, 0]], [0.0, 0.0]), Bigram(logits))
    objective(RewardObjective(), batch, Bigram(logits)).backward()
    assert not logits.grad.any()
    batch = at_writing(rollout([[0, 1], [1, 0]], [1.0, -2.0]), Bigram(logits))
    model = Bigram(logits.detach())
    once = float(objective(RewardObjective(), batch, model))
    assert float(objective(RewardObjective(), replace(batch, scale=5.0), model)) == pytest.approx(5 * once)


@pytest.mark.parametrize("ratio", ["token", "text"])
def test_later_steps_are_clipped(ratio):
    before, after = Bigram(table()), Bigram(table(seed=1))
    texts, advantage = [[0, 1], [1, 1, 0]], [1.0, -1.0]
    batch = at_writing(rollout(texts, advantage), before)
    expected, clipped, number = 0.0, 0, 0
    for row, (text, a) in enumerate(zip(texts, advantage, strict=True)):
        new = token_log_probs(after, None, batch)[row, : len(text)]
        log_ratio = new - batch.sampled_log_prob[row, : len(text)]
        log_ratio = log_ratio.sum()[None] if ratio == "text" else log_ratio
        for rho in log_ratio.exp().tolist():
            expected += min(a * rho, a * min(max(rho, 0.9), 1.1)) / 2
            clipped, number = clipped + ((a > 0 and rho > 1.1) or (a < 0 and rho < 0.9)), number + 1
    likelihood = RewardObjective(clip=0.1, ratio=ratio)
    assert float(objective(likelihood, batch, after)) == pytest.approx(expected, rel=1e-5)
    assert likelihood.counts[:2].tolist() == [number, clipped]
    assert clipped  # the two models differ enough


def test_the_divergence_from_the_base_is_subtracted_by_its_weight():
    model, base = Bigram(table()), Bigram(table(seed=1))
    batch = at_writing(rollout([[0, 1], [1]], [1.0, 1.0]), model)
    batch = replace(batch, base_log_prob=token_log_probs(base, None, batch))
    ratio = (batch.base_log_prob - batch.sampled_log_prob)[:, :2]
    k3 = (ratio.exp() - ratio - 1).sum()
    plain, weighted = (float(objective(RewardObjective(kl_weight=weight), batch, model)) for weight in (0.0, 0.5))
    assert weighted == pytest.approx(plain - 0.5 * float(k3) / 2, rel=1e-5)
    likelihood = RewardObjective()
    objective(likelihood, batch, model)
    assert float(likelihood.counts[3]) == pytest.approx(float(k3), rel=1e-5)


def test_padding_and_parts_change_nothing():
    model = Bigram(table())
    texts, advantage = [[0], [1, 1, 0, 1], [0, 1]], [1.0, -0.5, 2.0]
    batch = at_writing(rollout(texts, advantage, scale=2.0), model)
    later = Bigram(table(seed=2))
    whole = float(objective(RewardObjective(clip=0.5), batch, later))
    parts = batch.parts(6)
    assert len(parts) > 1
    of_parts = sum(part.share * float(objective(RewardObjective(clip=0.5), part, later)) for part in parts)
    assert of_parts == pytest.approx(whole, rel=1e-5)
    longer = {name: torch.nn.functional.pad(getattr(batch, name), (0, 3)) for name in ("input_ids", "sampled_log_prob")}
    longer["labels"] = torch.nn.functional.pad(batch.labels, (0, 3), value=-100)
    assert float(objective(RewardObjective(clip=0.5), replace(batch, **longer), later)) == pytest.approx(whole, rel=1e-6)


def test_task_weights_are_factors():
    model, task = Bigram(table()), torch.tensor([0, 1])
    batch = at_writing(rollout([[0, 1], [1, 0]], [1.0, 3.0], task=task), model)
    likelihood = RewardObjective(ratio="text").with_task_weights(torch.tensor([2.0, 5.0]))
    assert float(objective(likelihood, batch, model)) == pytest.approx((2 * 1.0 + 5 * 3.0) / 2)


def test_a_prompt_counts_as_one_document():
    batch = rollout([[0, 1], [1, 0]], [1.0, -1.0])
    assert RewardObjective().observations_of(batch) == 1
    split = TokenSplit.from_documents([[START, 0], [START, 1, 1]], task=[0, 0], num_tasks=1)
    assert RewardObjective().observations_of(split) == 2
    assert float(objective(RewardObjective(), split.batches()[0], Bigram(table()))) == 0  # prompts alone


def test_a_split_is_scored_by_its_judge():
    split = TokenSplit.from_documents([[START, 0], [START, 1, 1]], task=[0, 1], num_tasks=2)
    likelihood = RewardObjective(judge=lambda model, weights, batch: batch.input_ids[:, 1].double())
    [batch] = split.batches()
    found = torch.zeros(2, dtype=torch.float64)
    found[batch.index] = likelihood.score(Bigram(table()), None, batch)
    scores = likelihood.scores(split, found, split.predicted)
    assert (scores.value(), scores.value(0), scores.value(1)) == (-0.5, 0.0, -1.0)
    assert scores.measure.of(*scores.sums().tolist()) == -0.5
    with pytest.raises(InputError, match="has no judge"):
        RewardObjective().score(Bigram(table()), None, batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.0}, "clip is 0.0; give a finite number above 0"),
        ({"clip": float("inf")}, "clip is inf"),
        ({"ratio": "sequence"}, "ratio is 'sequence'; allowed: token, text"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0; give a finite number from 0"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(InputError, match=words):
        RewardObjective(**options)


def test_questions_are_refused():
    split = TokenSplit.from_documents([[0, 1], [0, 2]], task=[0, 0], num_tasks=1, document_index=[0, 0], correct=[True, False])
    with pytest.raises(InputError, match="leave options_column out"):
        RewardObjective().observations_of(split)
