"""A Normal for each task and a point for what they share, under every prior."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, InputError, LearnedPrecision, fit
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.guides import task_normal_guide
from bora_pyro.guides.base import make_parameters, task_sites
from bora_pyro.priors import AmortisedNormal, with_shared
from tests.tiny import tiny_batch, tiny_bora, tiny_data

PRIORS = [HierarchicalNormal(30), HierarchicalNormal(30, "centered"), LearnedPrecision(), AmortisedNormal(0.1)]


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_only_tasks_have_a_spread(prior):
    model = tiny_bora(targets=["q_proj"], prior=prior)
    guide = task_normal_guide(model, scale=0.3)
    make_parameters(guide, model)
    with poutine.seed(rng_seed=0):
        one, other = guide(tiny_batch()), guide(tiny_batch())
    own = set(task_sites(guide))
    assert own
    assert {name for name, value in one.items() if not torch.equal(value, other[name])} == own
    for name in own:
        spread = guide.scale_of(guide.get("raw_scale", name))
        of_prior = 0.1 if isinstance(prior, AmortisedNormal) else 1.0 if name.endswith("_decentered") else 30**-0.5
        torch.testing.assert_close(spread, torch.full_like(spread, 0.3 * of_prior))
    assert len(list(guide.parameters())) == len(guide.median()) + len(own)


def test_it_is_fitted_and_shared_latents_stay_points():
    prior = with_shared(AmortisedNormal(0.1), SharedPlusTaskLoRA.shared)
    model = tiny_bora(targets=["q_proj"], adapter=SharedPlusTaskLoRA(rank=2), prior=prior)
    guide = task_normal_guide(model)
    fitted = fit(model, tiny_data(), guide=guide, epochs=3, token_budget=30, patience=0, learning_rate=0.03)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert not any("shared" in name for name in task_sites(guide))


def test_an_unknown_positivity():
    with pytest.raises(InputError, match="positivity is 'abs'; allowed: softplus, exp"):
        task_normal_guide(tiny_bora(), positivity="abs")
