"""Several MAP fits as one posterior: its draws are the fits, and nothing of them changes."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import BoRA, FrozenALoRA, HierarchicalNormal, LearnedPrecision, LoRA, Posterior, RandomPrecision, ensemble, fit
from bora_pyro.errors import InputError
from bora_pyro.guides import EnsembleGuide, make_parameters, normal_guide
from bora_pyro.predict.mixture import predictive
from tests.tiny import tiny_backbone, tiny_bora, tiny_data

PRIORS = {
    "fixed": lambda: HierarchicalNormal(30.0),
    "centered": lambda: HierarchicalNormal(30.0, "centered"),
    "learned": lambda: LearnedPrecision(every=1),
    "random": RandomPrecision,
}


def fits_of(prior, *, members=3, adapter=None, backbone=None):
    backbone = backbone or tiny_backbone()
    models = [BoRA(backbone, 3, adapter=adapter or LoRA(rank=2), prior=prior(), seed=seed) for seed in range(members)]
    options = {"epochs": 2, "learning_rate": 0.03, "token_budget": 40}
    return [fit(model, tiny_data(), seed=seed, **options) for seed, model in enumerate(models)]


@pytest.mark.parametrize("prior", PRIORS)
def test_the_draws_are_the_members(prior):
    fits = fits_of(PRIORS[prior])
    before = [{name: value.clone() for name, value in fitted.weights()[0].items()} for fitted in fits]
    posterior = Posterior(ensemble(iter(fits)))
    for k, theta in enumerate(before):
        for name, value in posterior.draw(k).items():
            torch.testing.assert_close(value, theta[name], rtol=1e-5, atol=1e-6)
        for name, value in fits[k].weights()[0].items():  # the members themselves stay as they are
            assert torch.equal(value, theta[name])
    # more draws than members: each member counts once
    assert len(list(posterior.draws(8))) == 3
    assert len(list(posterior.draws(2))) == 2
    test = tiny_data().test
    found, expected = posterior.score(test, draws=8), predictive(fits[0].model, test, lambda: before)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-5)
    assert found.log_likelihood.shape == (3, len(test))


def test_the_centre_is_the_member_with_the_lowest_validation_score():
    fits = fits_of(PRIORS["fixed"])
    for fitted, score in zip(fits, (9.0, 7.0, 8.0), strict=True):
        fitted.validation_score = score
    joint = ensemble(fits)
    assert joint.validation_score == 7.0
    assert joint.history == fits[1].history
    assert joint.seconds == pytest.approx(sum(fitted.seconds for fitted in fits))
    for found, expected in zip(joint.weights(), fits[1].weights(), strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_learned_tau_is_the_geometric_mean():
    fits = fits_of(PRIORS["learned"], members=2)
    taus = [fitted.tau_by_group() for fitted in fits]
    assert taus[0] != taus[1]
    for name, tau in ensemble(fits).tau_by_group().items():
        assert math.log(tau) == pytest.approx(sum(math.log(of[name]) for of in taus) / 2, rel=1e-5)
    assert [fitted.tau_by_group() for fitted in fits] == taus


def test_all_sites_of_a_draw_are_of_one_member():
    model = tiny_bora(prior=HierarchicalNormal(30.0))
    guide = EnsembleGuide(model, members=4)
    make_parameters(guide, model)
    assert not [*guide.parameters()]
    guide.give([{name: torch.full_like(value, k) for name, value in guide.median().items()} for k in range(4)])
    drawn = []
    for seed in range(40):
        with poutine.seed(rng_seed=seed):
            trace = poutine.trace(guide).get_trace()
        [value] = {
            float(number)
            for node in trace.nodes.values()
            if node["type"] == "sample" and "fn" in node
            for number in node["value"].unique()
            if node["name"].startswith(("theta", "prior_mean"))
        }
        drawn.append(value)
    assert {*drawn} == {0.0, 1.0, 2.0, 3.0}
    with pyro.poutine.seed(rng_seed=0):
        theta, _ = model.weights_given(guide())
    assert all(value.shape[0] == 3 for value in theta.values())


def test_what_is_no_ensemble():
    backbone = tiny_backbone()
    fits = fits_of(PRIORS["fixed"], members=2, backbone=backbone)
    frozen = fits_of(PRIORS["fixed"], members=2, adapter=FrozenALoRA(rank=2), backbone=backbone)
    other_tau = fits_of(lambda: HierarchicalNormal(31.0), members=1, backbone=backbone)
    other_rank = fits_of(PRIORS["fixed"], members=1, adapter=LoRA(rank=3), backbone=backbone)
    model = BoRA(backbone, 3, adapter=LoRA(rank=2), prior=HierarchicalNormal(30.0))
    posterior = fit(model, tiny_data(), guide=normal_guide(model), epochs=1)
    renamed = fits_of(PRIORS["fixed"], members=1, backbone=backbone)
    renamed[0].tasks = ["task 0", "task 1", "another"]
    for given, message in (
        (fits[:1], "1 fits are given; an ensemble needs two or more"),
        ([], "0 fits are given"),
        (frozen, "have different tensors .* which FrozenALoRA.* does not learn"),
        (fits[:1] + other_tau, r"different priors: HierarchicalNormal\(tau=30\) and HierarchicalNormal\(tau=31\)"),
        (fits[:1] + other_rank, "different adapters"),
        ([fits[0], posterior], "member 1 has the guide NormalGuide; an ensemble is made of MAP fits"),
        (fits[:1] + renamed, "different tasks"),
    ):
        with pytest.raises(InputError, match=message):
            ensemble(given)
    with pytest.raises(InputError, match="no linear expansion"):
        Posterior(ensemble(fits)).predictor(linearised=True)
    with pytest.raises(InputError, match="members is 1; give a whole number from 2 up"):
        EnsembleGuide(model, members=1)
    guide = EnsembleGuide(model, members=2)
    make_parameters(guide, model)
    with pytest.raises(InputError, match="1 members are given; the guide has 2"):
        guide.give([guide.median()])
