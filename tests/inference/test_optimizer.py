"""The optimiser of a fit: which parameters are deviations, their rate, and their moments when τ changes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta

from bora_pyro import HierarchicalNormal, Independent, InputError, LearnedPrecision, Pooled, fit
from bora_pyro.guides import GUIDES, init_to_start, make_parameters
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.inference.averaging import TrajectoryMean
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.optimizer import (
    LARGEST,
    NATS,
    Rates,
    adamw,
    deviation_parameters,
    deviation_rate,
    gradient_factors,
    rescale,
    take_step,
    variance,
)
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.schedule import schedule
from tests.tiny import tiny_bora
from tests.tiny_base import toy_data, toy_model

LATENTS = {"q_proj.lora_A", "q_proj.lora_B"}


@pytest.mark.parametrize("kind", ["map", "normal", "low_rank", "auto_normal"])
@pytest.mark.parametrize(
    ("prior", "whitened"),
    [
        (HierarchicalNormal(10.0), True), (LearnedPrecision(), True), (HierarchicalNormal(10.0, "centered"), False),
        (Independent(), False), (Pooled(), False),
    ],
    ids=repr,
)  # fmt: skip
def test_the_centres_of_whitened_deviations_are_found_in_every_guide(kind, prior, whitened):
    model = tiny_bora(targets=["q_proj"], tasks=2, prior=prior)
    guide = GUIDES[kind](model)
    make_parameters(guide, model)
    found = deviation_parameters(guide)
    assert set(found.values()) == (LATENTS if whitened else set())
    assert len(found) == (2 if whitened else 0)
    shapes = {name: value.shape for name, value in guide.named_parameters()}
    for name, latent in found.items():
        assert shapes[name][1:] == model.starts[latent].shape
        assert "scale" not in name


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_deviations_can_move_the_whole_reach(kind):
    for steps, rate in ((60, 0.003), (200, 0.01)):
        largest = deviation_rate(rate, 4.0, steps, 0.1, kind)
        assert sum(largest * schedule(step, steps, 0.1, kind) for step in range(steps)) == pytest.approx(4.0)
    assert deviation_rate(0.01, 4.0, 10_000, 0.1) == 0.01  # far enough without help
    assert deviation_rate(0.01, 0.0, 60, 0.1) == 0.01
    assert deviation_rate(0.01, 4.0, 3, 0.1) == LARGEST  # a fit of three steps does not jump


def test_a_fit_moves_deviations_at_their_own_rate():
    model, data = toy_model(prior=HierarchicalNormal(tau=1)), toy_data()
    moved = {}
    for reach in (0.0, 4.0):
        loop = Loop(model, data, GUIDES["map"](model), epochs=1, learning_rate=1e-6, token_budget=64, deviation_reach=reach)
        loop.run_epoch()
        sites = loop.state.sites()
        z = torch.cat([value.flatten() for name, value in sites.items() if name.endswith("_decentered")])
        moved[reach] = float(z.abs().max())
    assert moved[0.0] <= 1e-6 * loop.total_steps < 1e-3 < moved[4.0] <= 4.0


def test_a_step_costs_a_task_a_limited_number_of_nats():
    """For documents with Fisher information H, a step of size r in every entry costs r² tr(H)/2 if the signs are random."""
    rates = Rates(1.0, shared=0.01, deviations=5.0, per_square=torch.tensor([1.0, 1.0, 4.0, 1.0]))
    trace = torch.tensor([3000.0, 500.0, 3000.0, 1e-9])
    limited = rates.of_deviations(trace)
    assert (rates.of_deviations(torch.zeros(4)) == 0.01).all()  # no gradient yet
    torch.testing.assert_close(0.5 * limited[:3].square() * trace[:3], NATS / torch.tensor([1.0, 1.0, 4.0]))
    assert limited[3] == 5.0  # documents that say little allow the whole rate


@pytest.mark.parametrize(("tau", "least", "moved"), [(4.0, 0.0, 0.01), (100.0, 0.0, 0.006), (4.0, 0.04, 0.02), (4.0, 1.0, 0.03)])
def test_a_deviation_moves_no_faster_than_other_parameters(tau, least, moved):
    """z may move by 0.06, which is 0.06/√τ in units of the weights; the learning rate is 0.01."""
    z = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer, rates = adamw([], [z]), Rates(1.0, 0.01, 0.06, per_square=torch.tensor(1.0), least=least)
    for gradient in (1.0, 1.0 + 1e-3):  # the first step does not know the variance of the gradient yet
        before = z.detach().clone()
        z.grad = torch.full_like(z, gradient)
        take_step(optimizer, rates, {z: torch.tensor(tau)})
    torch.testing.assert_close((before - z.detach()) / tau**0.5, torch.full((2, 3), moved), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prior", [HierarchicalNormal(1e-3), LearnedPrecision("task", 1e-3, every=1000)], ids=["one", "by task"])
@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_the_learning_rate_limits_the_deviations_of_a_fit(prior, drawn):
    """Under τ = 1e-3 the rate of z would move a deviation by 5 in a step."""
    model, data = toy_model(prior=prior), toy_data()
    loop = Loop(model, data, GUIDES["map"](model), epochs=400, learning_rate=0.01, token_budget=40, deviation_reach=4000.0,
                task_subsampling=drawn, gradient_clip=math.inf)  # fmt: skip
    least, steps = loop._rates.least, loop.steps_per_epoch
    assert least == 0.01 < LARGEST == loop._rates.deviations
    before = {name: value.clone() for name, value in loop.state.sites().items()}
    loop.run_epoch()
    moved = [(value - before[name]).abs().max() for name, value in loop.state.sites().items() if name.endswith("_decentered")]
    assert 0 < max(moved) <= 1.5 * steps * least


def test_each_task_has_its_own_limit():
    """A task with many documents goes slower than the others, and no entry goes much faster than its task's rate."""
    model, data = toy_model(prior=HierarchicalNormal(tau=0.01)), toy_data(train=(40, 2, 2))
    options = {"epochs": 4, "learning_rate": 0.01, "token_budget": 40, "deviation_reach": 1e3}
    loop = Loop(model, data, GUIDES["map"](model), **options)
    seen, of_deviations = [], Rates.of_deviations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rates, "of_deviations", lambda rates, noise: seen.append(of_deviations(rates, noise)) or seen[-1])
        loop.run_epoch()
        before = {name: value.clone() for name, value in loop.state.sites().items()}
        first = len(seen)
        loop.run_epoch()
    rates = torch.stack(seen[first:])
    assert rates.mean(0)[0] < 0.8 * rates.mean(0)[1:].min()
    for name, value in loop.state.sites().items():
        if name.endswith("_decentered"):
            assert ((value - before[name]).flatten(1).abs().amax(1) <= 1.5 * rates.sum(0)).all()


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_the_moments_give_the_trace_of_the_fisher_information(drawn):
    """With steps that hold still and hold one document each, the limit sees most of Σ_n |∇ log p(w_n)|², the mean over tasks."""
    model = toy_model(prior=HierarchicalNormal(tau=1))
    data = toy_data(train=(2, 2, 2))
    loop = Loop(model, data, GUIDES["map"](model), epochs=200, learning_rate=1e-30, token_budget=2, deviation_reach=1e-30,
                task_subsampling=drawn, gradient_clip=math.inf)  # fmt: skip
    seen = []
    of_deviations = Rates.of_deviations

    def spy(rates, noise):
        seen.append(float((rates.per_square * noise).mean()))
        return of_deviations(rates, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rates, "of_deviations", spy)
        for _ in range(40):
            loop.run_epoch()
    assert loop.steps_per_epoch == 6  # a document a step
    theta = {name: value.expand(3, *value.shape[1:]) for name, value in loop.fitted.weights()[0].items()}
    batch = data.train.batches(token_budget=10_000)[0]
    gradients = document_gradients(model, theta, batch)
    expected = sum(value.square().sum() for value in gradients.values()) / 3  # τ = 1: the same with respect to z
    # the mean gradient is left out: with two documents in six steps it is a third of the squares at most, in two steps all of it
    assert (0.3 if drawn else 0.55) * float(expected) < sum(seen[-120:]) / 120 < 1.01 * float(expected)


