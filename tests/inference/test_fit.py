"""The loop: what it reaches, which state it keeps, when it stops, and what it reports."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta

from bora_pyro import (
    CausalLM,
    HierarchicalNormal,
    Independent,
    InputError,
    Pooled,
    TaskData,
    evaluate,
    fit,
    map_guide,
)
from bora_pyro.data import TokenSplit
from tests.inference.fit_state import assert_same, parameters
from tests.tiny_base import toy_data, toy_model, toy_split

MODULE = importlib.import_module("bora_pyro.inference.validation")
NOTHING = TokenSplit.from_documents([], task=[], num_tasks=3)
STILL = {"learning_rate": 1e-30, "deviation_reach": 0.0, "token_budget": 64}  # steps that move nothing


@pytest.fixture(scope="module")
def data():
    return toy_data()


def scripted(monkeypatch, perplexities):
    """Validation perplexities that are what the test says, after a start that any epoch beats.

    With ``average=True`` an epoch takes two: of its last state, and of the mean of the steps.
    """
    values = iter([math.inf, *perplexities])

    class Score:
        def value(self):
            return next(values)

    monkeypatch.setattr(MODULE, "evaluate", lambda *args: [Score()])


# What it reaches


def test_every_task_is_predicted_better_than_by_the_base_and_better_than_one_adapter_for_all(data):
    options = {"epochs": 8, "learning_rate": 3e-2, "token_budget": 128}
    scores = fit(toy_model(prior=HierarchicalNormal(tau=1)), data, **options).evaluate(data.validation, name="validation")
    assert scores["validation_perplexity"] < 0.6 * scores["base_validation_perplexity"]
    for task in scores["tasks"]:
        assert task["validation_perplexity"] < 0.8 * task["base_validation_perplexity"]
    pooled = fit(toy_model(prior=Pooled()), data, **options).evaluate(data.validation, name="validation")
    # the tasks contradict each other: no one adapter can serve them all
    assert scores["validation_perplexity"] < 0.9 * pooled["validation_perplexity"]


@pytest.mark.parametrize("prior", [HierarchicalNormal(tau=1), Independent(), Pooled()], ids=repr)
def test_the_state_of_the_lowest_validation_perplexity_is_restored(prior):
    few = toy_data(train=(1, 1, 1))  # so few documents that the fit soon learns them by heart
    fitted = fit(toy_model(prior=prior), few, epochs=8, learning_rate=0.05, token_budget=32, patience=0)
    perplexities = [entry["validation_perplexity"] for entry in fitted.history]
    assert len(perplexities) == 8
    assert fitted.best_epoch == 1 + perplexities.index(min(perplexities)) < 8
    assert fitted.evaluate(few.validation, name="validation")["validation_perplexity"] == min(perplexities)


def test_with_scripted_perplexities_the_state_is_that_of_the_best_epoch(data, monkeypatch):
    guide = None
    scripted(monkeypatch, [5.0, 3.0, 4.0, 3.0])
    model, states = toy_model(), []
    guide = map_guide(model)

    def keep(report):
        states.append({name: value.detach().clone() for name, value in guide.named_parameters()})

    fitted = fit(model, data, guide=guide, epochs=4, token_budget=128, patience=0, average=False, on_epoch=keep)
    assert fitted.guide is guide
    assert fitted.best_epoch == 2  # the first of two that are equally good
    assert_same(parameters(fitted), states[1])
    assert not torch.equal(*(torch.cat([value.flatten() for value in states[epoch].values()]) for epoch in (1, 3)))


@pytest.mark.parametrize(
    ("patience", "epochs"),
    [(1, 3), (2, 6), (3, 8), (0, 8)],
)
def test_early_stopping_after_patience_epochs_without_a_better_one(data, monkeypatch, patience, epochs):
    scripted(monkeypatch, [5.0, 4.0, 4.5, 3.5, 3.5, 3.6, 3.4, 9.0])
    fitted = fit(toy_model(), data, epochs=8, patience=patience, token_budget=400, average=False)
    assert len(fitted.history) == epochs
    assert [entry["epoch"] for entry in fitted.history] == [*range(1, epochs + 1)]
    assert fitted.best_epoch == {1: 2, 2: 4, 3: 7, 0: 7}[patience]


def test_without_validation_documents_the_last_epoch_is_kept(data):
    blind = TaskData(data.tasks, data.train, NOTHING, data.test)
    states, model = [], toy_model()
    guide = map_guide(model)

    def keep(report):
        states.append({name: value.detach().clone() for name, value in guide.named_parameters()})

    fitted = fit(model, blind, guide=guide, epochs=5, token_budget=400, patience=1, on_epoch=keep)
    assert fitted.best_epoch == len(fitted.history) == 5  # nothing to stop by
    assert_same(parameters(fitted), states[-1])
    assert all("validation_perplexity" not in entry for entry in fitted.history)
    assert fitted.evaluate(NOTHING, name="validation")["validation_perplexity"] is None


def test_nothing_to_train_on_is_refused(data):
    with pytest.raises(InputError, match=r"no token to predict; give more or longer documents"):
        fit(toy_model(), TaskData(data.tasks, NOTHING, data.validation, data.test))


def test_a_task_without_documents_is_given_the_global_mean():
    fitted = fit(toy_model(prior=HierarchicalNormal(tau=1)), toy_data(train=(8, 8, 0)), epochs=2, token_budget=128)
    theta, mean = fitted.weights()
    for name, value in theta.items():
        torch.testing.assert_close(value[2], mean[name], rtol=0, atol=0)
    assert fitted.deviation_norms()[2] == 0 < fitted.deviation_norms()[0]


# What it reports


def test_reports_of_steps_and_epochs(data):
    steps, epochs = [], []
    fitted = fit(toy_model(), data, epochs=2, token_budget=128, on_step=steps.append, on_epoch=epochs.append)
    per_epoch = len(data.train.batches(token_budget=128, seed=0))
    assert [step["epoch"] for step in steps] == [1] * per_epoch + [2] * per_epoch
    assert [step["step"] for step in steps] == [*range(1, 2 * per_epoch + 1)]  # each report stays as it was given
    keys = {"epoch", "step", "total", "loss", "objective", "learning_rate", "training_tokens_per_second"}
    assert all(set(step) == keys for step in steps)
    assert all(step["total"] == 2 * per_epoch for step in steps)
    assert len(epochs) == 2
    of_validation = {f"validation_perplexity{of}" for of in ("", "_last", "_averaged")}
    assert all(set(epoch) == {*keys, *of_validation, "seconds"} for epoch in epochs)
    assert all(
        epoch["validation_perplexity"] == min(epoch["validation_perplexity_last"], epoch["validation_perplexity_averaged"])
        for epoch in epochs
    )
    assert epochs == fitted.history
    assert epochs[0]["loss"] > epochs[1]["loss"]
    assert 0 < epochs[0]["seconds"] < epochs[1]["seconds"] == fitted.seconds
    assert all(step["training_tokens_per_second"] > 0 for step in steps)


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_in_nats_a_training_observation(data, unit, accumulate):
    fitted = fit(toy_model(prior=Pooled(), likelihood=CausalLM(unit)), data, epochs=1, accumulate=accumulate, **STILL)
    (base,) = evaluate(fitted.model, data.train, None)
    if unit == "documents":  # there a document counts as one, and its loss is its mean a token
        expected = float((-base.log_likelihood / base.tokens).mean())
    else:
        expected = math.log(base.perplexity())
    assert fitted.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_objective_is_minus_elbo_a_training_token(data):
    fitted = fit(toy_model(prior=HierarchicalNormal(tau=9)), data, epochs=1, **STILL)
    (base,) = evaluate(fitted.model, data.train, None)
    deviations = sum(3 * start.numel() for start in fitted.model.starts.values())
    log_prior = -deviations * 0.5 * math.log(2 * math.pi)  # whitened deviations, all 0; the prior of Θ is flat
    expected = -(float(base.log_likelihood.sum()) + log_prior) / data.train.num_tokens
    assert fitted.history[0]["objective"] == pytest.approx(expected, rel=1e-5)


# What is fitted


@pytest.mark.parametrize(
    ("prior", "deviation"),
    [
        (HierarchicalNormal(tau=4), lambda sites, name: sites[f"theta.{name}_decentered"] / 2),
        (HierarchicalNormal(tau=4, form="centered"), lambda sites, name: sites[f"theta.{name}"] - sites[f"prior_mean.{name}"]),
        (Independent(), lambda sites, name: sites[f"theta.{name}"] - sites[f"theta.{name}"].mean(0)),
        (Pooled(), lambda sites, name: torch.zeros(3, 1)),
    ],
    ids=["noncentered", "centered", "independent", "pooled"],
)
def test_deviation_norms_by_hand(data, prior, deviation):
    fitted = fit(toy_model(prior=prior), data, epochs=1, token_budget=128)
    sites = fitted.sites()
    squares = [deviation(sites, name).flatten(1).square().sum(1) for name in fitted.model.starts]
    norms = fitted.deviation_norms()
    assert norms.shape == (3,)
    torch.testing.assert_close(norms, sum(squares).sqrt(), rtol=1e-5, atol=0)
    assert (norms == 0).all() if isinstance(prior, Pooled) else (norms > 0).all()


def test_weights_are_theta_and_its_mean(data):
    fitted = fit(toy_model(prior=HierarchicalNormal(tau=4)), data, epochs=1, token_budget=128)
    sites = fitted.sites()
    theta, mean = fitted.weights()
    assert list(theta) == list(mean) == ["v_proj.lora_A", "v_proj.lora_B", "fc2.lora_A", "fc2.lora_B"]
    for name, value in theta.items():
        assert value.shape == (3, *fitted.model.starts[name].shape)
        assert not value.requires_grad
        torch.testing.assert_close(mean[name], sites[f"prior_mean.{name}"], rtol=0, atol=0)
        torch.testing.assert_close(value, mean[name] + sites[f"theta.{name}_decentered"] / 2)


def test_scores_of_tasks_add_up(data):
    fitted = fit(toy_model(), data, epochs=2, token_budget=128)
    scores = fitted.evaluate(data.test)
    tokens = [sum(int(n) - 1 for n, t in zip(data.test.lengths, data.test.task, strict=True) if t == d) for d in range(3)]
    for key in ("test_perplexity", "base_test_perplexity"):
        total = sum(count * math.log(task[key]) for count, task in zip(tokens, scores["tasks"], strict=True))
        assert scores[key] == pytest.approx(math.exp(total / sum(tokens)), rel=1e-9)
    assert [task["name"] for task in scores["tasks"]] == data.tasks
    assert [task["test_documents"] for task in scores["tasks"]] == [8, 8, 8]
    # a character a token here, so bits a character are the logarithm of the perplexity
    assert scores["test_bits_per_character"] == pytest.approx(math.log2(scores["test_perplexity"]))


def test_a_guide_of_ones_own_is_fitted(data):
    model = toy_model()
    guide = AutoDelta(poutine.block(model, hide=["tokens"]))
    fitted = fit(model, data, guide=guide, epochs=2, token_budget=400)
    assert fitted.guide is guide
    assert fitted.history[1]["loss"] < fitted.history[0]["loss"]


def test_documents_of_one_task_do_not_move_the_deviations_of_another():
    first, second = (toy_data(train=(6, count, 0)) for count in (6, 6))
    second.train = toy_split((6, 6, 0), seed=0)
    assert torch.equal(first.train.tokens, second.train.tokens)
    fitted = fit(toy_model(prior=Independent()), first, epochs=1, token_budget=10_000)
    theta, _ = fitted.weights()
    alone = TaskData(first.tasks, _only(first.train, 0), NOTHING, NOTHING)
    separate, _ = fit(toy_model(prior=Independent()), alone, epochs=1, token_budget=10_000).weights()
    for name, value in theta.items():
        if name.endswith("lora_B"):  # A's first gradient is 0, as B starts at 0
            torch.testing.assert_close(value[0], separate[name][0], rtol=1e-3, atol=1e-6)


def _only(split, task):
    documents = [split.document(n).tolist() for n in range(len(split)) if split.task[n] == task]
    return TokenSplit.from_documents(documents, task=[task] * len(documents), num_tasks=split.num_tasks, pad_token_id=1)
