from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO

from bora_pyro import BoRA, CausalLM, HierarchicalNormal, Independent, InputError, LoRA, Pooled, fit, map_guide
from bora_pyro.priors import PerLatent
from tests.tiny import TASKS, of_task, peft_model, random_weights, tiny_backbone, tiny_batch, tiny_bora, tiny_data

LATENTS = [f"{slot}.{factor}" for slot in ("v_proj", "q_proj") for factor in ("lora_A", "lora_B")]


def sites_of(prior, theta, mean):
    """Values of the sample sites of `prior` at given θ and Θ."""
    if isinstance(prior, Independent):
        return {f"theta.{name}": value for name, value in theta.items()}
    means = {f"prior_mean.{name}": value for name, value in mean.items()}
    if isinstance(prior, Pooled):
        return means
    if prior.form == "centered":
        return means | {f"theta.{name}": value for name, value in theta.items()}
    whitened = {name: math.sqrt(prior.tau) * (theta[name] - mean[name]) for name in theta}
    return means | {f"theta.{name}_decentered": value for name, value in whitened.items()}


def guide_at(model, sites):
    """The MAP guide with the sites at given values."""
    guide = map_guide(model)
    with torch.no_grad():
        guide(tiny_batch())
        for name, value in guide.median().items():
            value.copy_(sites[name])
    return guide


@pytest.mark.parametrize(
    ("prior", "names"),
    [
        (HierarchicalNormal(tau=100), ["prior_mean.{}", "theta.{}_decentered", "theta.{}"]),
        (HierarchicalNormal(tau=100, form="centered"), ["prior_mean.{}", "theta.{}"]),
        (Independent(), ["theta.{}"]),
        (Pooled(), ["prior_mean.{}"]),
    ],
    ids=repr,
)
def test_the_trace_has_exactly_the_expected_sites(prior, names):
    model = tiny_bora(prior=prior)
    trace = poutine.trace(model).get_trace(tiny_batch())
    expected = {name.format(latent) for latent in LATENTS for name in names} | {"tasks", "documents", "tokens"}
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == expected
    assert not [name for name, site in trace.nodes.items() if site["type"] == "param"]
    # no name is a dotted prefix of another, and none begins as a module of the base does
    assert not [(a, b) for a in expected for b in expected if b.startswith(a + ".")]
    assert not [name for name in expected if name.split(".")[0] in ("model", "transformer")]


def log_likelihood_by_peft(model, theta, batch):
    """Σ log p(w) with PEFT's adapters and the loss that the base's own class computes, one document at a time."""
    total = torch.zeros(())
    references = [peft_model(model, of_task(theta, d)) for d in range(model.num_tasks)]
    for row, d, length in zip(batch.input_ids, batch.task.tolist(), batch.attention_mask.sum(-1).tolist(), strict=True):
        document = row[None, :length]
        total += -references[d](input_ids=document, labels=document).loss.detach() * (length - 1)
    return total


@pytest.mark.parametrize(
    "prior", [HierarchicalNormal(tau=50), HierarchicalNormal(tau=50, form="centered"), Independent(), Pooled()], ids=repr
)
@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
def test_elbo_is_the_sum_of_equations_5_and_6(architecture, prior):
    model, batch = tiny_bora(architecture, prior=prior), tiny_batch()
    mean = of_task(random_weights(model, seed=1), 0)
    theta = random_weights(model)
    if isinstance(prior, Pooled):
        theta = {name: mean[name].expand_as(value) for name, value in theta.items()}
    sites = sites_of(prior, theta, mean)
    guide = guide_at(model, sites)

    log_prior = torch.zeros(())
    if isinstance(prior, HierarchicalNormal):
        deviations = torch.cat([(theta[name] - mean[name]).flatten() for name in theta])
        log_prior = torch.distributions.Normal(0.0, prior.tau**-0.5).log_prob(deviations).sum()
        if prior.form == "noncentered":  # the density of z = √τ (θ - Θ), not that of θ
            log_prior -= 0.5 * math.log(prior.tau) * len(deviations)
    expected = -(log_likelihood_by_peft(model, theta, batch) + log_prior)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.testing.assert_close(elbo.differentiable_loss(model, guide, batch).detach(), expected, rtol=1e-5, atol=1e-3)

    given_theta, given_mean = model.weights_given(guide.median())
    torch.testing.assert_close(given_theta, theta)
    expected_mean = {name: value.mean(0) for name, value in theta.items()} if isinstance(prior, Independent) else mean
    torch.testing.assert_close(given_mean, expected_mean)


