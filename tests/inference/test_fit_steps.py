"""How the loop steps: its schedule, its gradients, its random numbers, and batches in parts."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bora_pyro import (
    FrozenALoRA,
    HierarchicalNormal,
    Independent,
    fit,
    map_guide,
)
from bora_pyro.inference.best_state import BestState
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.schedule import epoch_seed, schedule
from tests.inference.fit_state import assert_same, parameters
from tests.tiny_base import toy_data, toy_model, without_times


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


def test_a_constant_schedule_stays_where_the_warm_up_ends():
    assert [schedule(step, 100, 0.1, "constant") for step in range(10)] == [schedule(step, 100, 0.1) for step in range(10)]
    assert {schedule(step, 100, 0.1, "constant") for step in range(9, 100)} == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_steps_use_the_schedule_over_all_epochs(data, kind):
    steps = []
    options = {"epochs": 4, "learning_rate": 2e-3, "warmup": 0.25, "token_budget": 128, "schedule": kind}
    fit(toy_model(), data, **options, on_step=lambda r: steps.append(dict(r)))
    total = len(steps)
    assert total == steps[-1]["total"] == 4 * len(data.train.batches(token_budget=128, seed=0))
    expected = [2e-3 * schedule(step, total, 0.25, kind) for step in range(total)]
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


def test_only_the_latents_are_trained(data):
    model = toy_model(adapter=FrozenALoRA(rank=2))
    fixed = copy.deepcopy(model.fixed)
    base = copy.deepcopy(model.backbone.model.state_dict())
    fitted = fit(model, data, epochs=1, token_budget=128)
    assert_same(model.fixed, fixed)
    assert_same(model.backbone.model.state_dict(), base)
    assert all("lora_A" not in name for name in parameters(fitted))


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


def test_callbacks_are_told_before_the_passes_of_each_step(data, monkeypatch):
    """Between ``before_passes`` and ``before_step`` are the passes of a step, and no others: not those that measure the norm
    of the gradient at the start and at the end."""
    events = []

    class Record(Callback):
        def before_passes(self, loop):
            events.append("begin")

        def before_step(self, loop):
            events.append("end")

    score, backward = BestState.score, Loop.backward
    monkeypatch.setattr(Loop, "backward", lambda self, *args, **more: events.append("pass") or backward(self, *args, **more))
    monkeypatch.setattr(BestState, "score", lambda self: events.append("score") or score(self))
    fit(toy_model(), data, callbacks=[Record()], epochs=2, token_budget=100, accumulate=2, patience=0)
    text = " ".join(events)
    step = "begin (pass )+end "
    assert re.fullmatch(f"(score )+(pass )+({step})+(score )+({step})+(score )+(pass ?)+", text)
    assert "pass pass" in text
