"""Adapters that are given, and gates that are inferred: what is sampled, and what a run folder stores."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

from bora_pyro import InputError
from bora_pyro.data.batch import loaded_tasks
from bora_pyro.priors import FrozenAdapters
from bora_pyro.priors.task_plate import TaskPlate

STARTS = {"q.lora_A": torch.zeros(2, 3), "q.gate": torch.zeros(2, 4)}


def prior(**options):
    generator = torch.Generator().manual_seed(0)
    theta = {"q.lora_A": torch.randn((3, 2, 3), generator=generator)}
    return FrozenAdapters(theta, {"q.lora_A": theta["q.lora_A"].mean(0)}, scale=0.5, **options)


def sampled(prior, plate=None):
    with poutine.trace() as trace, poutine.seed(rng_seed=1):
        found = prior.sample(STARTS, plate or pyro.plate("tasks", 3, dim=-1))
    return found, trace.trace


def test_the_adapters_have_no_site_and_the_gates_have_a_normal_prior():
    own = prior()
    found, trace = sampled(own)
    assert torch.equal(found["q.lora_A"], own.theta["q.lora_A"])
    site = trace.nodes["theta.q.gate"]
    trace.compute_log_prob()
    expected = torch.distributions.Normal(0, 0.5).log_prob(found["q.gate"]).sum()
    torch.testing.assert_close(site["log_prob_sum"], expected)
    assert torch.equal(site["value"], found["q.gate"])
    sites = own.sites(found, own.means({}, found))
    assert sites.keys() == {"theta.q.gate"}
    assert torch.equal(sites["theta.q.gate"], found["q.gate"])
    assert not own.means({}, found)["q.gate"].any()
    assert float(own.precision("q.gate", STARTS["q.gate"])) == 4
    with pytest.raises(InputError, match="their tau is not known"):
        own.precision("q.lora_A", STARTS["q.lora_A"])


def test_a_plate_of_some_tasks_gets_their_rows():
    own = prior()
    every, _ = sampled(own)
    some, _ = sampled(own, TaskPlate(3, loaded_tasks(torch.tensor([0, 2]))))
    for name, value in every.items():
        assert torch.equal(some[name], value[[0, 2]])


def test_given_rows_stay_and_only_the_others_are_sampled():
    rows = {"q.gate": torch.full((2, 2, 4), 7.0)}
    own = prior(rows=rows)
    found, trace = sampled(own)
    assert torch.equal(found["q.gate"][:2], rows["q.gate"])
    assert trace.nodes["theta.q.gate"]["value"].shape == (1, 2, 4)
    assert torch.equal(own.sites(found, own.means({}, found))["theta.q.gate"], found["q.gate"][2:])


def test_draws_are_chosen_and_stored():
    draws = [{"q.lora_A": torch.full((3, 2, 3), float(k))} for k in range(2)]
    own = prior(draws=draws)
    before = own.theta["q.lora_A"]
    for number, value in ((0, draws[0]["q.lora_A"]), (1, draws[1]["q.lora_A"]), (None, before)):
        own.choose(number)
        assert torch.equal(sampled(own)[0]["q.lora_A"], value)
    again = FrozenAdapters.from_state(own.state(), scale=0.5)
    assert again.num_draws == 2
    assert again.state().keys() == own.state().keys()
    assert all(torch.equal(value, own.state()[name]) for name, value in again.state().items())
    with pytest.raises(InputError, match="draws are of other latents"):
        prior(draws=[{"q.lora_B": torch.zeros(1)}])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_bad_input(scale):
    with pytest.raises(InputError, match="scale of the gates"):
        FrozenAdapters({"a": torch.zeros(2, 1)}, {"a": torch.zeros(1)}, scale=scale)
