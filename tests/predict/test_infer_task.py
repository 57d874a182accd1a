"""p(d | text): Bayes' rule itself, document by document and token by token."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import (
    Backbone,
    BoRA,
    HierarchicalNormal,
    Independent,
    InputError,
    LoRA,
    Pooled,
    evaluate,
    fit,
    infer_task,
    load_tasks,
)
from bora_pyro.predict.infer_task import UNKNOWN, TaskCalibration, TaskProbabilities, log_likelihoods
from bora_pyro.predict.unknown_task import prior_of_unknown
from bora_pyro.priors import Given
from tests.tiny import tiny_bora, tiny_data, tiny_split
from tests.tiny_base import documents, save_base


@pytest.fixture(scope="module")
def fitted():
    model = tiny_bora(targets=["q_proj", "fc1"], prior=HierarchicalNormal(5.0), adapter=LoRA(rank=2))
    return fit(model, tiny_data(), epochs=4, token_budget=24, learning_rate=0.1, patience=0)


@pytest.mark.parametrize("budget", [1, 24, 10_000])
def test_one_pass_for_all_tasks_is_a_pass_for_each(fitted, budget):
    split = tiny_split((3, 2, 4), seed=7)
    theta, _ = fitted.weights()
    found = log_likelihoods(fitted.model, split, theta, token_budget=budget)
    for d in range(3):
        (scores,) = evaluate(fitted.model, split.replace(task=torch.full_like(split.task, d)), theta)
        torch.testing.assert_close(found[:, d], scores.log_likelihood, rtol=1e-5, atol=1e-5)


def test_bayes_rule(fitted):
    split = tiny_split((3, 2, 4), seed=7)
    found = infer_task(fitted, split)
    prior = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64) / 8  # the training documents
    expected = prior * found.log_likelihood.exp()
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities, expected)
    torch.testing.assert_close(found.log_evidence, (prior * found.log_likelihood.exp()).sum(1).log())
    assert found.best == [fitted.tasks[d] for d in expected.argmax(1).tolist()]
    flat = infer_task(fitted, split, prior="flat")
    torch.testing.assert_close(flat.log_prior, torch.full((3,), -math.log(3), dtype=torch.float64))
    one = infer_task(fitted, split, prior={"task 1": 2.0})
    torch.testing.assert_close(one.probabilities, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(9, 3))


def test_the_evidence_of_a_text_is_the_average_of_the_tasks_token_by_token(fitted):
    """Each next token under Σ_d p(d | tokens before) p(token | tokens before, θ_d): the product is p(text)."""
    tokens = tiny_split((1, 0, 0), seed=3).document(0)
    theta, _ = fitted.weights()
    with torch.no_grad():
        change = fitted.model.change(theta, torch.arange(3))
        log_p = fitted.model.backbone.logits(tokens.expand(3, -1), change).double().log_softmax(-1)
    weights, total = infer_task(fitted, tiny_split((1, 0, 0), seed=3)).log_prior, 0.0
    for place, token in enumerate(tokens[1:].tolist()):
        of_tasks = log_p[:, place, token]
        step = (weights + of_tasks).logsumexp(0)
        total, weights = total + float(step), weights + of_tasks - step
    found = infer_task(fitted, tiny_split((1, 0, 0), seed=3))
    assert total == pytest.approx(float(found.log_evidence[0]), rel=1e-5)
    torch.testing.assert_close(weights, found.log_prob[0], rtol=1e-4, atol=1e-5)


def test_an_unknown_task_has_the_prior_predictive(fitted):
    split = tiny_split((2, 1, 1), seed=9)
    known, found = infer_task(fitted, split), infer_task(fitted, split, unknown=0.25, draws=5, seed=1)
    assert found.tasks == [*fitted.tasks, UNKNOWN]
    torch.testing.assert_close(found.log_prior.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert float(found.log_prior[-1].exp()) == pytest.approx(0.25)
    torch.testing.assert_close(found.log_likelihood[:, :3], known.log_likelihood)
    again, other = (infer_task(fitted, split, unknown=0.25, draws=5, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(again.log_likelihood, found.log_likelihood, rtol=0, atol=0)
    assert not torch.equal(other.log_likelihood[:, 3], found.log_likelihood[:, 3])
    # a prior without width: every draw is Θ
    narrow = fit(tiny_bora(prior=HierarchicalNormal(1e12)), tiny_data(), epochs=1, learning_rate=0.05)
    _, mean = narrow.weights()
    of_mean = log_likelihoods(narrow.model, split, {name: value[None] for name, value in mean.items()})
    found = infer_task(narrow, split, unknown=0.5, draws=3)
    torch.testing.assert_close(found.log_likelihood[:, -1:], of_mean, rtol=1e-4, atol=1e-4)


def test_what_is_unknown_deviates_no_more_than_the_tasks_do(fitted):
    theta, mean = fitted.weights()
    wide = Given(mean, {name: torch.tensor(1e-9) for name in mean})
    for name, tau in prior_of_unknown(fitted, wide).tau.items():
        torch.testing.assert_close(tau**-0.5, (theta[name] - mean[name]).square().mean().sqrt())
    narrow = Given(mean, {name: torch.tensor(1e9) for name in mean})
    for name, tau in prior_of_unknown(fitted, narrow).tau.items():
        torch.testing.assert_close(tau, narrow.tau[name])


def test_the_temperature_that_calibrates():
    """Likelihoods that count every word ten times are right at T = 10."""
    generator = torch.Generator().manual_seed(0)
    log_likelihood = torch.randn((4000, 3), generator=generator, dtype=torch.float64)
    task = torch.distributions.Categorical(logits=log_likelihood)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = task.sample()
    flat = torch.full((3,), -math.log(3), dtype=torch.float64)
    found = TaskProbabilities(["a", "b", "c"], 10 * log_likelihood, flat, torch.ones(4000))
    assert found.calibrate(drawn).temperature == pytest.approx(10, rel=0.05)
    torch.testing.assert_close(found.at(10.0).log_prob, log_likelihood.log_softmax(1))
    table = found.table(most=2)
    assert list(table.columns) == ["task 1", "p 1", "task 2", "p 2"]
    assert (table["p 1"] >= table["p 2"]).all()


def test_the_biases_that_calibrate():
    """Likelihoods that say nothing: what is left is how often each task comes, drawn to the prior p(d) by b_d ~ Normal(0, 1)."""
    task = torch.tensor([0] * 6 + [1] * 3 + [2])
    log_prior = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    found = TaskProbabilities(["a", "b", "c"], torch.full((10, 3), -7.0, dtype=torch.float64), log_prior, torch.ones(10))
    calibration = found.calibrate(task)
    bias = torch.tensor([calibration.bias[name] for name in "abc"], dtype=torch.float64)
    # the mode: counts less expected counts are the gradient of ½ b², task by task
    expected = 10 * (log_prior + bias).softmax(0)
    torch.testing.assert_close(torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64) - expected, bias, rtol=1e-6, atol=1e-6)
    assert calibration.temperature == pytest.approx(1)
    torch.testing.assert_close(found.at(calibration).probabilities, (log_prior + bias).softmax(0).expand(10, 3))
    assert float(found.at(calibration).log_evidence[0]) == pytest.approx(-7)


def test_a_task_may_be_called_unknown():
    found = TaskProbabilities(["a", UNKNOWN], torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2).double(), torch.ones(4))
    assert found.calibrate(torch.tensor([0, 1, 1, 1])).bias[UNKNOWN] > 0
    names, nothing = ["a", UNKNOWN, "none of the tasks"], torch.zeros(3, dtype=torch.float64)
    beside = TaskProbabilities(names, nothing.expand(4, 3), nothing, torch.ones(4), unknown=True)
    odds = beside.at(TaskCalibration(bias={UNKNOWN: 2.0})).log_prob[0]
    torch.testing.assert_close(odds, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64).log_softmax(0))
    with pytest.raises(InputError, match="the bias of task 'unknow' is of none of the 2 candidates; did you mean 'unknown'"):
        beside.at(TaskCalibration(bias={"unknow": 1.0}))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e9])
def test_one_temperature_holds_for_all_candidates(fitted, temperature):
    """p(c | text) ∝ p(c) p(text | c)^(1/T) exp(b_c) for tasks and ``unknown`` alike, whose b is 0."""
    split = tiny_split((3, 2, 4), seed=7)
    bias = {"task 0": 0.7, "task 2": -0.4}
    found = infer_task(fitted, split, unknown=0.25, draws=5, calibration=TaskCalibration(temperature, bias))
    expected = found.log_prior.exp() * torch.tensor([math.exp(0.7), 1.0, math.exp(-0.4), 1.0], dtype=torch.float64)
    expected = expected * found.log_likelihood.exp() ** (1 / temperature)
    torch.testing.assert_close(found.probabilities, expected / expected.sum(1, keepdim=True))
    # among the tasks it is the calibrated table without the candidate
    known = infer_task(fitted, split, calibration=TaskCalibration(temperature, bias))
    among = found.probabilities[:, :3] / found.probabilities[:, :3].sum(1, keepdim=True)
    torch.testing.assert_close(among, known.probabilities)
    assert found.table()["p unknown"].tolist() == pytest.approx(found.probabilities[:, 3].tolist())


def test_unknown_has_no_part_in_the_calibration(fitted):
    split = tiny_split((3, 2, 4), seed=7)
    alone = infer_task(fitted, split, prior="flat").calibrate(split.task)
    beside = infer_task(fitted, split, prior="flat", unknown=0.5, draws=2).calibrate(split.task)
    assert set(beside.bias) == set(fitted.tasks)
    assert beside.temperature == pytest.approx(alone.temperature, rel=1e-4)
    assert beside.bias == pytest.approx(alone.bias, abs=1e-5)
    assert sum(alone.bias.values()) == pytest.approx(0, abs=1e-6)  # the bias of ``unknown`` is their mean
    given = infer_task(fitted, split, prior="flat", calibration=alone)
    torch.testing.assert_close(given.log_prob, infer_task(fitted, split, prior="flat").at(alone).log_prob)
    with pytest.raises(InputError, match="9 tasks of 9 texts given; give the index of each, from 0 to 2"):
        infer_task(fitted, split, unknown=0.5).calibrate(split.task + 1)
    with pytest.raises(InputError, match="a text is of task 'task 2', whose p\\(d\\) is 0"):
        infer_task(fitted, split, prior={"task 0": 1, "task 1": 1}).calibrate(split.task)
    # where no text is of it, a task of p(d) = 0 is never the answer, and nothing else changes
    without = split.subset((split.task < 2).nonzero()[:, 0])
    found = infer_task(fitted, without, prior={"task 0": 1, "task 1": 1})
    assert float(found.at(found.calibrate(without.task)).probabilities[:, 2].sum()) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior": "flatt"}, "prior is 'flatt'; allowed: documents, flat.*did you mean 'flat'"),
        ({"prior": {"task 9": 1.0}}, "task 'task 9' is not in this fit"),
        ({"prior": {"task 1": -1.0}}, "give a finite number from 0 up"),
        ({"prior": {}}, "the prior gives every task 0"),
        ({"unknown": 1.0}, "unknown is 1.0"),
        ({"unknown": 0.1, "draws": 0}, "draws is 0"),
        ({"calibration": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_input(fitted, options, words):
    with pytest.raises(InputError, match=words) as caught:
        infer_task(fitted, tiny_split(), **options)
    assert "\n" not in str(caught.value)


def test_what_has_no_answer(fitted):
    with pytest.raises(InputError, match="no tokenizer"):
        infer_task(fitted, ["a text"])
    with pytest.raises(InputError, match="there is no text"):
        infer_task(fitted, tiny_split((0, 0, 0)))
    independent = fit(tiny_bora(prior=Independent()), tiny_data(), epochs=1)
    with pytest.raises(InputError, match="tau is 0, so that tasks are independent"):
        infer_task(independent, tiny_split(), unknown=0.5)
    pooled = fit(tiny_bora(prior=Pooled()), tiny_data(), epochs=1)
    with pytest.raises(InputError, match=r"tau is inf, one adapter for all tasks.*leave unknown out"):
        infer_task(pooled, tiny_split(), unknown=0.5)


def test_texts_as_they_are_given(tmp_path):
    backbone = Backbone.from_pretrained(save_base(tmp_path / "base"), targets=["v_proj"])  # it reads 32 tokens
    data = load_tasks(documents(), backbone.tokenizer, max_tokens=32)
    fitted = fit(BoRA(backbone, 3, adapter=LoRA(rank=1)), data, epochs=1)
    long = "red " * 90
    assert infer_task(fitted, long, max_tokens=64).tokens.tolist() == infer_task(fitted, [long]).tokens.tolist() == [31]
    assert infer_task(fitted, long, max_tokens=2).tokens.tolist() == [1]
    for texts, options, words in (
        ([], {}, "there is no text"),
        ([None], {}, "text 1 of 1 is None; give texts"),
        (3, {}, "texts is 3; give a text, or a list of texts"),
        ("red", {"max_tokens": 1}, "max_tokens is 1; give a whole number from 2 up"),
        ("red", {"max_tokens": -5}, "max_tokens is -5"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            infer_task(fitted, texts, **options)
        assert "\n" not in str(caught.value)