@pytest.mark.parametrize("reach", [-1.0, math.inf, math.nan])
def test_a_reach_that_is_not_allowed_is_refused(reach):
    with pytest.raises(InputError, match=r"deviation_reach is .*; give a finite number from 0 \(one rate for all\) up"):
        fit(toy_model(), toy_data(), deviation_reach=reach)


def test_rescaled_moments_are_those_of_rescaled_gradients():
    gradients, factor = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(0.1)
    first, second = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    optimizers = [adamw([], [parameter]) for parameter in (first, second)]
    for gradient in gradients:
        for parameter, optimizer, scale in ((first, optimizers[0], 1.0), (second, optimizers[1], factor)):
            parameter.grad = scale * gradient
            take_step(optimizer, Rates(1.0, 0.01, 0.01, per_square=torch.zeros(())))
    rescale(optimizers[0], [(first, factor)])
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizers[0].state[first][key], optimizers[1].state[second][key])
    rescale(adamw([], [first]), [(first, factor)])  # before the first step there is nothing to rescale


def test_the_gradient_of_whitened_deviations_goes_with_the_inverse_root_of_tau():
    z, factor = torch.tensor([0.3, -0.2]), gradient_factors({"x": torch.tensor(4.0)}, {"x": torch.tensor(100.0)})["x"]
    gradients = []
    for tau in (4.0, 100.0):
        value = z.clone().requires_grad_()
        (3 * value / math.sqrt(tau)).sum().backward()
        gradients.append(value.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * factor)