@pytest.mark.parametrize("prior", [HierarchicalNormal(tau=50), Independent(), Pooled()], ids=repr)
def test_both_elbos_agree_for_map(prior):
    model, batch = tiny_bora(prior=prior), tiny_batch()
    guide = map_guide(model)
    losses = [elbo.loss(model, guide, batch) for elbo in (Trace_ELBO(), TraceMeanField_ELBO())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_prior_is_never_scaled_by_the_batch():
    from tests.tiny import tiny_split

    model = tiny_bora(prior=HierarchicalNormal(tau=50))
    weights = random_weights(model)
    sites = sites_of(model.prior, weights, of_task(weights, 0))
    densities = []
    for budget in (10_000, 16):
        batch = tiny_split().batches(token_budget=budget)[0]
        trace = poutine.trace(poutine.condition(model, data=sites)).get_trace(batch)
        trace.compute_log_prob()
        densities.append(
            [site["log_prob_sum"] for name, site in trace.nodes.items() if "log_prob_sum" in site and name != "tokens"]
        )
    assert densities[0] == densities[1]
    assert batch.scale > 1


# Pooled is one LoRA on all data, and Independent is one LoRA a task: step for step


STEPS, RATE = 5, 3e-3


def fitted_by_pyro(model, batch):
    guide, elbo = map_guide(model), TraceMeanField_ELBO()
    with torch.no_grad():
        guide(batch)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        elbo.differentiable_loss(model, guide, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weights_given({name: value.detach() for name, value in guide.median().items()})


def fitted_by_torch(model, batch, rows):
    """LoRA in plain torch on the documents `rows`: functional factors, cross entropy, AdamW."""
    factors = {name: start.clone().requires_grad_() for name, start in model.starts.items()}
    optimizer = torch.optim.AdamW(factors.values(), lr=RATE, weight_decay=0.0)

    def change(slot, layer, x, output):
        a, b = factors[f"{slot.name}.lora_A"][layer], factors[f"{slot.name}.lora_B"][layer]
        return output + 1.5 * x @ a.T @ b.T

    for _ in range(STEPS):
        logits = model.backbone.logits(batch.input_ids[rows], change)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[rows, 1:].flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in factors.items()}


def assert_moved_alike(actual, expected, starts):
    for name, value in expected.items():
        assert (value - starts[name]).abs().mean() > 0.1 * RATE
        torch.testing.assert_close(actual[name], value, atol=1e-6, rtol=1e-5)


def test_pooled_is_one_lora_on_all_data():
    model, batch = tiny_bora(prior=Pooled()), tiny_batch()
    theta, mean = fitted_by_pyro(model, batch)
    expected = fitted_by_torch(model, batch, torch.arange(len(batch.task)))
    assert_moved_alike(mean, expected, model.starts)
    for d in range(TASKS):
        assert all(torch.equal(theta[name][d], mean[name]) for name in mean)


def test_independent_is_one_lora_a_task():
    model, batch = tiny_bora(prior=Independent()), tiny_batch()
    theta, _ = fitted_by_pyro(model, batch)
    for d in range(TASKS):
        expected = fitted_by_torch(model, batch, torch.nonzero(batch.task == d)[:, 0])
        assert_moved_alike(of_task(theta, d), expected, model.starts)


# the axes of the design: a new prior is a class, nothing else


class LaplaceHierarchy(PerLatent):
    """θ_d ~ Laplace(Θ, b) with p(Θ) ∝ 1."""

    def __init__(self, scale):
        self.scale = scale

    def sample_latent(self, name, start, tasks, mask=None):
        mean = pyro.sample(f"prior_mean.{name}", dist.Normal(start, 1.0).to_event(start.dim()).mask(False))
        with tasks:
            return pyro.sample(f"theta.{name}", dist.Laplace(mean, self.scale).to_event(start.dim()))

    def mean_of(self, name, sites, theta):
        return sites[f"prior_mean.{name}"]


def test_a_new_prior_needs_no_change_of_the_library():
    prior = LaplaceHierarchy(0.2)
    model, batch = tiny_bora(prior=prior), tiny_batch()
    theta, mean = random_weights(model), of_task(random_weights(model, seed=1), 0)
    sites = {f"theta.{name}": value for name, value in theta.items()} | {
        f"prior_mean.{name}": value for name, value in mean.items()
    }
    deviations = torch.cat([(theta[name] - mean[name]).flatten() for name in theta])
    log_prior = torch.distributions.Laplace(0.0, 0.2).log_prob(deviations).sum()
    loss = Trace_ELBO().loss(model, guide_at(model, sites), batch)
    assert loss == pytest.approx(-float(log_likelihood_by_peft(model, theta, batch) + log_prior), rel=1e-5)

    fitted = fit(model, tiny_data(), epochs=5, patience=0)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert (fitted.deviation_norms() >= 0).all()


# a plain callable for Pyro


def test_predictive_draws_all_sites_and_documents():
    model, batch = tiny_bora(), tiny_batch()
    guide = map_guide(model)
    guide(batch)
    with poutine.seed(rng_seed=0), torch.no_grad():
        draws = Predictive(poutine.uncondition(model), guide=guide, num_samples=4)(batch)
        prior_draws = Predictive(model, num_samples=4)(batch)
    assert draws["tokens"].shape == (4, *batch.labels.shape)
    assert len({tuple(draw.flatten().tolist()) for draw in draws["tokens"]}) == 4
    name = "q_proj.lora_A"
    start = model.starts[name]
    assert torch.equal(draws[f"theta.{name}"].squeeze(), start.expand(4, TASKS, *start.shape))
    assert prior_draws[f"theta.{name}"].reshape(4, TASKS, *start.shape).std(0).min() > 0


def test_render_model_names_sites_and_plates():
    pytest.importorskip("graphviz")
    source = pyro.render_model(tiny_bora(), model_args=(tiny_batch(),)).source
    sites = [*(f"{kind}.{latent}" for kind in ("prior_mean", "theta") for latent in LATENTS), "tokens", "tasks", "documents"]
    assert [site for site in sites if site not in source] == []


def test_a_model_needs_two_tasks_and_prints_itself():
    backbone = tiny_backbone()
    with pytest.raises(InputError, match="1 task given; BoRA shares between tasks and needs 2 or more"):
        BoRA(backbone, 1)
    model = BoRA(backbone, 2, adapter=LoRA(rank=4), prior=Pooled(), likelihood=CausalLM("documents"))
    assert repr(model) == "BoRA(2 tasks, LoRA(rank=4, alpha=4.0), Pooled(), CausalLM(unit='documents'))"


def test_defaults():
    model = BoRA(tiny_backbone(), 2)
    assert repr(model) == "BoRA(2 tasks, LoRA(rank=8, alpha=8.0), HierarchicalNormal(tau=100), CausalLM(unit='tokens'))"
