"""The mean of the steps: its weights, its rows under task drawing, and when a fit keeps it."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, Pooled, fit
from bora_pyro.guides import map_guide
from bora_pyro.inference.averaging import TrajectoryMean, weight_sum
from bora_pyro.inference.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from bora_pyro.inference.loop import Loop
from tests.inference.fit_state import assert_same, parameters
from tests.inference.test_fit import scripted
from tests.tiny_base import toy_data, toy_model

OPTIONS = {"epochs": 3, "learning_rate": 0.03, "token_budget": 32}


@pytest.fixture(scope="module")
def data():
    return toy_data()


def weighted(states):
    """Σ s (s + 1) x_s / Σ s (s + 1), in float64."""
    weights = torch.tensor([s * (s + 1.0) for s in range(1, len(states) + 1)], dtype=torch.float64)
    return {
        name: (torch.stack([state[name].double() for state in states]) * weights.view(-1, *[1] * states[0][name].dim())).sum(0)
        / weights.sum()
        for name in states[0]
    }


def test_the_weights_add_up():
    assert weight_sum(4) == 1 * 2 + 2 * 3 + 3 * 4 + 4 * 5


def test_the_mean_weighs_step_s_with_s_times_s_plus_1():
    states = [{"x": value} for value in torch.randn(50, 3, generator=torch.Generator().manual_seed(0))]
    mean = TrajectoryMean({"x": torch.full((3,), 100.0)})
    for state in states:
        mean.add(state)
    torch.testing.assert_close(mean.values["x"].double(), weighted(states)["x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "prior", [lambda: HierarchicalNormal(tau=1), lambda: LearnedPrecision(start=1.0)], ids=["fixed", "learned"]
)
@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_the_mean_of_a_fit_is_that_of_its_states(data, prior, drawn):
    model, states = toy_model(prior=prior()), []
    loop = Loop(model, data, map_guide(model), callbacks=None, **OPTIONS, task_subsampling=drawn)

    def all_values():
        own = loop.state.of_all if drawn else loop.state.parameters
        values = {name: value.detach().clone() for name, value in own.items()}
        if drawn:
            values |= {name: store.read(torch.arange(3)) for name, store in loop.state.rows.values.items()}
        tau = {name: value.log() for name, value in model.state().items() if name.startswith("prior/tau.")}
        return values, tau

    taus = []
    step = loop.state.step

    def recorded(rates):
        step(rates)
        values, tau = all_values()
        states.append(values)
        taus.append(tau)

    loop.state.step = recorded
    for _ in range(2):
        loop.run_epoch()
    last, _ = all_values()
    with loop.state.averaged():
        values, tau = all_values()
    for name, value in weighted(states).items():
        torch.testing.assert_close(values[name].double(), value, rtol=1e-5, atol=1e-6)
    # the first look at τ comes after some steps: a fixed τ has no mean, a learned one that of its logarithm
    assert bool(tau) == isinstance(model.prior, LearnedPrecision)
    for name, value in tau.items():
        expected = weighted([entry or {name: torch.tensor(0.0)} for entry in taus])[name]
        torch.testing.assert_close(value.double(), expected.expand(value.shape), rtol=1e-4, atol=1e-5)
    assert_same(all_values()[0], last)  # afterwards everything is as it was
    if drawn:
        rows = loop.state.rows
        assert any(int(count) < len(states) for count in rows.count)  # some step left a task out


def test_the_better_one_of_the_last_state_and_the_mean_is_kept(data, monkeypatch):
    scripted(monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.2, 3.1])  # after each epoch: the last state, the mean
    model = toy_model(prior=Pooled())
    guide, means = map_guide(model), []
    loop = Loop(model, data, guide, **OPTIONS)
    reports = []
    for _ in range(3):
        loop.run_epoch()
        reports.append(loop.keep_best())
        with loop.state.averaged():
            means.append(parameters(loop.fitted))
    assert [report["validation_perplexity"] for report in reports] == [4.0, 3.0, 3.1]
    assert (loop.fitted.best_epoch, loop.fitted.averaged, loop.fitted.validation_perplexity) == (2, False, 3.0)
    scripted(monkeypatch, [5.0, 4.0])
    loop = Loop(model, data, map_guide(model), **OPTIONS)
    loop.run_epoch()
    loop.keep_best()
    loop.finish()
    assert loop.fitted.averaged
    assert_same(parameters(loop.fitted), means[0])


def test_without_averaging_there_is_no_mean(data):
    history = fit(toy_model(), data, **OPTIONS, average=False).history
    assert all("validation_perplexity_averaged" not in epoch for epoch in history)


def test_a_fit_of_one_step_has_its_mean_there(data):
    fitted = fit(toy_model(), data, epochs=1, learning_rate=0.03)
    assert fitted.history[0]["validation_perplexity_averaged"] == pytest.approx(fitted.history[0]["validation_perplexity_last"])


@pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
def test_a_checkpoint_without_a_mean_is_refused(data, tmp_path, drawn):
    fit(toy_model(), data, **OPTIONS, task_subsampling=drawn, average=False, checkpoints=tmp_path)
    with pytest.raises(InputError, match=r"has no mean of the steps; resume it with --average false, or start afresh"):
        fit(toy_model(), data, **OPTIONS | {"epochs": 4}, task_subsampling=drawn, checkpoints=tmp_path)
    resumed = fit(toy_model(), data, **OPTIONS | {"epochs": 4}, task_subsampling=drawn, average=False, checkpoints=tmp_path)
    assert len(resumed.history) == 4


def test_a_checkpoint_with_a_mean_of_another_model_is_refused(data, tmp_path):
    fit(toy_model(), data, **OPTIONS, checkpoints=tmp_path)
    path = Checkpoints(tmp_path).files()[0]
    groups, progress = load_checkpoint(path)
    name = next(iter(groups["parameters"]))
    groups["mean"][name] = groups["mean"][name][..., :1]
    save_checkpoint(path, groups, progress)
    with pytest.raises(InputError, match="of another model"):
        fit(toy_model(), data, **OPTIONS | {"epochs": 4}, checkpoints=tmp_path)


def test_averaging_removes_the_noise_of_a_random_walk():
    """A state that jumps between ±1 has a mean near 0: |mean| is at most the largest weight over their sum."""
    mean = TrajectoryMean({"x": torch.zeros(())})
    for step in range(300):
        mean.add({"x": torch.tensor((-1.0) ** step)})
    assert abs(float(mean.values["x"])) < 3 / 300
