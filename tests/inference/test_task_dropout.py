"""Task dropout and the epoch that Θ chooses: what the documents of a task without its deviation say, and which state is kept."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, Independent, InputError, LearnedPrecision, Pooled, fit
from bora_pyro.guides import map_guide, normal_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import FitStopped
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.task_dropout import TaskDropout
from bora_pyro.priors import RandomPrecision
from tests.inference.fit_state import assert_same, parameters
from tests.tiny import tiny_batch, tiny_bora, tiny_data
from tests.tiny_base import toy_data, toy_model, without_times

COUNTS = (3, 1, 4)
PRIORS = [HierarchicalNormal(10.0), HierarchicalNormal(10.0, "centered"), LearnedPrecision("task"), RandomPrecision()]
DROPPED = torch.tensor([True, False, True])
DRAWN = pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])


def traced(model, batch, sites):
    trace = poutine.trace(poutine.condition(model, data=sites)).get_trace(batch)
    trace.compute_log_prob()
    return trace


def any_sites(model):
    with poutine.seed(rng_seed=1):
        trace = poutine.trace(model.weights).get_trace()
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "tasks"}


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_documents_of_a_dropped_task_are_read_with_theta_alone(prior):
    model, batch = tiny_bora(prior=prior), tiny_batch(COUNTS)
    sites = any_sites(model)
    theta, mean = model.weights_given(sites)
    expected = {name: torch.where(DROPPED[:, None, None, None], mean[name], theta[name]) for name in theta}
    dropout = TaskDropout(model, 0.5)
    dropout.dropped = DROPPED
    with poutine.trace() as alone:
        model.likelihood(model, expected, batch)
    found, plain = traced(dropout, batch, sites), traced(model, batch, sites)
    torch.testing.assert_close(found.nodes["tokens"]["log_prob_sum"], alone.trace.log_prob_sum())
    assert float(found.nodes["tokens"]["log_prob_sum"]) != pytest.approx(float(plain.nodes["tokens"]["log_prob_sum"]), rel=1e-4)
    for name in sites:  # the prior is that of the model
        assert found.nodes[name]["log_prob_sum"].equal(plain.nodes[name]["log_prob_sum"])


def test_a_dropped_task_has_the_gradient_of_its_prior():
    model, batch = tiny_bora(prior=HierarchicalNormal(10.0)), tiny_batch(COUNTS)
    loop = Loop(model, tiny_data(COUNTS), map_guide(model), task_dropout=0.5)
    with torch.no_grad():
        for parameter in loop.state.shared:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    dropout = TaskDropout(model, 0.5)
    dropout.dropped = DROPPED
    loop.backward(batch, dropout, validate=False)
    z = dict(loop.guide.named_parameters())["theta.v_proj.lora_A_decentered_unconstrained"]
    torch.testing.assert_close(z.grad[DROPPED] * loop.observations, z.detach()[DROPPED])
    assert not torch.allclose(z.grad[~DROPPED] * loop.observations, z.detach()[~DROPPED])


def test_each_task_is_dropped_with_its_probability():
    dropout, number = TaskDropout(tiny_bora(tasks=50), 0.3), 400
    with poutine.seed(rng_seed=0):
        drawn = []
        for _ in range(number):
            dropout.draw()
            drawn.append(dropout.dropped)
    rate = torch.stack(drawn).double().mean()
    assert float(rate) == pytest.approx(0.3, abs=4 * (0.21 / (50 * number)) ** 0.5)
    assert len({tuple(each.tolist()) for each in drawn}) == number


@pytest.mark.parametrize("guide", [map_guide, normal_guide])
def test_steps_that_draw_all_tasks_are_the_ordinary_ones(guide):
    options = {"epochs": 4, "token_budget": 10_000, "patience": 0, "learning_rate": 0.03, "task_dropout": 0.5}
    one, other = (
        fit(model, tiny_data(COUNTS), guide=guide(model), task_subsampling=drawn, **options)
        for model, drawn in ((tiny_bora(), False), (tiny_bora(), True))
    )
    for name, value in one.sites().items():
        torch.testing.assert_close(other.sites()[name], value, rtol=1e-4, atol=1e-4)


@DRAWN
def test_a_fit_that_is_taken_up_again_drops_the_same_tasks(tmp_path, drawn):
    def whole(**more):
        options = {"epochs": 3, "token_budget": 12, "task_subsampling": drawn, "task_dropout": 0.4, "kept_by": "global_mean"}
        return fit(tiny_bora(), tiny_data(COUNTS), **options, **more)

    straight, seen = whole(), []
    with pytest.raises(FitStopped):
        whole(checkpoints=tmp_path, stop=lambda: len(seen) == 2, on_step=seen.append)
    resumed = whole(checkpoints=tmp_path)
    assert_same(parameters(resumed), parameters(straight))
    assert without_times(resumed.history) == without_times(straight.history)
    assert resumed.global_mean_score == straight.global_mean_score


@DRAWN
@pytest.mark.parametrize(
    "prior",
    [lambda: HierarchicalNormal(0.3), lambda: LearnedPrecision(start=0.3, every=1000)],
    ids=["fixed", "learned"],
)
def test_theta_chooses_the_epoch_that_it_predicts_best_at(prior, drawn):
    data, options = toy_data(), {"epochs": 5, "learning_rate": 0.1, "token_budget": 64, "patience": 0}
    options["task_subsampling"] = drawn
    by_tasks, by_mean = (fit(toy_model(prior=prior()), data, kept_by=kept_by, **options) for kept_by in ("tasks", "global_mean"))
    measured = [entry["validation_perplexity_global_mean"] for entry in by_mean.history]
    assert by_mean.best_epoch == 1 + measured.index(min(measured))
    assert by_mean.global_mean_score == min(measured)
    # the steps are the same; only the epoch that is kept differs
    assert [entry["validation_perplexity"] for entry in by_mean.history] == [
        entry["validation_perplexity"] for entry in by_tasks.history
    ]
    assert by_mean.best_epoch != by_tasks.best_epoch
    assert by_mean.validation_score > by_tasks.validation_score
    theta, mean = by_mean.weights()
    (of_tasks,) = evaluate(by_mean.model, data.validation, theta)
    (of_mean,) = evaluate(by_mean.model, data.validation, {name: mean[name].expand_as(value) for name, value in theta.items()})
    assert of_tasks.perplexity() == pytest.approx(by_mean.validation_score, rel=1e-5)
    assert of_mean.perplexity() == pytest.approx(by_mean.global_mean_score, rel=1e-5)
    assert by_tasks.global_mean_score is None


def test_under_one_adapter_for_all_neither_changes_anything():
    options = {"epochs": 2, "token_budget": 64}
    usual = fit(toy_model(prior=Pooled()), toy_data(), **options)
    other = fit(toy_model(prior=Pooled()), toy_data(), task_dropout=0.5, kept_by="global_mean", **options)
    torch.testing.assert_close(parameters(other), parameters(usual), rtol=1e-4, atol=1e-6)
    assert other.global_mean_score == other.validation_score == pytest.approx(usual.validation_score)


@pytest.mark.parametrize(("option", "value"), [("task_dropout", 0.25), ("kept_by", "global_mean")])
def test_independent_tasks_have_no_theta(option, value):
    with pytest.raises(InputError, match=rf"{option} is {value}, but under Independent\(\) the tasks have no common Theta"):
        fit(tiny_bora(prior=Independent()), tiny_data(COUNTS), **{option: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_probability_out_of_range_is_refused(value):
    with pytest.raises(InputError, match=f"task_dropout is {value}; give a probability from 0"):
        fit(tiny_bora(), tiny_data(COUNTS), task_dropout=value)


def test_a_fit_whose_epochs_were_chosen_by_its_tasks_goes_on_in_this_way(tmp_path):
    options = {"token_budget": 12, "checkpoints": tmp_path}
    fit(tiny_bora(), tiny_data(COUNTS), epochs=1, **options)
    with pytest.raises(InputError, match=r"kept_by is global_mean, but the epochs of checkpoint .* were chosen by the tasks"):
        fit(tiny_bora(), tiny_data(COUNTS), epochs=2, kept_by="global_mean", **options)
    assert len(fit(tiny_bora(), tiny_data(COUNTS), epochs=2, **options).history) == 2
