"""The norm of the objective's gradient: exact over all documents, unbiased over a sample, zero at the optimum."""

from __future__ import annotations

import itertools
from itertools import combinations

import pyro
import pytest
import torch

from bora_pyro import HierarchicalNormal, Independent, LearnedPrecision, Pooled, fit
from bora_pyro.data import TokenSplit
from bora_pyro.guides import GUIDES, map_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.optimum import gradient_norms, gradient_summary, groups_of, squared_norm, still_falling
from bora_pyro.likelihoods import Likelihood
from tests.inference.fit_state import assert_same, parameters
from tests.inference.test_fit import scripted
from tests.tiny import tiny_bora, tiny_data
from tests.tiny_base import toy_data, toy_model

PRIORS = {
    "hierarchical": lambda: HierarchicalNormal(tau=2),
    "centered": lambda: HierarchicalNormal(tau=2, form="centered"),
    "learned": lambda: LearnedPrecision(start=5.0),
    "independent": Independent,
}
SAMPLED = {"epochs": 1, "token_budget": 64}  # 24 of 60 documents
ALL = {"epochs": 50, "token_budget": 64}


@pytest.fixture(scope="module")
def data():
    return toy_data()


def moved(model, data, *, guide="map", **options):
    """A loop whose parameters are away from their start."""
    loop = Loop(model, data, GUIDES[guide](model), learning_rate=0.03, warmup=0.0, **options)
    loop.state.begin_epoch()
    for step in range(4):
        loop.step(loop._steps_of_epoch(0)[step], 0.03, step)
    return loop


def whole_gradient(loop):
    """The norms over all documents, from one batch: of Θ and of what belongs to single tasks."""
    split = loop.data.train
    (batch,) = split.batches(token_budget=100_000)
    (batch,) = loop.state.begin([batch])
    loop.backward(batch, validate=False)
    squares = {"theta": 0.0, "prior_mean": 0.0}
    for name, parameter in loop.guide.named_parameters():
        kind = "prior_mean" if name.startswith("prior_mean") else "theta"
        squares[kind] += float(parameter.grad.double().square().sum())
        parameter.grad = None
    return {name: square**0.5 for name, square in squares.items()}


