"""The outer loop of ABMLL: its gradient in closed form, what it keeps, new tasks, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, fit
from bora_pyro.adapters import SharedPlusTaskLoRA, TriAdaptLoRA
from bora_pyro.data.subset import subset
from bora_pyro.guides.task_normal import LOC
from bora_pyro.inference.inner_steps import InnerOptions, Value
from bora_pyro.inference.meta_adapt import meta_adapt
from bora_pyro.inference.meta_fit import MetaLoop, meta_fit, smallest_beta
from bora_pyro.inference.meta_options import MetaOptions
from bora_pyro.inference.meta_steps import meta_steps
from bora_pyro.priors import AmortisedNormal, with_shared
from tests.inference.test_inner_steps import COUNTS, SCALE, Pull
from tests.tiny import random_weights, tiny_bora, tiny_data, tiny_questions, tiny_split

OPTIONS = {"epochs": 3, "inner_steps": 2, "inner_rate": 0.5, "learning_rate": 0.03, "patience": 0, "tasks_per_step": 2}


@pytest.mark.parametrize("outer_gradient", ["first_order", "prior"])
@pytest.mark.parametrize("learned", [True, False])
def test_the_outer_gradient_of_a_linear_gaussian_hierarchy(monkeypatch, outer_gradient, learned):
    """In μ₀: Σ_d N_d (μ_d − y_d), or −β Σ_d (μ_d − μ₀)/σ₀² without the tasks' own; in σ₀: −β Σ_d (μ_d − μ₀)²/σ₀³."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self, shape=None: self.loc.expand(self.batch_shape))
    model, beta, rate, steps = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(SCALE, learned=learned)), 0.02, 0.05, 3
    places = random_weights(model)
    model.likelihood = Pull(places)
    options = {"beta": beta, "inner_rate": rate, "inner_steps": steps, "outer_gradient": outer_gradient}
    loop = MetaLoop(model, tiny_data(COUNTS), **options)
    _, after, counts = loop._adapted(torch.arange(sum(COUNTS)))
    assert counts.tolist() == [*COUNTS]
    found = {id(p): g for p, g in zip(loop.inner.shared, loop.global_gradient(after, counts), strict=True)}
    number, pull = torch.tensor(COUNTS).float().view(-1, 1, 1, 1), beta / SCALE**2
    for name, place in places.items():
        start = model.starts[name]
        optimum = (number * place + pull * start) / (number + pull)
        adapted = optimum + (1 - rate * (1 + pull / number)) ** steps * (start - optimum)
        expected = number * (adapted - place) if outer_gradient == "first_order" else -pull * (adapted - start)
        of_mean = loop.guide.parameter(LOC, f"prior_mean.{name}")
        torch.testing.assert_close(found[id(of_mean)], expected.sum(0), rtol=1e-3, atol=1e-4)
        if learned:
            of_scale = loop.guide.parameter(LOC, f"prior_scale.{name}")
            slope = -beta * ((adapted - start).square() / SCALE**3).sum(0) * torch.sigmoid(of_scale)
            torch.testing.assert_close(found[id(of_scale)], slope, rtol=1e-3, atol=1e-5)
    assert len(found) == (1 + learned) * len(places)


