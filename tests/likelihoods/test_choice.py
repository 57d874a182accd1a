"""The likelihood of answers among options against sums over options, computed one question at a time."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import CausalLM, InputError
from bora_pyro.data import TokenSplit
from bora_pyro.guides.curvature import diagonal_fisher, document_gradients
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import OPTION_SCORES, Choice, NextTokens
from tests.tiny import VOCABULARY, random_weights, tiny_bora, tiny_questions, tiny_split

BUDGETS = [1, 40, 10_000]
both_scores = pytest.mark.parametrize("option_score", OPTION_SCORES)


class Table:
    """A language model whose logits are a table: a row for each row of a split."""

    def __init__(self, split, *, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn((len(split), int(split.lengths.max()), VOCABULARY), generator=generator)

    def lazy_logits(self, batch, weights):
        return self.logits[batch.index, : batch.input_ids.shape[1]]


def by_hand(split, logits, option_score):
    """log p(answer | prompt) of each question, in the order of their numbers, with plain Python numbers."""
    scores = {}
    for row in range(len(split)):
        single = torch.log_softmax(logits[row].double(), -1)
        labels = split.labels(row).tolist()
        tokens = [float(single[n - 1, label]) for n, label in enumerate(labels) if label >= 0]
        score = sum(tokens) / (len(tokens) if option_score == "mean" else 1)
        scores.setdefault(int(split.document_of[row]), {})[row] = score
    found = []
    for question in sorted(scores):
        total = math.log(sum(math.exp(score) for score in scores[question].values()))
        (right,) = (score for row, score in scores[question].items() if split.correct[row])
        found.append(right - total)
    return torch.tensor(found, dtype=torch.float64)


def log_likelihood(likelihood, model, weights, batch):
    trace = poutine.trace(likelihood).get_trace(model, weights, batch)
    trace.compute_log_prob()
    return trace.nodes["answer"]["log_prob"], trace.nodes["answer"]["log_prob_sum"]


@both_scores
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_log_likelihood_is_that_computed_by_hand(option_score, budget):
    split, likelihood = tiny_questions(), Choice(option_score)
    model, expected = Table(split), by_hand(split, Table(split).logits, option_score)
    sums, seen = [], []
    for batch in split.batches(token_budget=budget, seed=3):
        single, total = log_likelihood(likelihood, model, None, batch)
        questions = split.document_of[batch.index[batch.first_rows]]
        torch.testing.assert_close(single.double() / batch.scale, expected[questions], rtol=1e-5, atol=1e-6)
        sums.append(total)
        seen += questions.tolist()
    assert sorted(seen) == [*range(split.num_documents)]
    assert float(sum(sums) / len(sums)) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_the_sum_is_the_models_probability_of_the_answer_given_that_it_is_an_option():
    split = tiny_questions()
    model = Table(split)
    [batch] = split.batches(token_budget=10_000)
    whole = NextTokens(model.lazy_logits(batch, None)).log_prob(batch.labels).double().exp()  # of each option
    among = torch.zeros(split.num_documents, dtype=torch.float64).index_add_(0, batch.question, whole)
    single, _ = log_likelihood(Choice("sum"), model, None, batch)
    torch.testing.assert_close(single.double().exp() / batch.scale, whole[batch.correct] / among, rtol=1e-5, atol=1e-7)


@both_scores
@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_are_those_computed_by_hand(option_score, budget):
    split, model = tiny_questions(), tiny_bora(likelihood=Choice(option_score))
    weights = random_weights(model)
    rows = [model.logits(row, weights)[0] for row in (one_row(split, n) for n in range(len(split)))]
    expected = by_hand(split, rows, option_score)
    scores, base = evaluate(model, split, weights, None, token_budget=budget)
    torch.testing.assert_close(split.sum_by_document(scores.log_likelihood), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.log_p.exp().sum(-1), torch.ones(split.num_documents, dtype=torch.float64))
    task = split.task[split.first_pieces]
    for d in range(model.num_tasks):
        assert scores.nll(d) == pytest.approx(-float(expected[task == d].mean()), rel=1e-5)
    assert scores.value() == scores.nll() == pytest.approx(-float(expected.mean()), rel=1e-5)
    assert scores.measure.of(*scores.sums().tolist()) == pytest.approx(scores.nll())
    assert base.nll() != scores.nll()
    with pytest.raises(InputError, match="have no perplexity"):
        scores.perplexity()


def one_row(split, n):
    """Row n of a split as a batch of its own, which is no question."""
    row = TokenSplit.from_documents([split.document(n).tolist()], task=[int(split.task[n])], num_tasks=split.num_tasks)
    return row.batches()[0]


def test_some_questions_alone_have_the_scores_that_they_have_among_all():
    split, model = tiny_questions(), tiny_bora(likelihood=Choice())
    some = torch.isin(split.document_of, torch.tensor([1, 4, 5])).nonzero()[:, 0]
    (of_all,) = evaluate(model, split, None)
    (of_some,) = evaluate(model, split, None, documents=some)
    (alone,) = evaluate(model, split.subset(some), None)
    torch.testing.assert_close(of_some.log_likelihood[some], of_all.log_likelihood[some], rtol=1e-5, atol=1e-6)
    assert of_some.log_p.shape[0] == 3
    assert of_some.nll() == pytest.approx(alone.nll())
    assert of_some.accuracy() == alone.accuracy()
    (nothing,) = evaluate(model, split, None, documents=some[:0])
    assert (nothing.nll(), nothing.accuracy(), nothing.sums().tolist()) == (None, None, [0, 0])


def test_accuracy_counts_the_most_probable_options():
    rows, more = [[0, 3, 4], [0, 3, 5], [0, 6, 4], [0, 6, 5]], {"read": [2] * 4, "document_index": [7, 7, 2, 2]}
    split = TokenSplit.from_documents(rows, task=[1, 1, 0, 0], num_tasks=3, correct=[False, True, True, False], **more)
    scores = Choice().scores(split, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64), split.predicted)
    assert (scores.accuracy(), scores.accuracy(0), scores.accuracy(1), scores.accuracy(2)) == (0.5, 0.0, 1.0, None)
    likely = 1 / (1 + math.exp(-1))
    assert (scores.nll(0), scores.nll(1)) == (pytest.approx(-math.log(1 - likely)), pytest.approx(-math.log(likely)))


# Gradients and counts


def question_gradient(model, theta, split, question):
    """Gradient of log p(answer | prompt) with respect to the weights of the question's own task, one row at a time."""
    rows = (split.document_of == question).nonzero()[:, 0].tolist()
    weights = {name: value[split.task[rows[0]]].clone()[None].requires_grad_() for name, value in theta.items()}
    scores = []
    for n in rows:
        batch = one_row(split.replace(task=torch.zeros_like(split.task)), n)
        logits = model.logits(batch, weights)[0].log_softmax(-1)
        tokens = [logits[place - 1, label] for place, label in enumerate(split.labels(n).tolist()) if label >= 0]
        scores.append(torch.stack(tokens).mean() if model.likelihood.option_score == "mean" else torch.stack(tokens).sum())
    (right,) = (place for place, n in enumerate(rows) if split.correct[n])
    gradients = torch.autograd.grad(torch.stack(scores).log_softmax(0)[right], list(weights.values()))
    return {name: gradient[0] for name, gradient in zip(weights, gradients, strict=True)}


