"""The path from pooled to independent: where each τ begins, what is handed on, what a point says."""

from __future__ import annotations

import copy
import itertools
import math

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import bora_pyro.inference.warm_path as module
from bora_pyro import FrozenALoRA, HierarchicalNormal, Independent, InputError, Pooled, map_guide
from bora_pyro.diagnostics.plots.warm_path import warm_curve, warm_summary
from bora_pyro.inference.fit import fit
from bora_pyro.inference.warm_path import warm_path
from bora_pyro.priors import prior_from_tau
from tests.tiny import TASKS, of_task, random_weights, tiny_batch, tiny_bora
from tests.tiny_base import toy_data, toy_model

PRIORS = [HierarchicalNormal(tau=25), HierarchicalNormal(tau=25, form="centered"), Independent(), Pooled()]
OPTIONS = {"learning_rate": 0.03, "token_budget": 256, "patience": 0}


@pytest.fixture(scope="module")
def data():
    return toy_data()


def weights_under(prior, model):
    """θ and Θ that the prior allows, far from any start."""
    theta, mean = random_weights(model), of_task(random_weights(model, seed=1), 0)
    if isinstance(prior, Pooled):
        theta = {name: mean[name].expand_as(value) for name, value in theta.items()}
    if isinstance(prior, Independent):
        mean = {name: value.mean(0) for name, value in theta.items()}
    return theta, mean


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_a_guide_begins_at_the_weights_that_it_is_given(prior):
    model = tiny_bora(prior=prior)
    theta, mean = weights_under(prior, model)
    guide = map_guide(model, model.sites_given(theta, mean))
    guide(tiny_batch())
    given_theta, given_mean = model.weights_given(guide.median())
    torch.testing.assert_close(given_theta, theta)
    torch.testing.assert_close(given_mean, mean)


def test_the_given_sites_are_copied():
    model = tiny_bora(prior=Independent())
    mean = of_task(random_weights(model), 0)
    sites = model.sites_given({name: value.expand(TASKS, *value.shape) for name, value in mean.items()}, mean)
    before = {name: value.clone() for name, value in sites.items()}
    guide = map_guide(model, sites)
    guide(tiny_batch())
    with torch.no_grad():
        for value in guide.parameters():
            value[0] += 1  # one task alone, though the given value was one for all
            torch.testing.assert_close(value[0], value[1] + 1)
    assert all(torch.equal(sites[name], value) for name, value in before.items())


def test_sites_of_another_model_are_refused():
    model, other = tiny_bora(prior=HierarchicalNormal(9.0)), tiny_bora(prior=Pooled())
    sites = other.sites_given(*weights_under(Pooled(), other))
    with pytest.raises(InputError, match=r"no value of 'theta\.\w+\.lora_A_decentered'; give model\.sites_given"):
        map_guide(model, sites)(tiny_batch())
    sites = model.sites_given(*weights_under(model.prior, model))
    more_tasks = tiny_bora(tasks=TASKS + 1, prior=HierarchicalNormal(9.0))
    with pytest.raises(InputError, match=r"shape \(3, 2, 2, 32\); the model's is \(4, 2, 2, 32\)"):
        map_guide(more_tasks, sites)(tiny_batch((1, 1, 1, 1)))


@pytest.mark.parametrize("form", ["noncentered", "centered"])
def test_each_tau_begins_with_the_weights_where_the_last_one_ended(form, data, monkeypatch):
    begun = []

    def spy(model, data, *, guide, **options):
        with torch.no_grad():
            guide(data.train.batches(token_budget=256)[0])
        theta, mean = copy.deepcopy(model.weights_given(guide.median()))  # pooled ones are views of parameters
        begun.append((theta, mean if not isinstance(model.prior, Independent) else None))  # there Θ is no site
        return fit(model, data, guide=guide, **options)

    monkeypatch.setattr(module, "fit", spy)
    model = toy_model(prior=Pooled())
    path = warm_path(model, data, [0, 4, math.inf, 100, 4], epochs=1, make_prior=lambda tau: prior_from_tau(tau, form), **OPTIONS)

    priors = ["Pooled()", *(repr(HierarchicalNormal(tau, form)) for tau in (100, 4)), "Independent()"]
    assert [repr(point.fitted.model.prior) for point in path] == priors
    assert [point.tau for point in path] == [math.inf, 100, 4, 0]
    for name, start in model.starts.items():
        assert torch.equal(begun[0][0][name], start.expand(3, *start.shape))
    for (theta, mean), last in zip(begun[1:], path[:-1], strict=True):
        last_theta, last_mean = last.fitted.weights()
        torch.testing.assert_close(theta, last_theta, atol=1e-6, rtol=1e-5)
        if mean is not None:
            torch.testing.assert_close(mean, last_mean, atol=1e-6, rtol=1e-5)
    deviations = [float(point.fitted.deviation_norms().max()) for point in path]
    assert deviations[0] == 0 < deviations[1] < deviations[2]
    assert repr(model.prior) == "Pooled()"  # the caller's model is left as it was