def test_reptile_follows_the_mean_gradient_of_the_inner_steps(monkeypatch):
    """Under β = 0 a task ends at y_d + (1 − rate)^K (μ₀ − y_d), and its K gradients N_d (μ − y_d) have a closed mean."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self, shape=None: self.loc.expand(self.batch_shape))
    model, rate, steps = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(SCALE, learned=False)), 0.2, 3
    places = random_weights(model)
    model.likelihood = Pull(places)
    options = {"beta": 0.0, "inner_rate": rate, "inner_steps": steps, "outer_gradient": "reptile"}
    loop = MetaLoop(model, tiny_data(COUNTS), **options)
    _, after, counts = loop._adapted(torch.arange(sum(COUNTS)))
    found = dict(zip(map(id, loop.inner.shared), loop.global_gradient(after, counts), strict=True))
    number = torch.tensor(COUNTS).float().view(-1, 1, 1, 1)
    for name, place in places.items():
        mean = sum((1 - rate) ** step for step in range(steps)) / steps * number * (model.starts[name] - place)
        of_mean = loop.guide.parameter(LOC, f"prior_mean.{name}")
        torch.testing.assert_close(found[id(of_mean)], mean.sum(0), rtol=1e-3, atol=1e-4)


def test_an_epoch_has_every_document_once_and_a_task_at_most_once_in_a_step():
    split = tiny_split((7, 0, 2, 5, 1))
    steps = meta_steps(split, tasks_per_step=2, documents_per_task=3, seed=1)
    assert sorted(torch.cat(steps).tolist()) == list(range(len(split)))
    for rows in steps:
        counts = torch.bincount(split.task[rows])
        assert int((counts > 0).sum()) <= 2
        assert int(counts.max()) <= 3
    same, other = (meta_steps(split, tasks_per_step=2, documents_per_task=3, seed=seed) for seed in (1, 2))
    assert [rows.tolist() for rows in same] == [rows.tolist() for rows in steps]
    assert len(other) == len(steps)
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in steps]
    questions = tiny_questions((3, 2, 4))
    for rows in meta_steps(questions, tasks_per_step=2, documents_per_task=2, seed=0):
        assert torch.isin(questions.document_of, questions.document_of[rows]).sum() == len(rows)


@pytest.mark.parametrize("prior", [AmortisedNormal(0.05), AmortisedNormal(0.05, positivity="exp", global_prior="normal_gamma")])
def test_a_meta_fit_learns(prior):
    data = tiny_data((6, 4, 8))
    fitted = meta_fit(tiny_bora(targets=["q_proj", "fc1"], prior=prior), data, documents_per_task=3, **OPTIONS)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss_before"]
    best = fitted.history[fitted.best_epoch - 1] if fitted.best_epoch else None
    assert best is None or best["validation_perplexity"] == fitted.validation_score
    assert fitted.validation_score <= min(epoch["validation_perplexity"] for epoch in fitted.history)
    assert fitted.evaluate(data.validation, name="validation")["validation_perplexity"] == pytest.approx(
        fitted.validation_score, rel=1e-5
    )
    assert all(epoch["kl"] > 0 and epoch["scale"] > 0 for epoch in fitted.history)


def test_the_same_seed_gives_the_same_fit():
    one, same, other = (
        meta_fit(tiny_bora(targets=["q_proj"], prior=AmortisedNormal(0.05)), tiny_data(), **OPTIONS, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [epoch["loss"] for epoch in one.history] == [epoch["loss"] for epoch in same.history]
    assert [epoch["loss"] for epoch in one.history] != [epoch["loss"] for epoch in other.history]
    for name, value in one.guide.state_dict().items():
        assert torch.equal(value, same.guide.state_dict()[name])


def test_fixed_scales_stay_and_shared_latents_are_fitted():
    prior = with_shared(AmortisedNormal(0.05, learned=False), SharedPlusTaskLoRA.shared)
    model = tiny_bora(targets=["q_proj"], adapter=SharedPlusTaskLoRA(rank=2), prior=prior)
    fitted = meta_fit(model, tiny_data(), **OPTIONS)
    assert not any(name.startswith("prior_scale") for name in fitted.sites())
    assert fitted.history[-1]["scale"] == pytest.approx(0.05, rel=1e-5)
    if fitted.best_epoch:
        mean = fitted.weights()[1]
        assert not torch.equal(mean["q_proj.shared_B"], model.starts["q_proj.shared_B"])


def test_a_new_task_is_adapted_as_the_tasks_of_the_fit_were(monkeypatch):
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self, shape=None: self.loc.expand(self.batch_shape))
    data = tiny_data((6, 4, 8))
    fitted = meta_fit(tiny_bora(targets=["q_proj", "fc1"], prior=AmortisedNormal(0.05)), data, **OPTIONS)
    options = InnerOptions(steps=2, rate=0.5)
    again = meta_adapt(fitted, subset(data, ["task 0", "task 2"]), options)
    assert again.validation_score > 0
    (theta, mean), (own, of_fit) = again.weights(), fitted.weights()
    for name in theta:
        assert torch.equal(mean[name], of_fit[name])
        torch.testing.assert_close(theta[name], own[name][[0, 2]], rtol=1e-4, atol=1e-6)
    draws = again.guide()
    assert draws.keys() == {f"theta.{name}_decentered" for name in theta}
    name = "q_proj.lora_A"
    scale = fitted.guide.scale_of(fitted.guide.get("raw_scale", f"theta.{name}"))[[0, 2]]
    ratio = scale / fitted.sites()[f"prior_scale.{name}"]
    torch.testing.assert_close(again.guide.get("log_scale", f"theta.{name}_decentered").exp(), ratio, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("steps", "documents"), [(0, None), (2, 0)])
def test_without_steps_or_documents_a_task_predicts_from_the_prior(steps, documents):
    data = tiny_data((6, 4, 8))
    fitted = meta_fit(tiny_bora(targets=["q_proj"], prior=AmortisedNormal(0.05)), data, **OPTIONS)
    new = subset(data, ["task 1"], max_train_documents=documents)
    prior = meta_adapt(fitted, new, InnerOptions(steps=steps))
    (theta, _), (_, mean) = prior.weights(), fitted.weights()
    assert all(torch.equal(theta[name][0], mean[name]) for name in theta)
    for name in theta:
        torch.testing.assert_close(
            prior.guide.get("log_scale", f"theta.{name}_decentered").abs().max(), torch.tensor(0.0), rtol=0, atol=1e-5
        )


def test_a_beta_that_rounding_loses_is_refused():
    model = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(0.05))
    with pytest.raises(
        InputError, match=r"beta is 1e-15, and beta KL is lost in the rounding of the loss.*the smallest beta"
    ) as caught:
        meta_fit(model, tiny_data(), beta=1e-15, **OPTIONS)
    assert "\n" not in str(caught.value)
    least = smallest_beta(Value([], 0.0, log_likelihood=-1000.0, kl=50.0))
    loss = torch.tensor(1000.0)
    assert float(loss + 1.1 * least * 50.0) > float(loss)
    assert float(loss + 0.4 * least * 50.0) == float(loss)
    assert meta_fit(model, tiny_data(), beta=0.0, **OPTIONS | {"epochs": 1}).history[0]["kl"] > 0


def test_what_is_refused():
    data = tiny_data()
    with pytest.raises(InputError, match=r"the prior is HierarchicalNormal\(tau=100\); inner steps need a mean"):
        meta_fit(tiny_bora(prior=HierarchicalNormal()), data)
    with pytest.raises(InputError, match=r"TriAdaptLoRA.* changes during a fit, which a meta-fit does not do"):
        meta_fit(tiny_bora(adapter=TriAdaptLoRA(rank=2), prior=AmortisedNormal()), data)
    with pytest.raises(InputError, match="the fit is no meta-fit"):
        meta_adapt(fit(tiny_bora(prior=HierarchicalNormal()), data, epochs=1), {"a": ["b"]})
    for options, message in (
        ({"beta": float("nan")}, "beta is nan; give a finite number from 0"),
        ({"beta_global": -1.0}, "beta_global is -1.0; give a finite number from 0 up"),
        ({"inner_steps": 0}, "inner_steps is 0; give a whole number from 1 up"),
        ({"inner_rate": 0.0}, "inner_rate is 0.0; give a finite number above 0"),
        ({"outer_gradient": "second"}, "outer_gradient is 'second'; allowed: first_order, prior, reptile"),
        ({"outer_gradient": "reptile"}, "beta is 0.001; outer_gradient reptile is for inner steps under the likelihood alone"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"gradient_clip": 0.0}, "gradient_clip is 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            MetaOptions(**options).validate()
