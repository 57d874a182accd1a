"""Fits to answers among options: what decides the epoch, what teaches τ, checkpoints and new tasks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bora_pyro import HierarchicalNormal, LearnedPrecision, TaskData, adapt, fit, normal_guide
from bora_pyro.guides import map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import FitStopped
from bora_pyro.inference.learn_tau import LearnTau
from bora_pyro.inference.loop import Loop
from bora_pyro.likelihoods import Choice
from tests.likelihoods.test_choice import question_gradient
from tests.tiny import tiny_bora, tiny_questions

OPTIONS = {"epochs": 3, "token_budget": 60, "learning_rate": 0.03, "patience": 0}


def questions(counts=(6, 5, 7)):
    """The same questions to train and to validate, so that a fit that learns is seen to learn; others to test."""
    train = tiny_questions(counts)
    return TaskData([f"task {d}" for d in range(len(counts))], train, train, tiny_questions(counts, seed=1))


def model(**options):
    return tiny_bora(likelihood=Choice(), prior=HierarchicalNormal(tau=100), **options)


@pytest.mark.parametrize("task_subsampling", [False, True])
def test_the_nll_a_question_decides_the_epoch(task_subsampling):
    data = questions()
    fitted = fit(model(), data, task_subsampling=task_subsampling, **OPTIONS)
    values = [report["validation_nll"] for report in fitted.history]
    assert values[-1] < values[0]
    assert fitted.best_epoch == 1 + values.index(min(values))
    assert not any("perplexity" in name for report in fitted.history for name in report)
    assert (fitted.validation_score, fitted.validation_perplexity) == (min(values), None)
    found = fitted.evaluate(data.validation, name="validation")
    assert found["validation_nll"] == pytest.approx(min(values), rel=1e-5)
    assert found["validation_nll"] < found["base_validation_nll"]
    assert found["validation_accuracy"] > found["base_validation_accuracy"]
    assert [task["validation_documents"] for task in found["tasks"]] == [6, 5, 7]
    total = sum(n * task["validation_nll"] for n, task in zip((6, 5, 7), found["tasks"], strict=True))
    assert total / 18 == pytest.approx(found["validation_nll"])


def test_the_loss_is_the_nll_of_a_training_question():
    data, untrained = questions(), model()
    options = OPTIONS | {"epochs": 1, "learning_rate": 1e-12, "deviation_reach": 0.0}
    fitted = fit(untrained, data, **options)
    (start,) = evaluate(untrained, data.train, None)
    assert fitted.history[0]["loss"] == pytest.approx(start.nll(), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_goes_on_where_it_was_stopped(tmp_path, accumulate):
    data, options = questions(), OPTIONS | {"accumulate": accumulate}
    whole, asked = fit(model(), data, **options), []
    with pytest.raises(FitStopped):
        fit(model(), data, checkpoints=tmp_path, stop=lambda: asked.append(1) or len(asked) == 4, **options)
    resumed = fit(model(), data, checkpoints=tmp_path, **options)
    assert resumed.validation_score == whole.validation_score
    for name, value in whole.guide.named_parameters():
        assert torch.equal(value, dict(resumed.guide.named_parameters())[name])


def test_tau_learns_from_the_gradient_of_each_question(monkeypatch):
    data, seen = questions((2, 1, 2)), []
    bora = model()
    bora.prior = LearnedPrecision("site", 100.0)
    monkeypatch.setattr(LearnedPrecision, "learn", lambda self, *shown, **_: seen.append(shown))
    loop = Loop(bora, data, map_guide(bora), token_budget=10_000, tau_documents="all", learning_rate=0.03)
    loop.run_epoch()
    theta = {name: value.detach() for name, value in bora.weights_given(loop.state.sites())[0].items()}
    LearnTau().show_batch(loop, 0)
    deviations, gradients, tasks = seen[-1]
    batch = loop.validation_batches()[0][0]
    documents = data.validation.document_of[batch.index[batch.first_rows]].tolist()
    assert tasks.tolist() == batch.task[batch.first_rows].tolist()
    for row, question in enumerate(documents):
        for name, expected in question_gradient(bora, theta, data.validation, question).items():
            torch.testing.assert_close(gradients[name][row], expected, rtol=1e-3, atol=1e-5)
            average = theta[name].mean(0)
            torch.testing.assert_close(deviations[name][row], theta[name][tasks[row]] - average, rtol=1e-4, atol=1e-6)


def test_a_learned_tau_and_half_of_the_questions():
    bora = tiny_bora(likelihood=Choice(), prior=LearnedPrecision("site", 100.0))
    fitted = fit(bora, questions(), tau_documents="half", **OPTIONS)
    assert fitted.tau() != 100.0
    assert fitted.validation_score < 2.0


def test_a_guide_with_a_spread():
    data, bora = questions(), model()
    fitted = fit(bora, data, guide=normal_guide(bora, scale=0.1), **OPTIONS)
    assert fitted.evaluate(data.train)["test_nll"] < fitted.evaluate(data.train)["base_test_nll"]


def test_new_tasks_are_adapted_as_if_alone():
    fitted = fit(model(), questions(), **OPTIONS)
    new = tiny_questions((5, 3, 0), seed=4)
    none = new.subset(torch.arange(0))
    data = TaskData(["x", "y", "z"], new, none, none)
    both = adapt(fitted, data, steps=8, learning_rate=0.03)
    (before,) = evaluate(both.model, new, {name: value.expand(3, *value.shape) for name, value in fitted.weights()[1].items()})
    (after,) = evaluate(both.model, new, both.weights()[0])
    assert after.nll() < before.nll()
    assert [bool(norm) for norm in both.deviation_norms()] == [True, True, False]
    own = dataclasses.replace(data, train=new.subset((new.task == 0).nonzero()[:, 0]))
    alone = adapt(fitted, own, steps=8, learning_rate=0.03)
    for name, value in both.weights()[0].items():
        torch.testing.assert_close(value[0], alone.weights()[0][name][0], rtol=1e-3, atol=1e-4)


def test_validation_questions_of_new_tasks_choose_their_epoch():
    fitted = fit(model(), questions(), **OPTIONS)
    new, held = tiny_questions((5, 3, 0), seed=4), tiny_questions((2, 4, 0), seed=5)
    adapted = adapt(fitted, TaskData(["x", "y", "z"], new, held, held), steps=6, learning_rate=0.03)
    (scores,) = evaluate(adapted.model, held, adapted.weights()[0])
    assert adapted.validation_score == pytest.approx(scores.nll(), rel=1e-5)
