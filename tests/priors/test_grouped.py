"""A level of groups between the tasks and Θ: its density, its two τ, and its limit against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal

from bora_pyro import HierarchicalNormal, InputError, LoRA, fit
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.inference.optimizer import group_parameters
from bora_pyro.priors import ByLatent, GroupedNormal, with_shared
from tests.tiny import TASKS, random_weights, tiny_bora, tiny_data
from tests.tiny_base import toy_data, toy_model

GROUPS = ["whig", "free", "whig"]
MEMBER = torch.tensor([1, 0, 1])  # of the sorted names
TAU, TAU_GROUP = 50.0, 200.0


def model_with(prior, **options):
    return tiny_bora(targets=["q_proj"], prior=prior, **options)


def trace_of(model):
    with poutine.seed(rng_seed=0), torch.no_grad():
        trace = poutine.trace(model.weights).get_trace()
    trace.compute_log_prob()
    return trace


def test_the_density_is_that_of_three_levels():
    model = model_with(GroupedNormal(GROUPS, TAU, TAU_GROUP))
    trace = trace_of(model)
    for name in model.starts:
        mean, white = (trace.nodes[site]["value"] for site in (f"prior_mean.{name}", f"group.{name}_decentered"))
        own, theta = (trace.nodes[site]["value"] for site in (f"theta.{name}_decentered", f"theta.{name}"))
        assert white.shape == (2, *mean.shape)
        assert own.shape == theta.shape == (TASKS, *mean.shape)
        of_group = mean + white / math.sqrt(TAU_GROUP)
        torch.testing.assert_close(theta, of_group[MEMBER] + own / math.sqrt(TAU))
        # whitened: the density of Θ_g and θ_d themselves, times the volume of the change of variables
        volume = 0.5 * mean.numel() * (2 * math.log(TAU_GROUP) + 3 * math.log(TAU))
        expected = Normal(mean, TAU_GROUP**-0.5).log_prob(of_group).sum()
        expected = expected + Normal(of_group[MEMBER], TAU**-0.5).log_prob(theta).sum()
        found = sum(trace.nodes[f"{level}.{name}_decentered"]["log_prob_sum"] for level in ("group", "theta"))
        torch.testing.assert_close(found, expected - volume, rtol=1e-5, atol=1e-3)


def test_equal_means_of_groups_are_the_hierarchy_of_two_levels():
    """With the whitened means of the groups at 0, θ and the density of the deviations are those of HierarchicalNormal."""
    model, plain = (model_with(prior) for prior in (GroupedNormal(GROUPS, TAU, TAU_GROUP), HierarchicalNormal(TAU)))
    theta, mean = random_weights(plain), {name: value[0] for name, value in random_weights(plain, seed=1).items()}
    sites = plain.sites_given(theta, mean)
    zeros = {f"group.{name}_decentered": torch.zeros(2, *start.shape) for name, start in model.starts.items()}
    torch.testing.assert_close(model.weights_given(sites | zeros), (theta, mean))
    traces = [poutine.trace(poutine.condition(each.weights, data=sites | zeros)).get_trace() for each in (model, plain)]
    sums = []
    for trace in traces:
        trace.compute_log_prob()
        sums.append(sum(node["log_prob_sum"] for name, node in trace.nodes.items() if name.startswith("theta") and "fn" in node))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("prior", [GroupedNormal(GROUPS, TAU, TAU_GROUP), GroupedNormal(GROUPS, per="task")], ids=repr)
def test_sites_give_theta_again_with_the_groups_at_their_mode(prior):
    model = model_with(prior)
    trace_of(model)
    theta, mean = random_weights(model), {name: value[0] for name, value in random_weights(model, seed=1).items()}
    sites = model.sites_given(theta, mean)
    torch.testing.assert_close(model.weights_given(sites), (theta, mean))
    for name in model.starts:
        tau, tau_group = prior.precision(name, mean[name]), prior.group_precision(name, mean[name])
        of_group = prior.group_deviations(sites, [name])[name].requires_grad_()
        free = theta[name] - mean[name] - of_group[MEMBER]
        (0.5 * tau_group * of_group.square().sum() + 0.5 * (tau * free.square()).sum()).backward()
        assert of_group.grad.abs().max() < 1e-3 * float(tau.max())


def test_a_task_averages_within_its_group():
    model = model_with(GroupedNormal(GROUPS, TAU, TAU_GROUP))
    theta, mean = random_weights(model), {name: value[0] for name, value in random_weights(model, seed=1).items()}
    sites = model.sites_given(theta, mean)
    average = model.prior.average(sites, theta)
    for name, value in model.prior.group_deviations(sites, [*theta]).items():
        own = theta[name] - mean[name] - value[MEMBER]
        torch.testing.assert_close(theta[name] - average[name], own - own.mean(0))


def exact_map(y, *, member, precision, tau, tau_group):
    """The MAP (Θ, Θ_g − Θ, θ_d − Θ_g) of y_d ~ Normal(θ_d, 1/precision), which is the mean of the posterior: (entries,) each."""
    tasks, groups = len(member), int(member.max()) + 1
    design = torch.cat([torch.ones(tasks, 1), torch.eye(groups)[member], torch.eye(tasks)], 1).double()
    prior = torch.cat([torch.zeros(1), torch.full((groups,), tau_group), torch.full((tasks,), tau)]).double()
    found = torch.linalg.solve(precision * design.T @ design + prior.diag(), precision * design.T @ y.double())
    return found[0].float(), found[1 : 1 + groups].float(), found[1 + groups :].float()


@pytest.mark.parametrize(("tau", "tau_group", "start"), [(100.0, 25.0, 1.0), (400.0, 10.0, 1e4), (50.0, 1000.0, 100.0)])
def test_both_precisions_are_learned(tau, tau_group, start):
    """A linear-Gaussian hierarchy of 12 groups of 4 tasks whose deviations are at their optimum when τ is learned."""
    groups, entries, precision, generator = 12, 400, 200.0, torch.Generator().manual_seed(0)
    member = torch.arange(groups).repeat_interleave(4)
    of_group = tau_group**-0.5 * torch.randn((groups, entries), generator=generator)
    theta = of_group[member] + tau**-0.5 * torch.randn((len(member), entries), generator=generator)
    y = theta + precision**-0.5 * torch.randn(theta.shape, generator=generator)
    task = torch.arange(len(member)).repeat_interleave(4)
    held_out = theta[task] + precision**-0.5 * torch.randn((len(task), entries), generator=generator)
    prior = GroupedNormal([f"{group:02}" for group in member.tolist()], start=start, start_group=start)
    zero = torch.zeros(1, entries)
    prior.tasks.begin("x", zero, len(member))
    prior.level.begin("x", zero, groups)
    logs = []
    for look in range(120):
        now, now_group = float(prior.precision("x", zero)), float(prior.group_precision("x", zero))
        mean, deviation_of_group, own = exact_map(y, member=member, precision=precision, tau=now, tau_group=now_group)
        fitted = mean + deviation_of_group[member] + own
        chosen = torch.arange(look % 4, len(task), 4)
        gradients = precision * (held_out[chosen] - fitted[task[chosen]])
        sites = {"group.x_decentered": math.sqrt(now_group) * deviation_of_group[:, None]}
        deviations = (own - own.mean(0))[task[chosen]][:, None]
        prior.learn({"x": deviations}, {"x": gradients[:, None]}, task[chosen], sites=sites)
        logs.append(
            [math.log(float(prior.precision("x", zero)) / tau), math.log(float(prior.group_precision("x", zero)) / tau_group)]
        )
    found = torch.tensor(logs[60:]).mean(0)
    assert found.abs().max() < math.log(1.25)


def test_what_is_learned_is_state():
    prior, other = (GroupedNormal(GROUPS) for _ in range(2))
    model = toy_model(prior=prior)
    fitted = fit(model, toy_data(), epochs=3, learning_rate=0.03, token_budget=128)
    assert fitted.best_epoch
    state = prior.state()
    assert {name for name in state if name.startswith("tau.group.")} == {f"tau.group.{name}" for name in model.starts}
    trace_of(toy_model(prior=other))
    other.load_state(state)
    assert other.state().keys() == state.keys()
    for name, value in other.state().items():
        assert torch.equal(value, state[name])
    assert any((value != 100).any() for name, value in state.items() if name.startswith("tau.group."))


def test_the_means_of_groups_have_a_rate_of_their_own():
    model = model_with(GroupedNormal(GROUPS, TAU, TAU_GROUP))
    fitted = fit(model, tiny_data(), epochs=2)
    found = group_parameters(fitted.guide)
    assert sorted(found.values()) == sorted(model.starts)
    assert all(name.startswith("group.") for name in found)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_fit_moves_groups_apart(drawn):
    """Also if a step draws its tasks: the means of the groups are common to all steps."""
    model = toy_model(prior=GroupedNormal(GROUPS, TAU, TAU_GROUP))
    fitted = fit(model, toy_data(), epochs=2, task_subsampling=drawn, learning_rate=0.03, token_budget=128)
    assert fitted.best_epoch
    moved = model.prior.group_deviations(fitted.sites(), [*model.starts])
    assert all(bool((value[0] != value[1]).any()) for value in moved.values())
    assert fitted.tau() == pytest.approx(TAU)
    assert fitted.tau_group() == pytest.approx(TAU_GROUP)


def test_a_new_task_of_a_group_and_of_none():
    model = model_with(GroupedNormal(GROUPS, TAU, TAU_GROUP))
    theta, mean = random_weights(model), {name: value[0] for name, value in random_weights(model, seed=1).items()}
    sites = model.sites_given(theta, mean)
    means, precisions = model.prior.of_new_task(sites, mean, group="whig")
    for name, value in model.prior.group_deviations(sites, [*mean]).items():
        torch.testing.assert_close(means[name], mean[name] + value[1])
        assert float(precisions[name]) == TAU
    means, precisions = model.prior.of_new_task(sites, mean)
    torch.testing.assert_close(means, mean)
    assert all(float(value) == pytest.approx(1 / (1 / TAU + 1 / TAU_GROUP)) for value in precisions.values())
    with pytest.raises(InputError, match="there is no group 'wig'; the fit has 'free', 'whig'; did you mean 'whig'"):
        model.prior.of_new_task(sites, mean, group="wig")
    with pytest.raises(InputError, match=r"task_group is 'whig', but HierarchicalNormal\(tau=5\) has no groups of tasks"):
        HierarchicalNormal(5).of_new_task(sites, mean, group="whig")


def test_latents_that_all_tasks_share_have_no_groups():
    prior = with_shared(GroupedNormal(GROUPS, TAU, TAU_GROUP), SharedPlusTaskLoRA.shared)
    assert isinstance(prior, ByLatent)
    model = model_with(prior, adapter=SharedPlusTaskLoRA(rank=2))
    trace = trace_of(model)
    assert {name for name in trace.nodes if name.startswith("group.")} == {
        f"group.{name}_decentered" for name in model.starts if "lora" in name
    }
    assert prior.groups == ("free", "whig")
    fitted = fit(model, tiny_data(), epochs=1)
    assert fitted.tau_group() == pytest.approx(TAU_GROUP)
    means, precisions = prior.of_new_task(fitted.sites(), fitted.weights()[1], group="free")
    assert all(math.isinf(precisions[name]) == ("shared" in name) for name in means)


def test_entries_that_no_task_of_a_group_has_are_left_out():
    class ByTask(LoRA):
        """LoRA of rank 2 whose second task has rank 1."""

        def start(self, slot, weight, generator):
            start = super().start(slot, weight, generator)
            active = torch.tensor([[True, True], [True, False], [True, True]])
            start.masks.update({"lora_A": active[:, :, None], "lora_B": active[:, None, :]})
            return start

    model = model_with(GroupedNormal(GROUPS, TAU, TAU_GROUP), adapter=ByTask(rank=2))
    site = trace_of(model).nodes["group.q_proj.lora_A_decentered"]
    density = torch.distributions.Normal(0.0, 1.0).log_prob(site["value"])
    expected = torch.stack([density[0][:, :1].sum(), density[1].sum()])  # "free" has the second task alone
    torch.testing.assert_close(site["log_prob"], expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": ["a", "a", "a"]}, "there is one group, 'a': a level of groups needs two groups or more"),
        ({"groups": ["a", "b", "c"]}, "each task is a group of its own"),
        ({"tau": 0.0}, "tau 0 is no level of groups"),
        ({"tau": math.inf}, "tau inf is no level of groups; map the tasks' column to the groups"),
        ({"tau_group": math.inf}, "tau_group inf is no level of groups; leave the groups out"),
        ({"tau_group": -1.0}, "tau -1.0 is not allowed"),
        ({"per": "sites"}, "per is 'sites'; allowed: site, layer, task, model; did you mean 'site'"),
    ],
)
def test_what_is_no_level_of_groups_is_refused(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        GroupedNormal(**({"groups": GROUPS} | arguments))
    assert "\n" not in str(caught.value)