@both_scores
def test_gradients_are_those_of_each_question_alone(option_score):
    split, model = tiny_questions(), tiny_bora(likelihood=Choice(option_score))
    theta, seen = random_weights(model), []
    for batch in split.batches(token_budget=60):
        gradients = document_gradients(model, theta, batch)
        questions = split.document_of[batch.index[batch.first_rows]].tolist()
        for row, question in enumerate(questions):
            for name, expected in question_gradient(model, theta, split, question).items():
                torch.testing.assert_close(gradients[name][row], expected, rtol=1e-3, atol=1e-5)
        seen += questions
    assert sorted(seen) == [*range(split.num_documents)]


def test_a_gradient_is_that_of_finite_differences():
    split, model = tiny_questions((1, 0, 0)), tiny_bora(likelihood=Choice())
    theta, step = random_weights(model), 2e-3
    [batch] = split.batches()
    gradients = document_gradients(model, theta, batch)
    name = "q_proj.lora_B"
    place = int(gradients[name][0].abs().argmax())

    def nll(change):
        moved = theta | {name: theta[name].clone()}
        moved[name][0].view(-1)[place] += change
        return evaluate(model, split, moved)[0].nll()

    assert (nll(-step) - nll(step)) / (2 * step) == pytest.approx(float(gradients[name][0].flatten()[place]), rel=2e-2)


