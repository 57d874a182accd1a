"""A new task under a known prior: closed forms, the limits, and that it is as it would be alone."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch
from pyro import poutine

import bora_pyro as bp
from bora_pyro import (
    Backbone,
    BoRA,
    CausalLM,
    HierarchicalNormal,
    Independent,
    InputError,
    LearnedPrecision,
    LoRA,
    Pooled,
    adapt,
    fit,
    load_tasks,
    table,
)
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.data.subset import subset
from bora_pyro.guides import map_guide
from bora_pyro.inference.adapt import ALLOWED, given_model, load_new_tasks
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.clip_by_task import ClipByTask
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import mean_tau
from bora_pyro.inference.task_groups import task_groups
from bora_pyro.priors import Given, HierarchicalNorm, RandomPrecision, with_shared
from tests.linear_gaussian import COUNTS, SHAPE, LinearGaussian
from tests.tiny import random_weights, tiny_bora, tiny_data, tiny_split
from tests.tiny_base import documents, quick_fit, write_table

TAU = 3.0


def joint(model, sites):
    return poutine.trace(poutine.condition(model, data=sites)).get_trace().log_prob_sum()


@pytest.mark.parametrize("tau", [TAU, "by layer", 0.0])
def test_the_maximum_is_between_the_prior_and_the_documents(tau):
    """θ_d = (τ Θ + h_d ȳ_d)/(τ + h_d): there the joint density has no slope."""
    mean = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)
    precision = (
        torch.tensor([[[2.0]], [[9.0]]], dtype=torch.float64) if tau == "by layer" else torch.tensor(tau, dtype=torch.float64)
    )
    model = LinearGaussian(Given({"q.x": mean}, {"q.x": precision}), counts=COUNTS)
    h, y = model.curvature(), model.task_means()
    theta = (precision * mean + h * y) / (precision + h)
    sites = {name: value.requires_grad_() for name, value in model.sites_given({"q.x": theta}, {"q.x": mean}).items()}
    back, of_all = model.weights_given({name: value.detach() for name, value in sites.items()})
    torch.testing.assert_close(back["q.x"], theta)
    torch.testing.assert_close(of_all["q.x"], mean)
    for slope in torch.autograd.grad(joint(model, sites), [*sites.values()]):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-8, rtol=0)


@pytest.mark.parametrize("prior", [HierarchicalNormal(TAU), HierarchicalNorm(20.0)], ids=repr)
def test_the_density_is_the_hierarchy_s_with_its_mean_held(prior):
    """log p(θ | Θ) in the whitened form of both; Θ itself is flat."""
    model = tiny_bora(targets=["q_proj"], prior=prior)
    theta = random_weights(model)
    mean = {name: value.mean(0) for name, value in theta.items()}
    precisions = {name: prior.precision(name, start) for name, start in model.starts.items()}
    given = tiny_bora(targets=["q_proj"], prior=Given(mean, precisions, penalty=prior.penalty))
    one, other = model.sites_given(theta, mean), given.sites_given(theta, mean)
    assert {name: value for name, value in one.items() if not name.startswith("prior_mean.")}.keys() == other.keys()
    log_densities = [joint(m.weights, sites) for m, sites in ((model, one), (given, other))]
    torch.testing.assert_close(*log_densities)


def test_what_can_be_no_prior_is_refused():
    mean = {"a": torch.zeros(2, 1)}
    for precisions, words in (
        ({}, "latent 'a' has a mean or a precision, but not both"),
        ({"a": torch.tensor(-1.0)}, "runs from -1 to -1"),
        ({"a": torch.tensor(math.nan)}, "give numbers above 0"),
        ({"a": torch.tensor([[0.0], [1.0]])}, "runs from 0 to 1"),
        ({"a": torch.tensor([[1.0], [math.inf]])}, "runs from 1 to inf"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            Given(mean, precisions)
        assert "\n" not in str(caught.value)


def test_the_family_of_the_fit_stays(fits):
    """Under a norm, also behind what is shared, and in a run of adapted tasks that is adapted from in turn."""
    for name, penalty in (("normal", "normal"), ("norm", "norm"), ("norm, shared and task", "norm"), ("random", "normal")):
        model = given_model(fits(name), 2)
        assert model.prior.penalty == penalty
        assert given_model(adapt(fits(name), tiny_data((1, 1)), steps=1), 2).prior.penalty == penalty
        assert f"{model.prior}".endswith(", penalty='norm')") == (penalty == "norm")
        assert "tau=inf" not in f"{model.prior}"
    with pytest.raises(InputError, match="penalty is 'norms'; allowed: normal, norm; did you mean 'norm'"):
        Given({}, {}, penalty="norms")


PRIORS = {
    "normal": lambda: HierarchicalNormal(30.0),
    "weak": lambda: HierarchicalNormal(0.1),
    "centered": lambda: HierarchicalNormal(30.0, form="centered"),
    "learned": lambda: LearnedPrecision(start=30.0, every=2),
    "learned by task": lambda: LearnedPrecision("task", start=30.0, every=2),
    "learned by layer": lambda: LearnedPrecision("layer", start=30.0, every=2),
    "random": lambda: RandomPrecision("gamma"),
    "independent": Independent,
    "norm": lambda: HierarchicalNorm(50.0),
    "norm, centered": lambda: HierarchicalNorm(50.0, form="centered"),
    "shared and task": lambda: with_shared(HierarchicalNormal(30.0), SharedPlusTaskLoRA.shared),
    "norm, shared and task": lambda: with_shared(HierarchicalNorm(50.0), SharedPlusTaskLoRA.shared),
}


@pytest.fixture(scope="module")
def fits():
    found = {}

    def of(name):
        if name not in found:
            adapter = SharedPlusTaskLoRA(rank=2) if "shared" in name else LoRA(rank=2)
            model = tiny_bora(targets=["q_proj", "fc1"], adapter=adapter, prior=PRIORS[name]())
            found[name] = fit(model, tiny_data(), epochs=3, token_budget=24, patience=0, learning_rate=0.05)
        return found[name]

    return of


@pytest.mark.parametrize("prior", PRIORS)
def test_a_new_task_is_theta_until_there_are_documents(fits, prior):
    fitted = fits(prior)
    before = {name: value.clone() for name, value in fitted.sites().items()}
    data = without(tiny_data((2, 0)), "validation")
    new = adapt(fitted, data, steps=6, learning_rate=0.1)
    (theta, mean), (_, of_fit) = new.weights(), fitted.weights()
    for name, value in of_fit.items():
        torch.testing.assert_close(mean[name], value, rtol=0, atol=0)
        torch.testing.assert_close(theta[name][1], value, rtol=1e-6, atol=1e-7)  # the one without documents
    assert new.deviation_norms()[0] > 1e-3
    assert new.documents == [2, 0]
    taus = {name: torch.tensor(tau) for name, tau in fitted.tau_by_group().items()}
    if prior == "learned by task":  # a new task has the geometric mean of the tasks' own
        taus = {name: tau.log().mean().exp() for name, tau in taus.items()}
    entries = {name: start.numel() for name, start in fitted.model.starts.items()}
    assert new.tau() == pytest.approx(mean_tau(taus, entries), rel=1e-5)
    for name, value in fitted.sites().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("prior", ["normal", "learned by task", "independent", "norm", "shared and task"])
def test_it_begins_where_it_is_told(fits, prior):
    """With steps of no length the tasks stay there; Θ and τ do not move, and a task without documents is Θ."""
    fitted, data = fits(prior), without(tiny_data((2, 0)), "validation")
    model = given_model(fitted, 2)
    start = random_weights(model, scale=0.05)
    new = adapt(fitted, data, steps=1, learning_rate=1e-12, start=start)
    (theta, mean), (_, of_fit) = new.weights(), fitted.weights()
    for name, value in of_fit.items():
        shared = name.rpartition(".")[-1] in model.adapter.shared
        torch.testing.assert_close(theta[name][0], value if shared else start[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theta[name][1], value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mean[name], value, rtol=0, atol=0)


def test_a_start_is_of_the_new_tasks(fits):
    model, data = given_model(fits("normal"), 2), tiny_data((2, 1))
    start = random_weights(model)
    name = next(iter(start))
    for wrong in ({**start, name: start[name][:1]}, {key: value for key, value in start.items() if key != name}):
        with pytest.raises(InputError, match=rf"start has '{name}' of shape .*; give an adapter for each new task"):
            adapt(fits("normal"), data, steps=1, start=wrong)


def test_it_learns_more_the_weaker_the_prior(fits):
    # without validation documents: where these are chosen by, a rounding error can decide that no step is kept
    data = dataclasses.replace(tiny_data((4, 3)), validation=tiny_split((0, 0)))
    norms = []
    for tau in (1e-2, 1.0, 1e2, 1e8):
        model = tiny_bora(targets=["q_proj", "fc1"], adapter=LoRA(rank=2), prior=HierarchicalNormal(tau))
        old = fit(model, tiny_data(), epochs=1, learning_rate=1e-6)
        norms.append(float(adapt(old, data, steps=40, learning_rate=0.1).deviation_norms().min()))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 < norms[0]


@pytest.mark.parametrize("guide", ALLOWED)
def test_any_guide_of_the_deviations(fits, guide):
    new = adapt(fits("normal"), tiny_data((3, 0, 2)), guide=guide, steps=4)
    assert all(value.isfinite().all() for value in new.weights()[0].values())
    norms = new.deviation_norms()
    assert norms[[0, 2]].min() > 0
    assert norms[1] == 0  # no documents: the prior


def test_the_posterior_of_a_task_without_documents_is_the_prior(fits):
    for data in (tiny_data((3, 0)), tiny_data((0, 0))):
        for guide, spread in (("normal", "log_scale"), ("auto_normal", "scales")):
            new = adapt(fits("normal"), data, guide=guide, steps=2)
            tensors = {name: value[-1] for name, value in new.guide.named_parameters()}
            for name, value in tensors.items():
                expected = torch.log(torch.expm1(torch.ones(()))) if spread == "scales" and spread in name else torch.zeros(())
                torch.testing.assert_close(value, expected.expand_as(value))  # in units of the prior's standard deviation
            assert any(spread in name for name in tensors)


def without(data, name):
    """The same data with one split empty."""
    return dataclasses.replace(data, **{name: data.train.subset(torch.arange(0))})


@pytest.mark.parametrize("limit", [math.inf, 1.0, 0.05])
@pytest.mark.parametrize("prior", ["normal", "weak"])
def test_a_task_is_as_it_is_alone_whatever_stands_beside_it(fits, prior, limit):
    """Tasks of one batch, of several batches and without documents, to the last digits that a sum's order leaves."""
    data = without(tiny_data((2, 9, 0, 1, 3, 40)), "validation")
    options = {"steps": 7, "token_budget": 36, "learning_rate": 0.05, "gradient_clip": limit}
    options |= {"deviation_reach": 0.0}  # larger steps amplify the last digits
    fitted = fits(prior)
    beside, start = adapt(fitted, data, **options).weights()
    for d, task in enumerate(data.tasks):
        alone = adapt(fitted, subset(data, [task]), **options).weights()[0]
        for name, value in alone.items():
            assert (beside[name][d] - value[0]).norm() <= 1e-4 * (value[0] - start[name]).norm()


