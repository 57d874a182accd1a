from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, fit
from bora_pyro.data import TaskData
from bora_pyro.guides.curvature import document_gradients
from bora_pyro.priors import ByLatent, Pooled
from bora_pyro.priors.learned import BOUNDS, PER
from tests.inference.test_fit import scripted
from tests.tiny import random_weights, tiny_batch, tiny_bora, tiny_data, tiny_split

SHAPE = (2, 3)  # layers, and one latent number a column
TASKS = 4


def prepared(prior, names=("x",), tasks=TASKS):
    """The prior once it has seen its latents."""
    plate = pyro.plate("tasks", tasks, dim=-1)
    with poutine.seed(rng_seed=0):
        for name in names:
            prior.sample_latent(name, torch.zeros(SHAPE), plate)
    return prior


def look(*, deviation=1.0, sign=-1.0, documents=8, tasks=TASKS):
    """Tasks at ±deviation around Θ = 0, and documents whose gradients point along (1) or against (-1) their deviations."""
    signs = torch.tensor([(-1.0) ** d for d in range(tasks)])
    theta = deviation * signs[:, None, None].expand(tasks, *SHAPE).contiguous()
    task = torch.arange(documents) % tasks
    return {"x": (theta - theta.mean(0))[task]}, {"x": sign * theta[task]}, task


def shrink(prior, times=1, **options):
    deviations, gradients, task = look(**options)
    for _ in range(times):
        prior.learn(deviations, gradients, task)
    return prior


def test_one_step_by_hand():
    prior = prepared(LearnedPrecision("model", start=100.0, rate=0.5))
    shrink(prior)
    # 8 documents that agree wholly: the mean slope over its root mean square is -1, shrunk by 2 documents of slope 0
    first = 8 / (8 + 2)
    assert prior.tau["x"].item() == pytest.approx(100 * math.exp(0.5 * first * (1 + first**2)), rel=1e-6)
    shrink(prior)
    # the first look counts half beside the second
    more = 8 * 1.5 / (8 * 1.5 + 2)
    steps = sum(agreement * (1 + agreement**2) for agreement in (first, more))
    assert prior.tau["x"].item() == pytest.approx(100 * math.exp(0.5 * steps), rel=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("per", PER)
def test_larger_deviations_where_held_out_documents_ask_for_them(per, sign):
    prior = shrink(prepared(LearnedPrecision(per)), sign=sign)
    assert all(((value < 100.0) if sign > 0 else (value > 100.0)).all() for value in prior.tau.values())


@pytest.mark.parametrize("per", PER)
def test_documents_in_several_processes_say_the_same_together(per):
    """Each process has some of the documents; what they add up is what one process sees of all."""
    deviations, gradients, task = look(documents=10)
    together, told = prepared(LearnedPrecision(per)), []
    together.learn(deviations, gradients, task, all_reduce=lambda value: told.append(value) or value)
    parts = [torch.arange(10) % 3 == 0, torch.arange(10) % 3 > 0]
    sums = []
    for part in parts:
        own = [{"x": value["x"][part]} for value in (deviations, gradients)]
        prepared(LearnedPrecision(per)).learn(*own, task[part], all_reduce=lambda value: sums.append(value) or value)
    torch.testing.assert_close(sums[0] + sums[1], told[0])
    apart = prepared(LearnedPrecision(per))
    apart.learn(*own, task[part], all_reduce=lambda value: sums[0] + value)
    torch.testing.assert_close(apart.tau, together.tau)


@pytest.mark.parametrize(("per", "shape"), [("site", ()), ("model", ()), ("layer", (2, 1)), ("task", (TASKS, 1, 1))])
def test_what_has_a_precision_of_its_own(per, shape):
    prior = prepared(LearnedPrecision(per), names=("x", "y"))
    assert prior.precision("x", torch.zeros(SHAPE)).shape == shape
    assert prior.sites_of("x", torch.ones(TASKS, *SHAPE), torch.zeros(SHAPE))["theta.x_decentered"].unique().tolist() == [10.0]


def test_one_odd_task_gets_a_precision_of_its_own():
    prior = prepared(LearnedPrecision("task"))
    deviations, gradients, task = look(documents=16)
    gradients["x"][task == 2] *= -1
    for _ in range(6):
        prior.learn(deviations, gradients, task)
    tau = prior.tau["x"].flatten()
    assert tau[2] < tau[[0, 1, 3]].min() / 4
    assert torch.allclose(tau[0], tau[[1, 3]])


@pytest.mark.parametrize(("sign", "bound"), [(-1.0, BOUNDS[1]), (1.0, BOUNDS[0])])
def test_stays_within_the_bounds(sign, bound):
    """Where tasks are identical τ grows to the upper bound, where nothing is shared it falls to the lower."""
    assert shrink(prepared(LearnedPrecision("site")), times=60, sign=sign).tau["x"].item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("per", PER)
def test_no_deviations_no_numbers_lost(per):
    """At the start all tasks are at Θ: nothing can be learned, and nothing breaks."""
    prior = shrink(prepared(LearnedPrecision(per)), deviation=0.0)
    assert prior.tau["x"].flatten().unique().tolist() == [100.0]


@pytest.mark.parametrize("per", PER)
def test_the_state_goes_on_bit_for_bit(per):
    prior, copy = prepared(LearnedPrecision(per)), prepared(LearnedPrecision(per))
    copy.load_state(shrink(prior, times=3).state())
    shrink(prior, sign=1.0), shrink(copy, sign=1.0)
    assert prior.state().keys() == copy.state().keys()
    assert all(torch.equal(value, copy.state()[name]) for name, value in prior.state().items())


def test_prints_its_precision():
    prior = prepared(LearnedPrecision("site", start=1000))
    assert repr(prior) == "LearnedPrecision(per='site', start=1000)"
    assert repr(shrink(prior)) == f"LearnedPrecision(per='site', tau={{x: {prior.tau['x'].item():.3g}}})"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "tasks"}, "per is 'tasks'; allowed: site, layer, task, model; did you mean 'task'?"),
        ({"start": 0.0}, "start 0.0 is not allowed; tau is learned between 0.001 and 1e+09"),
        ({"start": math.nan}, "start nan is not allowed; tau is learned between 0.001 and 1e+09"),
        ({"every": 0}, "every is 0; give a whole number from 1 up"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError) as caught:
        LearnedPrecision(**options)
    assert str(caught.value) == message


