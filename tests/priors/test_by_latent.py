"""A prior for each latent by its name: each part of the model is what its own prior makes of it."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, Independent, InputError, LoRA, Pooled, map_guide
from bora_pyro.adapters import ADAPTERS
from bora_pyro.priors import ByLatent, HierarchicalNorm, with_shared
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora

PARTS = {
    "A pooled": ByLatent({"lora_A": Pooled()}, other=HierarchicalNormal(tau=50)),
    "B independent": ByLatent({"lora_B": Independent()}, other=HierarchicalNorm(tau=50, form="centered")),
    "nested": ByLatent({"lora_A": HierarchicalNormal(7)}, other=ByLatent({"lora_B": Pooled()}, other=Independent())),
}
EVERY_MIXTURE = pytest.mark.parametrize("prior", PARTS.values(), ids=PARTS)


def sites_of(prior, theta, mean):
    return prior.sites(theta, mean)


def own(prior, name):
    """The prior of a latent, through any number of mixtures."""
    return own(prior.of(name), name) if isinstance(prior, ByLatent) else prior


@EVERY_MIXTURE
def test_each_latent_has_the_sites_and_the_density_of_its_own_prior(prior):
    model = tiny_bora(prior=prior)
    with poutine.seed(rng_seed=0), torch.no_grad():
        trace = poutine.trace(model.weights).get_trace()
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample" and name != "tasks"}
    trace.compute_log_prob()
    for name in model.starts:
        alone = tiny_bora(prior=prior.of(name))
        part = poutine.trace(poutine.condition(alone.weights, data=values)).get_trace()
        part.compute_log_prob()
        of_name = {site for site in part.nodes if f".{name}" in site}
        assert of_name == {site for site in trace.nodes if f".{name}" in site}
        for site in of_name:
            assert torch.equal(part.nodes[site]["log_prob_sum"], trace.nodes[site]["log_prob_sum"])


@EVERY_MIXTURE
def test_sites_are_the_inverse_of_sample(prior):
    model = tiny_bora(prior=prior)
    mean = {name: value[0] for name, value in random_weights(model, seed=1).items()}
    theta = {
        name: mean[name].expand_as(value) if isinstance(own(prior, name), Pooled) else value
        for name, value in random_weights(model).items()
    }
    given_theta, given_mean = model.weights_given(sites_of(prior, theta, mean))
    torch.testing.assert_close(given_theta, theta)
    for name, value in given_mean.items():
        expected = theta[name].mean(0) if isinstance(own(prior, name), Independent) else mean[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("prior", "of_a", "of_b"),
    [
        (ByLatent({"lora_A": Pooled()}, other=HierarchicalNormal()), 1, TASKS + 1),
        (ByLatent({"lora_B": Independent()}, other=Pooled()), 1, TASKS),
        (ByLatent({"lora_B": HierarchicalNorm()}, other=Independent()), TASKS, TASKS + 1),
    ],
    ids=repr,
)
def test_number_of_parameters(prior, of_a, of_b):
    model = tiny_bora("llama", targets="all-linear", prior=prior)
    guide = map_guide(model)
    guide(tiny_batch())
    sizes = {factor: sum(v.numel() for name, v in model.starts.items() if name.endswith(factor)) for factor in ("_A", "_B")}
    assert sum(p.numel() for p in guide.parameters()) == of_a * sizes["_A"] + of_b * sizes["_B"]


def test_a_name_stands_for_the_last_part_only():
    prior = ByLatent({"lora_A": Pooled()}, other=Independent())
    assert isinstance(prior.of("q_proj.lora_A"), Pooled)
    assert isinstance(prior.of("lora_A"), Pooled)
    assert isinstance(prior.of("lora_A.lora_B"), Independent)
    assert isinstance(prior.of("q_proj.my_lora_A"), Independent)


def test_what_an_adapter_declares_as_shared_is_pooled():
    own = HierarchicalNormal(tau=3)
    assert with_shared(own, LoRA.shared) is own
    prior = with_shared(own, ADAPTERS["lora_shared_plus_task"].shared)
    assert [type(prior.of(f"v_proj.{name}")) for name in ("shared_A", "shared_B")] == [Pooled, Pooled]
    assert [prior.of(f"v_proj.{name}") for name in ("lora_A", "lora_B")] == [own, own]
    assert repr(prior) == "ByLatent({'shared_A': Pooled(), 'shared_B': Pooled()}, other=HierarchicalNormal(tau=3))"


class Learner(HierarchicalNormal):
    """A prior that keeps what it was told."""

    every = 3

    def learn(self, *args, **kwargs):
        self.told = args, kwargs

    def state(self):
        return {"tau.x": torch.tensor(self.tau)}

    def load_state(self, state):
        self.tau = float(state["tau.x"])


def test_the_other_prior_learns_from_its_own_latents_alone():
    learner = Learner(tau=2)
    prior = ByLatent({"lora_A": Pooled()}, other=learner)
    deviations, gradients = ({f"{slot}.lora_{f}": object() for slot in "qv" for f in "AB"} for _ in range(2))
    task = torch.tensor([1, 0])
    prior.learn(deviations, gradients, task, all_reduce=abs)
    own = [{name: values[name] for name in ("q.lora_B", "v.lora_B")} for values in (deviations, gradients)]
    assert learner.told == ((*own, task), {"sites": None, "all_reduce": abs})
    assert prior.every == 3
    assert ByLatent({}, other=Pooled()).every == 0
    assert prior.state() == learner.state()
    prior.load_state({"tau.x": torch.tensor(7.0)})
    assert learner.tau == 7
    with pytest.raises(
        InputError, match=r"the prior of 'lora_B', HierarchicalNormal\(tau=7\), is learned during a fit; give it as other"
    ):
        ByLatent({"lora_B": learner}, other=Pooled())


def test_the_precision_of_a_latent_is_that_of_its_prior():
    prior, start = ByLatent({"lora_A": Pooled()}, other=HierarchicalNormal(tau=3)), torch.zeros(2, 4, 8)
    assert (float(prior.precision("q.lora_A", start)), float(prior.precision("q.lora_B", start))) == (float("inf"), 3.0)


def test_a_name_with_a_dot_is_refused():
    with pytest.raises(InputError, match=r"latent 'q_proj\.lora_A' is not allowed; give its last part alone, 'lora_A'"):
        ByLatent({"q_proj.lora_A": Pooled()}, other=Independent())