@pytest.mark.parametrize("unit", ["tokens", "documents"])
def test_the_gradient_of_each_task_is_clipped_by_its_own_norm(fits, unit):
    """It is that of the task's own objective, with its weight; a task without documents has none."""
    data, weights = without(tiny_data((2, 0, 5)), "validation"), torch.tensor([2.0, 1.0, 0.5])
    model = given_model(fits("weak"), 3)
    model.likelihood = CausalLM(unit, task_weights=weights)
    guide, limit, norms = map_guide(model), 0.1, []

    class Norms(Callback):
        def before_step(self, loop):
            norms.append([float(torch.stack([p.grad[d].norm() for p in guide.parameters()]).norm()) for d in range(3)])

    fit(model, data, guide=guide, epochs=1, callbacks=[Norms(), ClipByTask(limit), Norms()], gradient_clip=math.inf)
    of_row = data.train.predicted if unit == "tokens" else torch.ones_like(data.train.predicted)
    observations = weights * torch.zeros(3).index_add_(0, data.train.task, of_row.float())
    (whole, clipped), total = norms, observations.sum()
    for d in (0, 2):
        own = whole[d] * float(total / observations[d])
        assert own > limit
        assert clipped[d] == pytest.approx(limit, rel=1e-3)
    assert whole[1] == clipped[1] == 0
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"gradient_clip is .*; give a number above 0, or inf for no clipping"):
            adapt(fits("weak"), data, gradient_clip=bad)