def test_a_point_says_how_its_fit_predicts_and_what_it_took(data):
    seen = []
    path = warm_path(toy_model(), data, [math.inf, 10, 0], epochs=2, on_point=seen.append, **OPTIONS)
    assert seen == path
    total = 0.0
    for point in path:
        assert point.test_perplexity == pytest.approx(point.fitted.evaluate(data.test)["test_perplexity"], rel=1e-6)
        validation = point.fitted.evaluate(data.validation, name="validation")["validation_perplexity"]
        assert point.validation_perplexity == pytest.approx(validation, rel=1e-6)
        total += point.seconds
        assert point.seconds_so_far == pytest.approx(total)
        assert len(point.fitted.history) == 2


def test_the_validation_perplexity_never_rises(data):
    path = warm_path(toy_model(), data, [math.inf, 100, 10, 1, 0], epochs=1, **OPTIONS | {"learning_rate": 0.3})
    perplexities = [point.validation_perplexity for point in path]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(perplexities))
    assert perplexities[-1] < perplexities[0]


def test_the_first_tau_may_take_longer(data):
    path = warm_path(toy_model(), data, [math.inf, 10], epochs=1, first_epochs=3, **OPTIONS)
    assert [len(point.fitted.history) for point in path] == [3, 1]


def test_what_is_drawn_once_stays_the_same_along_the_path(data):
    model = toy_model(adapter=FrozenALoRA(rank=2), seed=5)
    path = warm_path(model, data, [math.inf, 10], epochs=1, **OPTIONS)
    assert all(point.fitted.model.fixed is model.fixed for point in path)


@pytest.mark.parametrize(
    ("taus", "words"),
    [
        ([10.0, 10.0], "taus has 1 value; give two or more"),
        ([], "taus has 0 values"),
        ([10.0, -1.0], "tau -1.0 is not allowed"),
    ],
)
def test_a_path_that_is_none(taus, words, data, monkeypatch):
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("a fit was begun"))
    with pytest.raises(InputError, match=words):
        warm_path(toy_model(), data, taus, epochs=1)


def test_the_table_of_a_path_is_summed_up_and_drawn():
    table = pd.DataFrame(
        {
            "tau": ["inf", "10", "0"] * 2,
            "seed": [0, 0, 0, 1, 1, 1],
            "validation_perplexity": [30.0, 20.0, 20.0 - 1e-7, 32.0, 24.0, 24.0],
            "test_perplexity": [31.0, 21.0, 21.0, 35.0, 23.0, 23.0],
            "seconds_so_far": [10.0, 14.0, 19.0, 12.0, 16.0, 20.0],
        }
    )
    assert warm_summary(table).splitlines()[2:] == [
        "| ∞ | 31.00 | 33.00 | 11 |",
        "| 10 | 22.00 | 22.00 | 15 |",
        "| 0 | 22.00 | 22.00 | 20 |",
        "validation chooses tau = 10",  # nothing was gained by going on
    ]
    for rows, label in ((table, "test, mean ± sd of 2 seeds"), (table.head(3), "test")):
        ax = warm_curve(rows, Figure().subplots())
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels == ["validation", label]
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        means = rows.groupby("tau").test_perplexity.mean()
        assert [*lines[label]] == [means["0"], means["10"], means["inf"]]