def test_at_its_start_it_is_the_hierarchical_normal():
    batch, weights = tiny_batch(), None
    log_densities = []
    for prior in (LearnedPrecision(start=50.0), HierarchicalNormal(50.0)):
        model = tiny_bora(prior=prior)
        weights = weights or random_weights(model)
        sites = model.sites_given(weights, model.starts)
        trace = poutine.trace(poutine.condition(model, data=sites)).get_trace(batch)
        log_densities.append(trace.log_prob_sum())
    assert log_densities[0] == log_densities[1]


def test_the_slope_is_the_derivative_by_a_factor_on_the_deviations():
    model = tiny_bora("llama", prior=LearnedPrecision("model"))  # whose layers have no kinks
    model.backbone.model.double()
    theta, batch = {name: value.double() for name, value in random_weights(model, scale=0.1).items()}, tiny_batch()
    mean = {name: value.mean(0) for name, value in theta.items()}
    gradients = document_gradients(model, theta, batch)
    slope = sum(float((gradients[name] * (theta[name] - mean[name])[batch.task]).sum()) for name in theta)

    def log_likelihood(factor):
        scaled = {name: mean[name] + factor * (theta[name] - mean[name]) for name in theta}
        site = poutine.trace(model.likelihood).get_trace(model, scaled, batch).nodes["tokens"]
        return float(site["fn"].log_prob(site["value"]).double().sum())

    assert slope == pytest.approx((log_likelihood(1.001) - log_likelihood(0.999)) / 0.002, rel=1e-3)


def learned_fit(tmp_path=None, *, epochs=4, prior=None, **options):
    model = tiny_bora(prior=prior or LearnedPrecision(every=1))
    return fit(model, tiny_data(), epochs=epochs, token_budget=24, patience=0, checkpoints=tmp_path, **options)


