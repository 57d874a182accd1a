"""Steps that hold some of the tasks: unbiased, the same as the ordinary ones where they hold all, and blind to the others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from bora_pyro import CausalLM, HierarchicalNormal, Independent, InputError, Pooled, evaluate, fit
from bora_pyro.data.batch import TaskDraw
from bora_pyro.guides import GUIDES
from bora_pyro.guides.base import task_sites
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.inference.fit import NonFiniteLossError
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.priors import HierarchicalNorm, LearnedPrecision, RandomPrecision
from tests.tiny import tiny_batch, tiny_bora, tiny_data, tiny_split

COUNTS = (3, 0, 1, 4, 2)
PRIORS = [
    lambda: HierarchicalNormal(10.0), lambda: HierarchicalNormal(10.0, "centered"), Independent, Pooled,
    lambda: LearnedPrecision(start=10.0), lambda: LearnedPrecision("task", 10.0), lambda: HierarchicalNorm(50.0),
]  # fmt: skip
NAMES = ["normal", "centered", "independent", "pooled", "learned", "learned per task", "norm"]
FITTED = ("map", "normal", "task_normal", "ivon", "low_rank", "multivariate_normal", "blob", "subspace", "auto_normal")


def bora(prior):
    return tiny_bora(targets=["q_proj"], tasks=len(COUNTS), prior=prior())


def moved(model, kind="map"):
    """A guide with every tensor away from where it began."""
    guide = GUIDES[kind](model)
    guide(tiny_batch(COUNTS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return guide


def objective(model, guide, batches):
    """KL − log-likelihood and its gradient; for guides with a spread the KL alone, which no draw enters."""
    elbo, total, point = TemperedELBO(), 0.0, not hasattr(guide, "begin")
    guide.zero_grad()
    for batch in batches:
        with pyro.poutine.seed(rng_seed=0):
            loss = elbo.differentiable_loss(model, guide, batch)
        value = loss * batch.share if point else elbo.kl * batch.share
        total += float(value.detach())
        if point:
            value.backward()
    return total, {name: p.grad.clone() for name, p in guide.named_parameters()} if point else {}


# the KL divergence of a guide with a spread is exact where no draw of Θ enters the prior of θ
EXACT = [("map", number) for number in range(7)] + [
    (kind, number) for kind in ("normal", "low_rank") for number in (0, 2, 3, 4, 5)
]


@pytest.mark.parametrize(("kind", "prior"), [(kind, PRIORS[number]) for kind, number in EXACT])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_average_over_the_steps_is_the_full_objective(prior, kind, processes):
    model, split = bora(prior), tiny_split(COUNTS)
    guide = moved(model, kind)
    partition = [torch.arange(5)] if processes == 1 else [torch.tensor([0, 1, 4]), torch.tensor([2, 3])]
    steps = EpochSteps(split, token_budget=20, accumulate=2, seed=0, partition=partition)
    assert len(steps) > 1
    whole, gradient = objective(model, guide, split.batches(token_budget=10_000))
    values, gradients = zip(*(objective(model, guide, step) for step in steps), strict=True)
    assert sum(values) / len(steps) == pytest.approx(whole, rel=1e-5)
    for name, expected in gradient.items():
        average = torch.stack([of_step[name] for of_step in gradients]).mean(0)
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("prior", PRIORS, ids=NAMES)
def test_steps_that_draw_all_tasks_are_the_ordinary_ones(prior, kind):
    options = {"epochs": 4, "token_budget": 10_000, "patience": 0, "learning_rate": 0.03}
    one, other = (
        fit(model, tiny_data(COUNTS), guide=GUIDES[kind](model), task_subsampling=drawn, **options)
        for model, drawn in ((bora(prior), False), (bora(prior), True))
    )
    assert [entry["objective"] for entry in other.history] == pytest.approx(
        [entry["objective"] for entry in one.history], rel=1e-5
    )
    for name, value in one.sites().items():
        torch.testing.assert_close(other.sites()[name], value, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(other.model.prior.state(), one.model.prior.state(), rtol=1e-4, atol=1e-5)


def options_of_loop(**options):
    return {
        "learning_rate": 0.03, "warmup": 0.0, "token_budget": 20, "accumulate": 1, "gradient_clip": 1.0, "seed": 0, "epochs": 2,
        "task_subsampling": True,
    } | options  # fmt: skip


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "in files"])
def test_tasks_that_are_not_drawn_stay_as_they_are(memory):
    model = bora(lambda: HierarchicalNormal(10.0))
    loop = Loop(model, tiny_data(COUNTS), GUIDES["map"](model), **options_of_loop(task_memory=memory))
    rows = loop.state.rows
    assert rows.mapped == (memory == 0)
    batch = tiny_batch((0, 0, 2, 1, 0))
    draw = TaskDraw(torch.tensor([2, 3]), torch.ones(2))
    loop.step([replace(tiny_batch(COUNTS), tasks=TaskDraw(torch.arange(5), torch.ones(5)))], 0.01, 0)
    before = {name: store.all().clone() for group in rows.tensors().values() for name, store in group.items()}
    values = {name: store.all().clone() for name, store in rows.values.items()}
    moments = [{name: store.all().clone() for name, store in group.items()} for group in rows.moments]
    loop.step([replace(batch, tasks=draw)], 0.01, 1)
    assert before
    for old, stores in ((values, rows.values), *zip(moments, rows.moments, strict=True)):
        for name, store in stores.items():
            assert torch.equal(store.all()[[0, 1, 4]], old[name][[0, 1, 4]])
            assert not torch.equal(store.all()[[2, 3]], old[name][[2, 3]])
    assert rows.count.tolist() == [1, 1, 2, 2, 1]
    assert {tuple(value.shape[:1]) for value in rows.parameters.values()} == {(2,)}


@pytest.mark.parametrize("kind", ["map", "normal"])
@pytest.mark.parametrize("prior", [PRIORS[0], PRIORS[4]], ids=["normal", "learned"])
def test_rows_in_files_are_those_in_memory_bit_for_bit(prior, kind):
    fits = []
    for memory in (4.0, 0.0):
        model = bora(prior)
        fits.append(
            fit(model, tiny_data(COUNTS), guide=GUIDES[kind](model), epochs=3, token_budget=20, task_subsampling=True,
                task_memory=memory)
        )  # fmt: skip
    for name, value in fits[0].sites().items():
        torch.testing.assert_close(fits[1].sites()[name], value, rtol=0, atol=0)
    assert fits[0].validation_perplexity == fits[1].validation_perplexity


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "in files"])
@pytest.mark.parametrize(
    "prior", [PRIORS[0], PRIORS[3], PRIORS[4], PRIORS[5]], ids=["normal", "pooled", "learned", "learned per task"]
)
def test_a_fit_taken_up_again_is_the_one_that_was_not_broken_off(prior, memory, tmp_path):
    data = tiny_data(COUNTS)
    options = {"token_budget": 20, "task_subsampling": True, "task_memory": memory, "patience": 0, "epochs": 4}
    whole = fit(bora(prior), data, **options)

    class Stop(Exception):
        pass

    def stop(report):
        if report["epoch"] == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(bora(prior), data, checkpoints=tmp_path, on_epoch=stop, **options)
    again = fit(bora(prior), data, checkpoints=tmp_path, **(options | {"task_subsampling": None}))  # the checkpoint knows
    assert [e["validation_perplexity"] for e in again.history] == [e["validation_perplexity"] for e in whole.history]
    for name, value in whole.sites().items():
        torch.testing.assert_close(again.sites()[name], value, rtol=0, atol=0)
    with pytest.raises(InputError, match="task_subsampling"):
        fit(bora(prior), data, checkpoints=tmp_path, **(options | {"task_subsampling": False}))


@pytest.mark.parametrize("prior", PRIORS, ids=NAMES)
@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "in files"])
def test_what_is_fitted_is_asked_task_by_task_or_all_at_once(prior, memory):
    data = tiny_data(COUNTS)
    fitted = fit(bora(prior), data, epochs=2, token_budget=20, task_subsampling=True, task_memory=memory)
    theta, mean = fitted.weights()
    assert {len(value) for value in theta.values()} == {5}
    for d, of_task, of_all in fitted.each_task():
        for name in theta:
            torch.testing.assert_close(of_task[name], theta[name][d], rtol=0, atol=0)
            torch.testing.assert_close(of_all[name], mean[name])
    squares = sum((theta[name] - mean[name]).flatten(1).square().sum(1) for name in theta)
    torch.testing.assert_close(fitted.deviation_norms(), squares.sqrt(), rtol=1e-4, atol=1e-6)
    (scores,) = evaluate(fitted.model, data.test, theta)
    assert fitted.evaluate(data.test)["test_perplexity"] == pytest.approx(scores.perplexity(), rel=1e-6)


@pytest.mark.parametrize("kind", FITTED)
def test_stock_svi_subsamples_tasks_in_model_and_guide_alike(kind):
    model, split = bora(lambda: HierarchicalNormal(10.0)), tiny_split(COUNTS)
    guide = moved(model, kind)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    batch = EpochSteps(split, token_budget=20, seed=0, partition=[torch.arange(5)])[0][0]
    drawn, others = batch.tasks.index, [d for d in range(5) if d not in batch.tasks.index.tolist()]
    before = {name: value.clone() for name, value in guide.median().items() if name in task_sites(guide)}
    svi.step(batch)
    assert others
    for name, value in before.items():
        after = guide.median()[name]
        assert torch.equal(after[others], value[others])
        assert not torch.equal(after[drawn], value[drawn])


def test_a_guide_is_begun_on_some_of_the_tasks_and_has_rows_for_all():
    for kind in FITTED:
        model = bora(lambda: HierarchicalNormal(10.0))
        guide = GUIDES[kind](model)
        guide(EpochSteps(tiny_split(COUNTS), token_budget=20, seed=0, partition=[torch.arange(5)])[0][0])
        assert {len(value) for name, value in guide.median().items() if name in task_sites(guide)} == {5}


def test_a_guide_that_mixes_tasks_in_one_tensor_is_refused():
    model = bora(lambda: HierarchicalNormal(10.0))
    guide = AutoMultivariateNormal(model)
    with pytest.raises(InputError, match="AutoMultivariateNormal has no tensors of single tasks"):
        fit(model, tiny_data(COUNTS), guide=guide, epochs=1, task_subsampling=True)


def test_many_tasks_are_drawn_unless_one_asks_for_all():
    counts = (2,) * 65
    for prior in (HierarchicalNormal(10.0), RandomPrecision()):
        model = tiny_bora(targets=["q_proj"], tasks=65, prior=prior)
        options = options_of_loop(task_subsampling=None, token_budget=100)
        loop = Loop(model, tiny_data(counts), GUIDES["normal"](model), **options)
        assert type(loop.state).__name__ == "DrawnTasks"
        report = loop.run_epoch(None)
        assert report["loss"] > 0
    model = tiny_bora(targets=["q_proj"], tasks=64)
    loop = Loop(model, tiny_data(counts[:64]), GUIDES["map"](model), **options_of_loop(task_subsampling=None))
    assert type(loop.state).__name__ == "AllTasks"


@pytest.mark.parametrize("memory", [4.0, 0.0], ids=["in memory", "in files"])
@pytest.mark.parametrize("kind", ["map", "normal", "low_rank"])
def test_a_fit_begins_where_another_has_ended(kind, memory):
    data, options = tiny_data(COUNTS), {"token_budget": 20, "task_subsampling": True, "task_memory": memory}
    first = fit(bora(PRIORS[0]), data, epochs=2, **options)
    model = bora(PRIORS[0])
    guide = GUIDES[kind](model, first.sites())
    still = fit(model, data, guide=guide, epochs=1, learning_rate=1e-30, deviation_reach=0.0, **options)
    for name, value in first.sites().items():
        torch.testing.assert_close(still.sites()[name], value)
    again = fit(model, data, guide=still.guide, epochs=1, learning_rate=1e-30, deviation_reach=0.0, **options)  # the same guide
    assert again.validation_perplexity == pytest.approx(still.validation_perplexity, rel=1e-5)
    further = fit(model, data, guide=still.guide, epochs=2, **options)
    assert {len(value) for name, value in further.sites().items() if name in task_sites(guide)} == {5}
    if kind == "map":  # its start counts
        assert further.validation_perplexity <= still.validation_perplexity * (1 + 1e-6)
    else:
        assert not any(torch.equal(value, first.sites()[name]) for name, value in further.sites().items())


@pytest.mark.parametrize("drawn", [False, True])
def test_after_a_loss_that_is_not_finite_the_guide_is_whole_and_fits_again(drawn):
    class Poisoned(CausalLM):
        poison = False

        def __call__(self, model, weights, batch):
            poisoned = {name: value * float("nan") for name, value in weights.items()}
            super().__call__(model, poisoned if self.poison else weights, batch)

    likelihood = Poisoned()
    model = tiny_bora(targets=["q_proj"], tasks=5, prior=HierarchicalNormal(10.0), likelihood=likelihood)
    options = {"token_budget": 20, "task_subsampling": drawn}

    def poison(report):
        likelihood.poison = report["epoch"] == 2

    with pytest.raises(NonFiniteLossError) as caught:
        fit(model, tiny_data(COUNTS), epochs=3, on_step=poison, **options)
    fitted = caught.value.fitted
    assert {len(value) for name, value in fitted.sites().items() if name in task_sites(fitted.guide)} == {5}
    likelihood.poison = False
    assert len(fit(model, tiny_data(COUNTS), guide=fitted.guide, epochs=1, **options).history) == 1


def test_files_that_the_disk_has_no_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(InputError, match=r"takes 0\.0 GiB in files, and .* has 0\.0 GiB free; give a larger task_memory"):
        fit(bora(PRIORS[0]), tiny_data(COUNTS), epochs=1, task_subsampling=True, task_memory=0.0)


def test_where_tasks_have_one_prior_the_average_is_that_of_all():
    model = bora(PRIORS[4])
    loop = Loop(model, tiny_data(COUNTS), GUIDES["map"](model), **options_of_loop())
    loop.run_epoch(None)
    theta = {name: value.clone() for name, value in loop.state.rows.weights(torch.arange(5)).items()}
    batch = replace(tiny_batch((0, 0, 2, 1, 0)), tasks=TaskDraw(torch.tensor([2, 3]), torch.ones(2)))
    _, own, average = loop.state.view(batch, loop.state.totals(loop.processes))
    for name, value in theta.items():
        torch.testing.assert_close(own[name], value[[2, 3]])
        torch.testing.assert_close(average[name], value.mean(0).expand_as(average[name]), rtol=1e-5, atol=1e-6)