def test_the_variance_of_gradients_by_hand():
    """A gradient that stays the same has none; one that jumps between ±1 has 1, less the square of its running mean."""
    first, second, steps = torch.zeros(2, 4), torch.zeros(2, 4), 200
    for step in range(steps):
        gradient = torch.tensor([[1.0], [(-1.0) ** step]]).expand(2, 4)
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient.square()
    same, jumping = variance(first, second, torch.tensor(steps)).tolist()
    assert same == pytest.approx(0, abs=1e-4)
    assert jumping == pytest.approx(4 * (1 - (0.1 / 1.9) ** 2), rel=1e-3)


def learned_over_true(true, start, *, rate, steps, seed):
    """τ learned for a linear-Gaussian hierarchy of 25 tasks, 8 training and 8 validation documents each, over the true one."""
    tasks, count, generator = 25, 8, torch.Generator().manual_seed(seed)
    noise = math.sqrt(count / true)
    theta = true**-0.5 * torch.randn((tasks, 1, 100), generator=generator)
    y = theta + noise * count**-0.5 * torch.randn((tasks, 1, 100), generator=generator)
    task = torch.arange(tasks).repeat_interleave(8)
    held_out = theta[task] + noise * torch.randn((len(task), 1, 100), generator=generator)
    prior = LearnedPrecision("model", start)

    def weights():
        return prior.sample_latent("x", y.mean(0), pyro.plate("tasks", tasks, dim=-1))

    def model():
        value = weights()
        with pyro.plate("means", tasks, dim=-1):
            pyro.sample("y", dist.Normal(value, noise * count**-0.5).to_event(2), obs=y)

    guide, elbo, warmup = AutoDelta(model, init_loc_fn=init_to_start), TraceMeanField_ELBO(), FitOptions().warmup
    guide()
    parameters = dict(guide.named_parameters())
    own = [parameters[name] for name in deviation_parameters(guide)]
    optimizer, largest = adamw(parameters.values(), own), deviation_rate(rate, FitOptions().deviation_reach, steps, warmup)
    looks, mean = torch.randperm(len(task), generator=generator).split(16), TrajectoryMean({"tau": torch.tensor(math.log(start))})
    for step in range(steps):
        with pyro.validation_enabled(False):
            elbo.differentiable_loss(model, guide).backward()
        take_step(optimizer, Rates(schedule(step, steps, warmup), rate, largest, per_square=torch.ones(())))
        if (step + 1) % prior.every == 0:
            with torch.no_grad():
                values, chosen = poutine.condition(weights, data=guide.median())(), looks[step // prior.every % len(looks)]
            before, documents = prior.precision("x", y), task[chosen]
            gradients = (held_out[chosen] - values[documents]) / noise**2
            prior.learn({"x": (values - values.mean(0))[documents]}, {"x": gradients}, documents)
            rescale(optimizer, ((parameter, (before / prior.precision("x", y)).sqrt()) for parameter in own))
        mean.add({"tau": prior.precision("x", y).log()})
    return float(mean.values["tau"].exp()) / true


@pytest.mark.parametrize(("steps", "factor"), [(60, 1.5), (200, 1.2)])
@pytest.mark.parametrize("start", [1.0, 1e4])
@pytest.mark.parametrize(("true", "rate"), [(1.0, 0.003), (1e4, 0.03)])
def test_a_short_fit_learns_the_tau_of_the_tasks(true, rate, start, steps, factor):
    logs = [math.log(learned_over_true(true, start, rate=rate, steps=steps, seed=seed)) for seed in range(3)]
    assert abs(sum(logs) / 3) < math.log(factor)
