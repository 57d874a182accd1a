from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_mean

from bora_pyro import HierarchicalNormal, Independent, Pooled, low_rank_guide, map_guide, normal_guide
from bora_pyro.guides import GUIDES, init_to_start, make_parameters
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora

PRIORS = [HierarchicalNormal(tau=100), HierarchicalNormal(tau=100, form="centered"), Independent(), Pooled()]
#: Parameters of each guide, in units of the sites: a location, a scale, and the two columns of a low-rank factor, or what lies
#: below the diagonal of the 64 entries of a layer. Half of the entries are those of A. 64 entries have five directions.
TENSORS = {
    "map": 1,
    "normal": 2,
    "task_normal": 1,  # and a scale for each task
    "ivon": 2,
    "structured": 2,
    "low_rank": 4,
    "multivariate_normal": 2 + 63 / 2,
    "blob": 1.5,
    "subspace": 1 + (5 + 5 * 5) / 64,
    "laplace": 0,
    "laplace_kfac": 0,
    "laplace_kronecker": 0,
    "auto_normal": 2,
    "swag": 1,
    "tfb": 0,
}
#: Guides that are made without a fit.
UNFITTED = [name for name, tensors in TENSORS.items() if not tensors]
EVERY_PRIOR = pytest.mark.parametrize("prior", PRIORS, ids=repr)


def stock_steps(model, guide, *, steps=12, elbo=None):
    """Losses of the loop that every Pyro tutorial has."""
    svi = SVI(model, guide, pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.0}), elbo or Trace_ELBO())
    batch = tiny_batch()
    with poutine.seed(rng_seed=0):
        return [svi.step(batch) for _ in range(steps)]


@EVERY_PRIOR
@pytest.mark.parametrize(
    "make", [map_guide, lambda model: AutoDelta(model, init_loc_fn=init_to_mean)], ids=["map_guide", "stock AutoDelta"]
)
def test_stock_svi_lowers_the_loss(make, prior):
    model = tiny_bora(prior=prior)
    guide, starts = make(model), {name: value.clone() for name, value in model.starts.items()}
    losses = stock_steps(model, guide)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 5  # nats
    torch.testing.assert_close(model.starts, starts, atol=0, rtol=0)
    # every parameter moved from there, in every task
    theta, _ = model.weights_given(guide.median())
    assert all((theta[name] - start).flatten(1).abs().amax(1).gt(0).all() for name, start in model.starts.items())


@pytest.mark.parametrize(
    ("prior", "elbo"), [*((prior, Trace_ELBO) for prior in PRIORS), (PRIORS[0], TraceMeanField_ELBO)], ids=str
)
@pytest.mark.parametrize("guide", [name for name in GUIDES if name not in UNFITTED])
def test_stock_svi_takes_every_guide(guide, prior, elbo):
    model = tiny_bora(prior=prior)
    losses = stock_steps(model, GUIDES[guide](model, scale=0.01), steps=15, elbo=elbo())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@EVERY_PRIOR
def test_map_of_trace_elbo_and_of_mean_field_elbo(prior):
    model = tiny_bora(prior=prior)
    losses = [stock_steps(model, map_guide(model), steps=4, elbo=elbo) for elbo in (Trace_ELBO(), TraceMeanField_ELBO())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("prior", "copies"), [*zip(PRIORS, [TASKS + 1, TASKS + 1, TASKS, 1], strict=True)], ids=repr)
@pytest.mark.parametrize("guide", GUIDES)
def test_number_of_parameters(guide, prior, copies):
    model = tiny_bora(prior=prior)
    built = GUIDES[guide](model)
    built(tiny_batch())
    copies += TASKS * (guide == "task_normal" and copies > 1)
    # 2 slots x 2 layers of A (2, 32) and B (32, 2), for each task and for Θ
    assert sum(p.numel() for p in built.parameters()) == TENSORS[guide] * copies * 2 * 2 * 2 * (2 * 32)
    assert all(p.requires_grad and p.is_contiguous() and p.dtype == torch.float32 for p in built.parameters())