def test_a_fit_logs_the_path_of_tau():
    fitted = learned_fit()
    path = [entry for epoch in fitted.history for entry in epoch["tau_path"]]
    assert [entry["step"] for entry in path] == list(range(1, fitted.history[-1]["step"] + 1))
    assert path[-1]["tau"].keys() == fitted.model.starts.keys()
    assert all(0 < tau < math.inf for entry in path for tau in entry["tau"].values())
    assert len({entry["tau"]["q_proj.lora_B"] for entry in path}) > 2


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    class Stopped(Exception):
        pass

    def stop(report):
        if report["epoch"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        learned_fit(tmp_path, on_epoch=stop)
    resumed, whole = learned_fit(tmp_path), learned_fit()
    assert resumed.tau_by_group() == whole.tau_by_group()
    assert all(torch.equal(value, whole.sites()[name]) for name, value in resumed.sites().items())


def test_the_best_state_has_its_own_tau(monkeypatch):
    """θ of the epoch that is kept is built with the τ of that epoch."""
    scripted(monkeypatch, [5.0, 3.0, 4.0, 4.0])
    fitted = learned_fit(epochs=4, learning_rate=0.03, average=False)
    assert fitted.best_epoch == 2
    kept, last = (fitted.history[epoch]["tau_path"][-1]["tau"] for epoch in (1, 3))
    assert fitted.tau_by_group() == pytest.approx(kept, rel=1e-6)
    assert kept != pytest.approx(last, rel=1e-3)


def test_tau_as_one_number_expects_the_same_squared_distance():
    fitted = learned_fit()
    entries = {name: start.numel() for name, start in fitted.model.starts.items()}
    distance = sum(entries[name] / tau for name, tau in fitted.tau_by_group().items())
    assert sum(entries.values()) / fitted.tau() == pytest.approx(distance, rel=1e-5)


def test_needs_validation_documents():
    data = tiny_data()
    data = TaskData(data.tasks, data.train, tiny_split((0, 0, 0)), data.test)
    with pytest.raises(InputError) as caught:
        fit(tiny_bora(prior=LearnedPrecision()), data, epochs=1)
    assert str(caught.value) == (
        "LearnedPrecision(per='site', start=100) is learned from validation documents, and there are none; give more documents, "
        "or a fixed tau"
    )


def test_beside_latents_that_all_tasks_share():
    prior = ByLatent({"lora_A": Pooled()}, other=LearnedPrecision(every=2))
    fitted = learned_fit(prior=prior)
    assert prior.every == 2
    assert all(tau == (math.inf if "lora_A" in name else pytest.approx(tau)) for name, tau in fitted.tau_by_group().items())
    assert any(tau not in (math.inf, 100.0) for tau in fitted.tau_by_group().values())


def test_under_robust_a_task_counts_at_most_as_much_as_a_typical_one():
    """One look by hand: four tasks, of which one deviates ten times as far, with slopes of one sign."""
    scale = torch.tensor([1.0, 1.0, 1.0, 10.0])
    deviations = scale[:, None, None].expand(4, *SHAPE)
    gradients = -deviations
    for robust, weights in ((False, [1.0, 1.0, 1.0, 1.0]), (True, [1.0, 1.0, 1.0, (13 / 4) ** 2 / 100])):
        prior = prepared(LearnedPrecision("model", robust=robust, rate=0.5))
        prior.learn({"x": deviations}, {"x": gradients}, torch.arange(4))
        slopes = -6 * scale.square() * torch.tensor(weights)
        mean = float(slopes.sum() / slopes.square().mean().sqrt()) / (4 + 2)
        step = 0.5 * mean * (1 + mean**2)
        assert prior.tau["x"].item() == pytest.approx(100 * math.exp(-step), rel=1e-5)


@pytest.mark.parametrize("per", PER)
def test_robust_changes_nothing_where_all_deviations_are_equally_large(per):
    robust, usual = (shrink(prepared(LearnedPrecision(per, robust=robust))) for robust in (True, False))
    assert robust.tau["x"].flatten().tolist() == pytest.approx(usual.tau["x"].flatten().tolist(), rel=1e-6)


def test_robust_tolerates_tasks_that_do_not_deviate():
    prior = shrink(prepared(LearnedPrecision(robust=True)), deviation=0.0)
    assert prior.tau["x"].item() == 100.0


def test_robust_prints_itself():
    assert repr(LearnedPrecision(robust=True)) == "LearnedPrecision(per='site', start=100, robust=True)"
