from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import evaluate
from bora_pyro.data import TokenSplit
from bora_pyro.inference.evaluate import Scores
from tests.tiny import TASKS, of_task, peft_model, random_weights, tiny_bora, tiny_split


def losses_by_peft(model, theta, split):
    """(negative log-likelihood, predicted tokens) of each document: unpadded, alone, by the base class's own loss."""
    results = []
    for n in range(len(split)):
        document, d = split.document(n)[None], int(split.task[n])
        lm = model.backbone.model if theta is None else peft_model(model, of_task(theta, d))
        with torch.no_grad():
            loss = lm(input_ids=document, labels=document).loss.item()
        results.append((loss * (document.shape[1] - 1), document.shape[1] - 1))
    return results


def perplexity(results):
    return math.exp(sum(loss for loss, _ in results) / sum(tokens for _, tokens in results))


@pytest.mark.parametrize("token_budget", [1, 20, 10_000])
@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_perplexity_is_that_of_the_base_class_s_loss(architecture, token_budget):
    model, split = tiny_bora(architecture), tiny_split((3, 1, 4))
    theta = random_weights(model)
    base, adapted = evaluate(model, split, None, theta, token_budget=token_budget)
    for scores, weights in ((base, None), (adapted, theta)):
        results = losses_by_peft(model, weights, split)
        assert scores.tokens.tolist() == [tokens for _, tokens in results]
        assert scores.log_likelihood.tolist() == pytest.approx([-loss for loss, _ in results], rel=1e-5)
        assert scores.perplexity() == pytest.approx(perplexity(results), rel=1e-5)
        for d in range(TASKS):
            of_d = [result for result, task in zip(results, split.task.tolist(), strict=True) if task == d]
            assert scores.perplexity(d) == pytest.approx(perplexity(of_d), rel=1e-5)
    assert abs(adapted.perplexity() / base.perplexity() - 1) > 0.01


def test_one_pass_equals_two():
    model, split = tiny_bora(), tiny_split()
    theta, other = random_weights(model), random_weights(model, seed=1)
    together = evaluate(model, split, None, theta, other)
    for scores, weights in zip(together, (None, theta, other), strict=True):
        [alone] = evaluate(model, split, weights)
        assert torch.equal(scores.log_likelihood, alone.log_likelihood)


def test_padding_and_first_tokens_count_nowhere():
    model = tiny_bora()
    documents = [[5, 6, 7, 8, 9, 10], [5, 11], [5, 12, 13]]
    task = [0, 1, 1]
    scores = []
    for pad in (1, 2):
        split = TokenSplit.from_documents(documents, task=task, num_tasks=2, pad_token_id=pad)
        [one] = evaluate(model, split, None)
        scores.append(one)
    assert torch.equal(scores[0].log_likelihood, scores[1].log_likelihood)
    assert scores[0].tokens.tolist() == [5, 1, 2]


def test_bits_per_character():
    scores = Scores(
        torch.tensor([-2.0, -4.0, -6.0]).double(), torch.tensor([1, 2, 3]), torch.tensor([4, 8, 30]), torch.tensor([0, 0, 2])
    )
    assert scores.bits_per_character() == pytest.approx(12 / math.log(2) / 42)
    assert scores.bits_per_character(0) == pytest.approx(6 / math.log(2) / 12)
    assert scores.bits_per_character(2) == pytest.approx(6 / math.log(2) / 30)
    assert scores.perplexity(2) == pytest.approx(math.exp(2))


def test_characters_come_from_the_split():
    model = tiny_bora()
    split = TokenSplit.from_documents([[5, 6, 7], [5, 8]], task=[0, 1], num_tasks=3, characters=[9, 2])
    [scores] = evaluate(model, split, None)
    bits = -scores.log_likelihood / math.log(2)
    assert scores.bits_per_character(0) == pytest.approx(float(bits[0]) / 9)
    assert scores.bits_per_character() == pytest.approx(float(bits.sum()) / 11)


def test_a_task_without_documents_has_no_score():
    model = tiny_bora()
    [scores] = evaluate(model, tiny_split((2, 0, 1)), None)
    assert scores.perplexity(1) is None
    assert scores.bits_per_character(1) is None
    assert scores.perplexity(0) > 1


def test_no_documents_at_all():
    [scores] = evaluate(tiny_bora(), TokenSplit.from_documents([], task=[], num_tasks=TASKS), None)
    assert scores.perplexity() is None
    assert scores.bits_per_character() is None


def test_a_hopeless_model_has_a_finite_number():
    scores = Scores(torch.tensor([-1e6]).double(), torch.tensor([1]), torch.tensor([1]), torch.tensor([0]))
    assert scores.perplexity() == math.exp(700)


def test_log_likelihoods_are_float64_and_without_gradient():
    model = tiny_bora()
    theta = {name: value.requires_grad_() for name, value in random_weights(model).items()}
    [scores] = evaluate(model, tiny_split(), theta)
    assert scores.log_likelihood.dtype == torch.float64
    assert not scores.log_likelihood.requires_grad
