"""A fit that goes on from a checkpoint, and one whose loss is no number."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import CausalLM, HierarchicalNormal, Independent, InputError, Pooled, fit
from bora_pyro.inference.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from bora_pyro.inference.fit import NonFiniteLossError
from bora_pyro.inference.fitted import Fitted
from tests.tiny_base import toy_data, toy_model, without_times


@pytest.fixture(scope="module")
def data():
    return toy_data()


def parameters(fitted):
    return {name: value.detach().clone() for name, value in fitted.guide.named_parameters()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


class Poisoned(CausalLM):
    """A likelihood that becomes NaN once the test says so."""

    poison = False

    def __call__(self, model, weights, batch):
        poisoned = {name: value * math.nan for name, value in weights.items()}
        super().__call__(model, poisoned if self.poison else weights, batch)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(
    ("options", "at", "done"),
    [
        ({}, ("on_epoch", 3), 2),  # killed before the third epoch's checkpoint is written
        ({"prior": HierarchicalNormal(tau=30, form="centered"), "accumulate": 2}, ("on_step", 11), 3),
        ({"prior": Independent(), "checkpoint_every": 2}, ("on_epoch", 4), 2),
    ],
    ids=["in an epoch's report", "in a step", "every second epoch"],
)
def test_a_resumed_fit_equals_one_that_was_never_interrupted(data, tmp_path, options, at, done):
    options = dict(options)
    prior = options.pop("prior", HierarchicalNormal(tau=30))
    options |= {"epochs": 6, "learning_rate": 3e-2, "token_budget": 100, "seed": 5}
    straight = fit(toy_model(prior=prior), data, **options)
    calls = 0

    def kill(report):
        nonlocal calls
        calls += 1
        if calls == at[1]:
            raise Killed

    folder = tmp_path / "deep" / "checkpoints"
    with pytest.raises(Killed):
        fit(toy_model(prior=prior), data, checkpoints=folder, **options, **{at[0]: kill})
    seen = []
    resumed = fit(toy_model(prior=prior), data, checkpoints=folder, on_epoch=seen.append, **options)
    assert [entry["epoch"] for entry in seen] == [*range(done + 1, 7)]
    assert_same(parameters(resumed), parameters(straight))
    assert without_times(resumed.history) == without_times(straight.history)
    assert resumed.best_epoch == straight.best_epoch
    assert resumed.seconds > resumed.history[done - 1]["seconds"]
    assert sorted(file.name for file in folder.iterdir()) == [file.name for file in reversed(Checkpoints(folder).files())]
    assert len([*folder.iterdir()]) == 2


def test_a_finished_fit_is_found_again_without_a_step(data, tmp_path):
    few = toy_data(train=(2, 2, 2))
    options = {"epochs": 6, "learning_rate": 0.3, "token_budget": 32, "patience": 2, "checkpoints": tmp_path}
    first = fit(toy_model(), few, **options)
    assert first.best_epoch < len(first.history)
    again = fit(toy_model(), few, on_step=lambda report: pytest.fail("there was nothing to do"), **options)
    assert_same(parameters(again), parameters(first))
    assert again.history == first.history
    assert again.best_epoch == first.best_epoch


def one_line(message):
    assert "\n" not in message
    return message


def test_a_checkpoint_that_names_the_perplexity_as_older_ones_do(data, tmp_path):
    options = {"epochs": 2, "learning_rate": 0.03, "token_budget": 100, "checkpoints": tmp_path}
    first = fit(toy_model(), data, **options)
    path = Checkpoints(tmp_path).newest().path
    groups, progress = load_checkpoint(path)
    progress["validation_perplexity"] = progress.pop("validation_score")
    del progress["global_mean_score"]
    save_checkpoint(path, groups, progress)
    again = fit(toy_model(), data, **options)
    assert again.validation_score == first.validation_score == progress["validation_perplexity"]


@pytest.mark.parametrize(
    "other",
    [{"rank": 3}, {"prior": Pooled()}, {"prior": HierarchicalNormal(form="centered")}, {"tasks": 4}],
    ids=["rank", "pooled", "centered", "tasks"],
)
def test_a_checkpoint_of_another_model_is_refused(data, tmp_path, other):
    fit(toy_model(prior=HierarchicalNormal()), data, epochs=1, token_budget=400, checkpoints=tmp_path)
    what = "other documents: " if "tasks" in other else "another model "  # who has other tasks has other documents
    with pytest.raises(InputError, match=rf"step-\d+\.safetensors' is of {what}.*--overwrite true") as caught:
        fit(toy_model(**other), toy_data(train=(4,) * 4) if "tasks" in other else data, checkpoints=tmp_path)
    one_line(str(caught.value))


def test_a_learning_rate_that_is_far_too_large_is_named(data):
    with pytest.raises(NonFiniteLossError) as caught:
        fit(toy_model(prior=Pooled()), data, epochs=3, learning_rate=1e30, token_budget=64)
    message, fitted = one_line(str(caught.value)), caught.value.fitted
    assert "not finite at step" in message
    assert "--learning_rate (now 1e+30; try 3e+29)" in message
    assert isinstance(fitted, Fitted)
    assert fitted.best_epoch == 0
    assert fitted.history == []
    assert_same(fitted.weights()[1], toy_model().starts)  # no epoch was finished


def test_the_state_of_the_best_epoch_survives_a_loss_that_is_not_finite(data, tmp_path):
    likelihood = Poisoned()
    model = toy_model(likelihood=likelihood)

    def poison(report):
        likelihood.poison = report["epoch"] == 3

    with pytest.raises(NonFiniteLossError, match=r"\(epoch 4\); the state of epoch 3 is kept") as caught:
        fit(model, data, epochs=6, learning_rate=3e-2, token_budget=128, checkpoints=tmp_path, on_epoch=poison)
    fitted = caught.value.fitted
    assert len(fitted.history) == 3
    assert all(value.isfinite().all() for value in parameters(fitted).values())
    perplexities = [entry["validation_perplexity"] for entry in fitted.history]
    assert fitted.evaluate(data.validation, name="validation")["validation_perplexity"] == min(perplexities) == perplexities[2]
    # and from the checkpoint the fit goes on as if nothing had happened
    likelihood.poison = False
    options = {"epochs": 6, "learning_rate": 3e-2, "token_budget": 128}
    assert_same(parameters(fit(model, data, checkpoints=tmp_path, **options)), parameters(fit(toy_model(), data, **options)))


def test_a_last_step_into_the_void_is_not_kept(data):
    # one step in all: the loss before it is finite, the state behind it is useless
    with pytest.raises(NonFiniteLossError, match="not a number after epoch 1; the state of epoch 0 is kept") as caught:
        fit(toy_model(prior=Pooled()), data, epochs=1, learning_rate=1e30, token_budget=10_000)
    fitted = caught.value.fitted
    assert fitted.best_epoch == 0
    assert_same(fitted.weights()[1], toy_model().starts)
    assert math.isfinite(fitted.evaluate(data.test)["test_perplexity"])


def test_a_base_that_gives_no_numbers_is_told_of_in_one_line(data):
    model = toy_model()
    model.backbone.model.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"the base model gives NaN; .*--precision float32") as caught:
        fit(model, data, epochs=1, token_budget=10_000)
    one_line(str(caught.value))
