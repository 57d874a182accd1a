"""The loop: what it optimises, which state it keeps, when it stops, and that it can be taken up again."""

from __future__ import annotations

import copy
import importlib
import math
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bora_pyro import (
    CausalLM,
    FrozenALoRA,
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
from bora_pyro.inference.schedule import epoch_seed, schedule
from tests.tiny_base import toy_data, toy_model, toy_split, without_times

MODULE = importlib.import_module("bora_pyro.inference.loop")
NOTHING = TokenSplit.from_documents([], task=[], num_tasks=3)
STILL = {"learning_rate": 1e-30, "token_budget": 64}  # steps that move nothing


@pytest.fixture(scope="module")
def data():
    return toy_data()


@pytest.fixture
def gradients():
    """Each step's gradients by position of the parameter, as the optimiser gets them."""
    steps = []

    def keep(optimizer, args, kwargs):
        steps.append([parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    yield steps
    handle.remove()


def parameters(fitted):
    return {name: value.detach().clone() for name, value in fitted.guide.named_parameters()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


def scripted(monkeypatch, perplexities):
    """Validation perplexities that are what the test says, after a start that any epoch beats."""
    values = iter([math.inf, *perplexities])

    class Score:
        def perplexity(self):
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

    fitted = fit(model, data, guide=guide, epochs=4, token_budget=128, patience=0, on_epoch=keep)
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
    fitted = fit(toy_model(), data, epochs=8, patience=patience, token_budget=400)
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


# How it steps


def test_schedule_rises_in_a_line_and_falls_as_a_cosine():
    factors = [schedule(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10] == pytest.approx(1.0)
    assert factors[10 + 30] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))  # = 0.75
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_schedule_at_its_ends_is_a_fraction_that_trains(warmup, total):
    factors = [schedule(step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_steps_use_the_schedule_over_all_epochs(data):
    steps = []
    fit(toy_model(), data, epochs=4, learning_rate=2e-3, warmup=0.25, token_budget=128, on_step=lambda r: steps.append(dict(r)))
    total = len(steps)
    assert total == steps[-1]["total"] == 4 * len(data.train.batches(token_budget=128, seed=0))
    expected = [2e-3 * schedule(step, total, 0.25) for step in range(total)]
    assert [step["learning_rate"] for step in steps] == pytest.approx(expected, rel=1e-12)
    assert [step["step"] for step in steps] == [*range(1, total + 1)]


def test_the_first_step_is_as_long_as_the_rate_says(data):
    # AdamW's first step is the learning rate times the gradient's sign, whatever the gradient's size
    fitted = fit(toy_model(), data, epochs=1, learning_rate=1e-3, warmup=0.0, token_budget=10_000)
    moved = fitted.sites()["prior_mean.fc2.lora_B"]  # from 0
    assert len(fitted.history) == fitted.history[0]["step"] == 1
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["noncentered", "centered"])
def test_one_step_of_two_batches_is_the_average_of_their_gradients(data, gradients, form):
    budget = 290
    batches = data.train.batches(token_budget=budget, seed=0)
    assert len(batches) == 2
    model = toy_model(prior=HierarchicalNormal(tau=3, form=form))
    fitted = fit(model, data, epochs=1, accumulate=2, learning_rate=1e-2, warmup=0.0, gradient_clip=math.inf, token_budget=budget)
    assert fitted.history[0]["step"] == len(gradients) == 1

    guide = map_guide(model)
    guide(batches[0])
    by_hand = []
    for batch in batches:
        guide.zero_grad(set_to_none=True)
        Trace_ELBO().differentiable_loss(model, guide, batch).backward()
        by_hand.append({name: value.grad / data.train.num_tokens for name, value in guide.named_parameters()})
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-12)
    assert len(gradients[0]) == len(by_hand[0])
    for got, (name, value) in zip(gradients[0], guide.named_parameters(), strict=True):
        value.grad = (by_hand[0][name] + by_hand[1][name]) / 2
        torch.testing.assert_close(got, value.grad, rtol=1e-4, atol=1e-7)
    # the two batches are all documents: their average is the gradient of the whole objective
    [everything] = data.train.batches(token_budget=10_000)
    whole = map_guide(model)
    whole(everything)
    Trace_ELBO().differentiable_loss(model, whole, everything).backward()
    for got, value in zip(gradients[0], whole.parameters(), strict=True):
        torch.testing.assert_close(got, value.grad / data.train.num_tokens, rtol=1e-4, atol=1e-7)
    optimizer.step()
    for name, value in guide.named_parameters():
        # AdamW's first step is sign(gradient): entries whose gradient is rounding noise may go either way
        clear = value.grad.abs() > 1e-6
        torch.testing.assert_close(parameters(fitted)[name][clear], value.detach()[clear], rtol=1e-4, atol=1e-6)


def test_an_odd_batch_at_the_end_of_an_epoch_is_a_step_of_its_own(data, gradients):
    batches = data.train.batches(token_budget=200, seed=0)
    assert len(batches) % 2 == 1
    fitted = fit(toy_model(), data, epochs=2, accumulate=2, token_budget=200)
    assert len(gradients) == fitted.history[-1]["step"] == len(batches) + 1


def test_the_gradient_is_clipped_as_a_whole(data, gradients):
    options = {"epochs": 1, "learning_rate": 1e-2, "token_budget": 10_000}
    fit(toy_model(prior=Independent()), data, gradient_clip=math.inf, **options)
    fit(toy_model(prior=Independent()), data, gradient_clip=1e-3, **options)
    fit(toy_model(prior=Independent()), data, gradient_clip=1e6, **options)
    free, clipped, wide = ([gradient.flatten() for gradient in step] for step in gradients)
    norm = torch.cat(free).norm()
    assert norm > 1e-2
    assert torch.cat(clipped).norm() == pytest.approx(1e-3, rel=1e-3)
    # one factor for all parameters, so that the direction stays
    torch.testing.assert_close(torch.cat(clipped), torch.cat(free) * (1e-3 / norm), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(torch.cat(wide), torch.cat(free), rtol=0, atol=0)


def test_a_parameter_without_gradient_stays_put():
    # weight decay would shrink it: it would be a second prior, around 0
    idle = toy_data(train=(8, 8, 0))
    model = toy_model(prior=Independent())
    fitted = fit(model, idle, epochs=3, learning_rate=1e-2, token_budget=128)
    theta, _ = fitted.weights()
    for name, start in model.starts.items():
        torch.testing.assert_close(theta[name][2], start, rtol=0, atol=0)
        assert not torch.equal(theta[name][0], start)


def test_a_task_without_documents_is_given_the_global_mean():
    fitted = fit(toy_model(prior=HierarchicalNormal(tau=1)), toy_data(train=(8, 8, 0)), epochs=2, token_budget=128)
    theta, mean = fitted.weights()
    for name, value in theta.items():
        torch.testing.assert_close(value[2], mean[name], rtol=0, atol=0)
    assert fitted.deviation_norms()[2] == 0 < fitted.deviation_norms()[0]


def test_only_the_latents_are_trained(data):
    model = toy_model(adapter=FrozenALoRA(rank=2))
    fixed = copy.deepcopy(model.fixed)
    base = copy.deepcopy(model.backbone.model.state_dict())
    fitted = fit(model, data, epochs=1, token_budget=128)
    assert_same(model.fixed, fixed)
    assert_same(model.backbone.model.state_dict(), base)
    assert all("lora_A" not in name for name in parameters(fitted))


# Randomness


def test_same_seed_same_bits_and_another_seed_another_order(data):
    options = {"epochs": 2, "token_budget": 64}
    first, again, other = (fit(toy_model(), data, seed=seed, **options) for seed in (3, 3, 4))
    assert_same(parameters(first), parameters(again))
    assert without_times(first.history) == without_times(again.history)
    assert first.history[0]["loss"] != other.history[0]["loss"]
    orders = [[batch.index.tolist() for batch in data.train.batches(token_budget=64, seed=epoch_seed(s, 0))] for s in (3, 4)]
    assert orders[0] != orders[1]


def test_each_epoch_has_its_own_order(data):
    orders = [[b.index.tolist() for b in data.train.batches(token_budget=64, seed=epoch_seed(0, e))] for e in range(2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("seed", [42_950, 123_456_789, 2**32 - 1])
def test_every_seed_that_the_configuration_allows_can_be_used(data, seed):
    assert fit(toy_model(), data, epochs=1, seed=seed, token_budget=10_000).best_epoch == 1


def test_no_state_is_left_behind(data):
    before = torch.get_rng_state()
    fit(toy_model(), data, epochs=1, token_budget=10_000)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store()) == []


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
    assert all(set(epoch) == {*keys, "validation_perplexity", "seconds"} for epoch in epochs)
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


@pytest.mark.parametrize("task_subsampling", [False, True])
def test_a_batch_in_parts_takes_the_step_of_the_whole(data, task_subsampling):
    options = {"epochs": 2, "token_budget": 128, "task_subsampling": task_subsampling}
    whole = fit(toy_model(prior=HierarchicalNormal(tau=10)), data, **options)
    model = toy_model(prior=HierarchicalNormal(tau=10))
    model.backbone.pass_tokens = 40
    parts = fit(model, data, **options)
    assert [entry["loss"] for entry in parts.history] == pytest.approx([entry["loss"] for entry in whole.history], rel=1e-5)
    for name, value in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], value, rtol=1e-3, atol=1e-4)