def test_steps_are_those_of_each_task(fits):
    data = without(tiny_data((2, 40, 3)), "validation")
    batches = {d: len(subset(data, [data.tasks[d]]).train.batches(token_budget=36, seed=0)) for d in range(3)}
    assert batches[0] == batches[2] == 1 < batches[1]
    seen = []
    new = adapt(fits("normal"), data, steps=7, token_budget=36, on_step=lambda report: seen.append(report["step"]))
    passes = -(-7 // batches[1])
    groups = task_groups(data, token_budget=36)
    assert len(seen) == passes * batches[1] + 7 * (len(groups) - 1)
    assert len(new.history) == 7  # the most passes
    tokens = [int(data.train.predicted[data.train.task == d].sum()) for d in range(3)]
    losses = [adapt(fits("normal"), subset(data, [task]), steps=7, token_budget=36).history for task in data.tasks]
    last = sum(n * history[-1]["loss"] for n, history in zip(tokens, losses, strict=True)) / sum(tokens)
    assert new.history[-1]["loss"] == pytest.approx(last, rel=1e-3)


def test_groups_of_tasks_fill_a_batch_and_no_more():
    data = without(tiny_data((2, 9, 0, 1, 3, 40, 2, 2)), "validation")
    groups = task_groups(data, token_budget=36)
    assert sorted(d for group in groups for d in group.tolist()) == [0, 1, 3, 4, 5, 6, 7]
    for group in groups:
        batches = subset(data, [data.tasks[d] for d in group]).train.batches(token_budget=36)
        assert len(group) == 1 or len(batches) == 1
    # with documents to choose an epoch by, each for itself
    assert all(len(group) == 1 for group in task_groups(tiny_data((2, 1, 3)), token_budget=36))
    many = without(tiny_data((1,) * 150), "validation")
    assert max(map(len, task_groups(many, token_budget=10**6))) == 64


def test_validation_documents_choose_the_epoch_of_their_own_task(fits):
    data = tiny_data((3, 2))
    both = adapt(fits("normal"), data, steps=12, learning_rate=0.3)
    apart = [adapt(fits("normal"), subset(data, [task]), steps=12, learning_rate=0.3) for task in data.tasks]
    assert both.best_epoch == max(each.best_epoch for each in apart)
    for d, each in enumerate(apart):
        for name, value in each.weights()[0].items():
            torch.testing.assert_close(both.weights()[0][name][d], value[0])
    (scores,) = evaluate(both.model, data.validation, both.weights()[0])
    assert both.validation_perplexity == pytest.approx(scores.perplexity(), rel=1e-5)


def test_a_weight_is_as_many_copies_of_the_documents(fits):
    """Weight 2 of a task is the same as its documents twice."""
    data = without(tiny_data((2, 3)), "validation")
    twice = data.train.subset(torch.cat([torch.arange(len(data.train)), (data.train.task == 1).nonzero()[:, 0]]))
    options = {"steps": 5, "learning_rate": 0.05, "token_budget": 10_000, "gradient_clip": math.inf}
    weighted = adapt(fits("normal"), dataclasses.replace(data, task_weights=torch.tensor([1.0, 2.0])), **options)
    doubled = adapt(fits("normal"), dataclasses.replace(data, train=twice), **options)
    plain = adapt(fits("normal"), data, **options)
    for name, value in weighted.weights()[0].items():
        torch.testing.assert_close(value, doubled.weights()[0][name], rtol=1e-3, atol=1e-5)
    assert abs(weighted.deviation_norms()[1] - plain.deviation_norms()[1]) > 1e-4
    assert fits("normal").model.likelihood.task_weights is None  # the fit is left alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 3}, "adapt has no option 'epochs': give steps instead"),
        ({"checkpoints": "folder"}, "adapt has no option 'checkpoints': an adaptation takes seconds"),
        (
            {"gradient_clipp": 3},
            "adapt has no option 'gradient_clipp': the options of fit that it takes are .*; did you mean 'gradient_clip'",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(fits, options, words):
    with pytest.raises(InputError, match=words) as caught:
        adapt(fits("normal"), tiny_data((2, 1)), guide="normal", **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_adapted(fits):
    pooled = fit(tiny_bora(prior=Pooled()), tiny_data(), epochs=1)
    with pytest.raises(InputError, match=r"tau of the fit is inf: all tasks, new ones too, have the same adapter"):
        adapt(pooled, tiny_data((2, 1)))
    with pytest.raises(InputError, match="guide is 'laplase'; allowed: map, normal"):
        adapt(fits("normal"), tiny_data((2, 1)), guide="laplase")
    with pytest.raises(InputError, match="steps is 0"):
        adapt(fits("normal"), tiny_data((2, 1)), steps=0)
    with pytest.raises(InputError, match="no tokenizer"):
        adapt(fits("normal"), {"new": ["text"]})


def test_texts_by_name(tmp_path):
    options = quick_fit(tmp_path)
    backbone = Backbone.from_pretrained(options["base_model"], targets=["v_proj"])
    data = load_tasks(documents(), backbone.tokenizer, max_tokens=32)
    fitted = fit(BoRA(backbone, 3, adapter=LoRA(rank=2)), data, epochs=1)
    new = bp.adapt(fitted, {"b": ["red green", "blue"], "a": []}, steps=3)
    assert (new.tasks, new.documents) == (["a", "b"], [0, 2])
    (theta, mean), (_, of_fit) = bp.adapt(fitted, {"a": []}).weights(), fitted.weights()
    for name, value in of_fit.items():
        assert torch.equal(theta[name][0], value)
        assert torch.equal(mean[name], value)
    # a table is read as load_tasks reads it
    rows = [{"task": "b", "text": "red green"}, {"task": "b", "text": "blue"}]
    for source in (table(rows), pd.DataFrame(rows), write_table(tmp_path / "new.csv", pd.DataFrame(rows))):
        read = bp.adapt(fitted, source, steps=3)
        assert (read.tasks, read.documents) == (["b"], [2])
        for name, value in read.weights()[0].items():
            torch.testing.assert_close(value[0], new.weights()[0][name][1])
    # no more than the base reads: 32 tokens
    assert load_new_tasks(table([{"task": "b", "text": "red " * 90}]), fitted, max_tokens=64).train.lengths.tolist() == [32]
    assert bp.adapt(fitted, {"b": ["red " * 90]}, steps=1, max_tokens=64).documents == [1]
    for texts, words in (
        ({}, "there is no new task"),
        ({"a": "one text"}, "has a single text; give a list"),
        ({"a": ["", "red"]}, "2 texts given, of which 1 have a token"),
        ({"a": ["red", None]}, "text 2 of 2 is None; give texts"),
        ({"a": 3}, "task 'a' has 3; give a list of texts"),
        ({1: ["red"]}, "a task has the name 1; give a text"),
        ([3], "data is a list; give a path"),
        ("none.csv", "file 'none.csv' does not exist"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            bp.adapt(fitted, texts)
        assert "\n" not in str(caught.value)
    for data in ({"a": ["red"]}, table(rows)):
        with pytest.raises(InputError, match="max_tokens is 1; give a whole number from 2 up"):
            bp.adapt(fitted, data, max_tokens=1)
    assert given_model(fitted, 1).num_tasks == 1