@pytest.mark.parametrize("budget", BUDGETS)
def test_fisher_sums_the_squares_of_questions(budget):
    split, model = tiny_questions((2, 0, 2)), tiny_bora(likelihood=Choice("mean"))
    theta = random_weights(model)
    fisher = diagonal_fisher(model, theta, split, token_budget=budget)
    expected = {name: torch.zeros_like(value) for name, value in theta.items()}
    for question, task in enumerate(split.task[split.first_pieces].tolist()):
        for name, gradient in question_gradient(model, theta, split, question).items():
            expected[name][task] += gradient.square()
    for name, value in fisher.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)
        assert not value[1].any()


def test_an_observation_is_a_question():
    split, likelihood = tiny_questions(), Choice()
    assert likelihood.observations_of(split) == 8
    assert [likelihood.observations_of(batch) for batch in split.batches(token_budget=1)] == [1] * 8
    assert likelihood.with_task_weights(torch.tensor([1.0, 10.0, 0.5])).observations_of(split) == 3 + 10 + 2
    assert likelihood.observations_of(split.subset(torch.arange(0))) == 0


def test_a_weight_multiplies_the_log_likelihood_of_its_task():
    split, weights = tiny_questions(), torch.tensor([1.0, 2.0, 0.5])
    [batch] = split.batches(token_budget=10_000)
    single, _ = log_likelihood(Choice(), Table(split), None, batch)
    weighted, _ = log_likelihood(Choice(task_weights=weights), Table(split), None, batch)
    torch.testing.assert_close(weighted, single * weights[batch.task[batch.first_rows]])


def test_the_likelihood_is_one_observed_site_in_a_plate_of_questions():
    [batch] = tiny_questions().batches(token_budget=10_000)
    trace = poutine.trace(Choice()).get_trace(tiny_bora(), None, batch)
    assert trace.observation_nodes == ["answer"]
    [frame] = trace.nodes["answer"]["cond_indep_stack"]
    assert (frame.name, frame.size, frame.dim) == ("questions", 8, -1)


def test_nan_is_a_number_that_the_loop_can_report():
    split = tiny_questions()
    model = Table(split)
    model.logits[:] = torch.nan
    [batch] = split.batches(token_budget=10_000)
    with pyro.validation_enabled(False):
        assert log_likelihood(Choice(), model, None, batch)[1].isnan()


# What is refused


def test_a_likelihood_of_other_documents_is_refused():
    questions, documents = tiny_questions(), tiny_split()
    for likelihood, split in ((CausalLM(), questions), (Choice(), documents)):
        model = tiny_bora(likelihood=likelihood)
        wrong = r"observes no answers among options; give Choice\(\)" if split is questions else "these documents have no options"
        for call in (
            lambda model=model, split=split: evaluate(model, split, None),
            lambda model=model, split=split: model(split.batches()[0]),
            lambda model=model, split=split: model.likelihood.observations_of(split),
        ):
            with pytest.raises(InputError, match=wrong):
                call()


def test_an_unknown_score_names_the_nearest():
    with pytest.raises(InputError, match=r"option_score is 'means'; allowed: mean, sum; did you mean 'mean'\?"):
        Choice("means")
    assert repr(Choice("mean", task_weights=torch.tensor([1.0, 2.0]))) == "Choice(option_score='mean', task_weights=1 to 2)"