@pytest.mark.parametrize("drawn", [2, 3, 4, 5])
def test_the_mean_over_all_samples_is_the_squared_norm(drawn):
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = []
    for chosen in combinations(range(5), drawn):
        some = gradients[list(chosen)]
        estimates.append(squared_norm(5, some.sum(0), float(some.square().sum()), drawn=drawn))
    assert sum(estimates) / len(estimates) == pytest.approx(float(gradients.mean(0).square().sum()), rel=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
def test_over_all_documents_it_is_the_norm_of_the_gradient(data, prior):
    loop = moved(toy_model(prior=PRIORS[prior]()), data, **ALL)
    groups, drawn = groups_of(loop)
    assert drawn == len(groups) > 2
    found, whole = gradient_norms(loop), whole_gradient(loop)
    assert found["documents"] == len(data.train)
    assert found["deviations"] == pytest.approx(whole["theta"], rel=1e-5)
    assert found["prior_mean"] == (None if prior == "independent" else pytest.approx(whole["prior_mean"], rel=1e-5))
    assert found["all"] == pytest.approx((whole["theta"] ** 2 + whole["prior_mean"] ** 2) ** 0.5, rel=1e-5)


def test_without_deviations_it_is_that_of_the_shared_adapter(data):
    found = gradient_norms(moved(toy_model(prior=Pooled()), data, **ALL))
    assert found["deviations"] is None
    assert found["all"] == found["prior_mean"] > 0


@pytest.mark.parametrize("prior", ["hierarchical", "learned"])
@pytest.mark.parametrize("options", [ALL, SAMPLED], ids=["all", "sampled"])
def test_drawn_tasks_have_the_same_norm(prior, options):
    """A task without documents is drawn too, for its prior."""
    data = toy_data(train=(24, 0, 24))
    whole = moved(toy_model(prior=PRIORS[prior]()), data, task_subsampling=False, **options)
    drawn = moved(toy_model(prior=PRIORS[prior]()), data, task_subsampling=True, **options)
    with torch.no_grad():  # the steps differ: take the values of one fit
        for name, store in drawn.state.rows.values.items():
            store.write(torch.arange(3), whole.state.parameters[name].detach())
        for name, value in drawn.state.of_all.items():
            value.copy_(whole.state.parameters[name])
    first, second = gradient_norms(whole), gradient_norms(drawn)
    assert first["documents"] == second["documents"]
    assert first["prior_mean"] == pytest.approx(second["prior_mean"], rel=1e-5)
    if options is ALL:  # over a sample the prior of a task counts with the batches that draw it
        assert first == pytest.approx(second, rel=1e-5)


def test_over_a_sample_it_is_unbiased(data):
    whole = whole_gradient(moved(toy_model(), data, **SAMPLED))
    loop, squares = moved(toy_model(), data, **SAMPLED), []
    for seed in range(30):
        loop.options.seed = seed
        found = gradient_norms(loop)
        assert 20 <= found["documents"] <= 30
        squares.append([found["prior_mean"] ** 2, found["deviations"] ** 2])
    mean, error = torch.tensor(squares).mean(0), torch.tensor(squares).std(0) / 30**0.5
    true = torch.tensor([whole["prior_mean"] ** 2, whole["theta"] ** 2])
    assert bool((error < 0.15 * true).all())
    assert bool(((mean - true).abs() < 3 * error).all())


class Quadratic(Likelihood):
    """Documents that are points: the log-likelihood is -|θ_d - y_n|²/2."""

    def __call__(self, model, weights, batch):
        for name, theta in weights.items():
            points = self.points(theta[0], batch.index)
            pyro.factor(f"likelihood.{name}", -0.5 * batch.scale * (theta.index_select(0, batch.row) - points).square().sum())

    @staticmethod
    def points(like, index):
        generator = torch.Generator().manual_seed(0)
        return torch.randn((100, *like.shape), generator=generator)[index]

    def observations(self, documents, tokens):
        return documents


def test_it_is_zero_at_the_optimum():
    tau, data = 2.0, tiny_data((3, 1, 4))
    model = tiny_bora(targets=["q_proj"], tasks=3, prior=HierarchicalNormal(tau=tau), likelihood=Quadratic())
    theta, centre = {}, {}
    for name, start in model.starts.items():
        shape = (3, *(1 for _ in start.shape))
        count = torch.tensor([3.0, 1.0, 4.0]).view(shape)
        points = Quadratic.points(start, torch.arange(8))
        level = torch.stack([points[data.train.task == d].mean(0) for d in range(3)])
        weight = count * tau / (count + tau)
        centre[name] = (weight * level).sum(0) / weight.sum(0)
        theta[name] = (count * level + tau * centre[name]) / (count + tau)
    start = gradient_norms(Loop(model, data, map_guide(model), token_budget=12))
    end = gradient_norms(Loop(model, data, map_guide(model, model.sites_given(theta, centre)), token_budget=12))
    assert start["documents"] == 8
    assert end["all"] < 1e-6 * start["all"]


@pytest.mark.parametrize("guide", ["map", "normal"])
@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_without_a_step_nothing_changes(data, guide, drawn):
    loop = moved(toy_model(), data, guide=guide, task_subsampling=drawn, **SAMPLED)
    before = loop.state.save(loop.processes)
    before = {group: {name: value.clone() for name, value in tensors.items()} for group, tensors in before.items() if not drawn}
    first = gradient_norms(loop)
    assert all(parameter.grad is None for parameter in loop.guide.parameters())
    assert gradient_norms(loop) == first
    after = loop.state.save(loop.processes)
    for group, tensors in before.items():
        assert_same(tensors, after[group])


@pytest.mark.parametrize("guide", ["map", "normal"])
@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_the_fit_is_the_same_with_and_without(data, guide, drawn):
    options = {"epochs": 2, "token_budget": 64, "task_subsampling": drawn, "learning_rate": 0.03}
    fits = []
    for measured in (True, False):
        model = toy_model()
        fits.append(fit(model, data, guide=GUIDES[guide](model), gradient_norm=measured, **options))
    assert_same(*(parameters(fitted) for fitted in fits))
    assert gradient_summary(fits[0].gradient_norms)["ratio"] > 0
    assert gradient_summary(fits[1].gradient_norms) is None


def test_a_fit_that_keeps_its_start_has_ratio_1(data, monkeypatch):
    scripted(monkeypatch, [])
    scores = itertools.count(2.0)
    monkeypatch.setattr("bora_pyro.inference.best_state.BestState.score", lambda best: next(scores))
    fitted = fit(toy_model(), data, epochs=1, average=False, token_budget=64)
    assert fitted.best_epoch == 0
    assert gradient_summary(fitted.gradient_norms)["ratio"] == 1.0


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_a_resumed_fit_has_the_numbers_of_an_uninterrupted_one(data, drawn, tmp_path):
    options = {"epochs": 3, "token_budget": 64, "task_subsampling": drawn, "learning_rate": 0.03}
    once = fit(toy_model(), data, **options)

    def stop(report):
        if report["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), data, checkpoints=tmp_path, on_epoch=stop, **options)
    again = fit(toy_model(), data, checkpoints=tmp_path, **options)
    assert len(again.history) == 3
    assert again.gradient_norms == once.gradient_norms


def test_one_document_is_enough():
    train = TokenSplit.from_documents([[0, 5, 6, 7]], task=[1], num_tasks=3)
    data = toy_data()
    data = type(data)(data.tasks, train, data.validation, data.test)
    assert gradient_norms(Loop(toy_model(), data, map_guide(toy_model()), token_budget=64))["documents"] == 1


@pytest.mark.parametrize(
    ("perplexities", "epochs", "says"),
    [
        ([9.0, 8.0], 2, True), ([9.0, 8.95], 2, False), ([9.0, 8.0], 3, False), ([8.0, 9.0], 2, False), ([9.0], 1, False),
        ([], 1, False),
    ],
)  # fmt: skip
def test_a_perplexity_that_was_still_falling_is_noted(perplexities, epochs, says):
    fitted = Fitted(None, None, [], [{"validation_perplexity": value} for value in perplexities])
    assert bool(still_falling(fitted, epochs)) == says


def test_without_validation_documents_there_is_no_note():
    assert still_falling(Fitted(None, None, [], [{}, {}]), 2) is None