@EVERY_PRIOR
def test_map_starts_where_the_adapters_start(prior):
    model = tiny_bora(prior=prior)
    guide = map_guide(model)
    guide(tiny_batch())
    theta, mean = model.weights_given(guide.median())
    for name, start in model.starts.items():
        assert torch.equal(theta[name], start.expand(TASKS, *start.shape))
        torch.testing.assert_close(mean[name], start)


def test_a_start_is_a_tensor_of_its_own():
    model = tiny_bora(prior=Independent())
    trace = poutine.trace(model).get_trace(tiny_batch())
    site = trace.nodes["theta.q_proj.lora_A"]
    start = init_to_start(site)
    assert start.is_contiguous()
    assert len({start[d].data_ptr() for d in range(TASKS)}) == TASKS
    start += 1
    torch.testing.assert_close(init_to_start(site), start - 1)


def test_guides_share_no_parameters_and_fill_no_store():
    pyro.clear_param_store()
    model = tiny_bora()
    one, two = map_guide(model), map_guide(model)
    batch = tiny_batch()
    two(batch)
    before = {name: value.clone() for name, value in two.median().items()}
    stock_steps(model, one, steps=2)
    torch.testing.assert_close(two.median(), before, atol=0, rtol=0)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    assert list(pyro.get_param_store().keys()) == []


def test_no_parameter_of_the_base_is_in_the_guide():
    model = tiny_bora()
    guide = map_guide(model)
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    stock_steps(model, guide, steps=2)
    base = {p.data_ptr() for p in model.backbone.model.parameters()}
    assert not base & {p.data_ptr() for p in guide.parameters()}
    assert all(name.split(".")[0] in ("theta", "prior_mean") for name, _ in guide.named_parameters())
    torch.testing.assert_close(dict(model.backbone.model.state_dict()), before, atol=0, rtol=0)


@EVERY_PRIOR
def test_auto_normal_runs(prior):
    model = tiny_bora(prior=prior)
    guide = AutoNormal(model, init_loc_fn=init_to_start, init_scale=1e-3)
    losses = stock_steps(model, guide, steps=12)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    theta, _ = model.weights_given(guide.median())
    assert all(value.shape == (TASKS, *model.starts[name].shape) for name, value in theta.items())


def test_predictive_from_the_guide_gives_theta():
    model, batch = tiny_bora(), tiny_batch()
    guide = map_guide(model)
    with torch.no_grad():
        guide(batch)
        for value in guide.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    theta, mean = model.weights_given(guide.median())
    draws = Predictive(model.weights, guide=lambda: guide(batch), num_samples=2)()
    for name, value in theta.items():
        torch.testing.assert_close(draws[f"theta.{name}"].view(2, *value.shape), value.expand(2, *value.shape))
        torch.testing.assert_close(
            draws[f"prior_mean.{name}"].view(2, *mean[name].shape), mean[name].expand(2, *mean[name].shape)
        )


def test_weights_given_inverts_the_whitening():
    model = tiny_bora(prior=HierarchicalNormal(tau=25))
    z, mean = random_weights(model), {name: value[1] for name, value in random_weights(model, seed=1).items()}
    sites = {f"theta.{name}_decentered": value for name, value in z.items()} | {
        f"prior_mean.{name}": value for name, value in mean.items()
    }
    theta, given_mean = model.weights_given(sites)
    torch.testing.assert_close(theta, {name: mean[name] + value / 5 for name, value in z.items()})
    torch.testing.assert_close(given_mean, mean)
    assert not any(value.requires_grad for value in theta.values())


@pytest.mark.parametrize("build", [normal_guide, low_rank_guide])
def test_in_the_centred_form_tasks_begin_at_the_start(build):
    """θ_d has its mean at the site Θ: at Θ's start, whatever a draw of the flat prior is."""
    model = tiny_bora(targets=["q_proj"], prior=HierarchicalNormal(100.0, form="centered"))
    guide = build(model)
    make_parameters(guide, model)
    for name, start in model.starts.items():
        assert torch.equal(guide.median()[f"theta.{name}"], start.expand(model.num_tasks, *start.shape))
