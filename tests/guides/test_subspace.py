"""The subspace guide: the dense Normal, the posterior of a linear model, and directions from the documents' gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

from bora_pyro import HierarchicalNormal, Independent, InputError, adapt, fit
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.data.batch import TaskDraw
from bora_pyro.guides import SubspaceGuide, guide_options, subspace_guide
from bora_pyro.guides.curvature import gradients_of
from bora_pyro.guides.directions import leading_gradients, orthonormal
from bora_pyro.guides.subspace import directions
from bora_pyro.guides.subspace_normal import SubspaceNormal
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.priors import Given, RandomPrecision, StandardNormal
from bora_pyro.priors.base import flat
from tests.linear_gaussian import LinearGaussian
from tests.tiny import random_weights, tiny_batch, tiny_bora, tiny_data, tiny_split

N, K, NOISE = 6, 3, 0.5  # N: entries of a layer


def doubles(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace_normal(k=K, *, batch=(2,)):
    """Events of two layers with a 2 x 3 matrix each."""
    basis = torch.linalg.qr(doubles(*batch, 2, N, k, seed=1)).Q
    factor = doubles(*batch, 2, k, k, seed=2).tril(-1) + torch.diag_embed(doubles(*batch, 2, k, seed=3).exp())
    return SubspaceNormal(doubles(*batch, 2, 2, 3), basis, factor, event_dim=3)


def test_with_all_directions_it_is_the_dense_normal():
    normal, value = subspace_normal(N), doubles(2, 2, 2, 3, seed=4)
    factor = normal.basis @ normal.scale_tril
    dense = MultivariateNormal(normal.loc.reshape(2, 2, N), factor @ factor.mT)
    torch.testing.assert_close(normal.log_prob(value), dense.log_prob(value.reshape(2, 2, N)).sum(-1))
    torch.testing.assert_close(normal.entropy(), dense.entropy().sum(-1))
    torch.testing.assert_close(normal.variance.reshape(2, 2, N), dense.variance)
    torch.testing.assert_close(normal.expand((4, 2)).log_prob(value), normal.log_prob(value).expand(4, 2))
    prior = StandardNormal(torch.zeros(2, 2, 3, dtype=torch.float64), 1.0).to_event(3)
    standard = MultivariateNormal(torch.zeros(N, dtype=torch.float64), torch.eye(N, dtype=torch.float64))
    torch.testing.assert_close(kl_divergence(normal, prior), kl_divergence(dense, standard).sum(-1))


def test_draws_stay_in_the_subspace_and_have_its_covariance():
    normal = subspace_normal()
    with poutine.seed(rng_seed=0):
        shift = (normal.rsample(torch.Size([50_000])) - normal.loc).reshape(-1, 2, 2, N)
    coordinates = (normal.basis.mT @ shift[..., None])[..., 0]
    outside = shift - (normal.basis @ coordinates[..., None])[..., 0]
    assert float(outside.abs().max()) < 1e-12
    expected = normal.scale_tril @ normal.scale_tril.mT
    found = torch.einsum("sblk,sblj->blkj", coordinates, coordinates) / len(coordinates)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    # the density is that of the coordinates, and so is the entropy
    assert float(-normal.log_prob(normal.loc + shift.view(-1, 2, 2, 2, 3)).mean(0)[0]) == pytest.approx(
        float(normal.entropy()[0]), abs=0.05
    )


def test_its_divergence_has_all_entries_of_the_prior_and_the_entropy_of_the_coordinates():
    normal = subspace_normal()
    zero = torch.zeros(2, 2, 3, dtype=torch.float64)
    factor = normal.basis @ normal.scale_tril
    square = normal.loc.square().flatten(1).sum(1) + factor.square().flatten(1).sum(1)
    expected = 0.5 * square + N * math.log(2 * math.pi) - normal.entropy()
    torch.testing.assert_close(kl_divergence(normal, StandardNormal(zero, 1.0).to_event(3)), expected)
    torch.testing.assert_close(kl_divergence(normal, flat(zero, 3)), -normal.entropy())


def linear_model():
    """y = X w + noise with w ~ Normal(0, I), and the mean and the precision of the posterior of w."""
    x, y = doubles(8, N, seed=5), doubles(8, seed=6)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(1, N, dtype=torch.float64), 1.0).to_event(2))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(x @ w[0], NOISE), obs=y)

    precision = torch.eye(N, dtype=torch.float64) + x.mT @ x / NOISE**2
    evidence = MultivariateNormal(torch.zeros(8, dtype=torch.float64), x @ x.mT + NOISE**2 * torch.eye(8, dtype=torch.float64))
    return model, torch.linalg.solve(precision, x.mT @ y / NOISE**2), precision, float(evidence.log_prob(y))


def fitted_without_noise(monkeypatch, model, guide, k):
    """Fit by the ELBO itself: the mean of a quadratic over ε is that over ±√k times each unit vector."""
    points = math.sqrt(k) * torch.cat([torch.eye(k), -torch.eye(k)]).double()

    def loss():
        losses = []
        for point in points:
            with monkeypatch.context() as patch:
                patch.setattr(
                    "torch.distributions.multivariate_normal._standard_normal", lambda shape, p=point, **_: p.view(shape)
                )
                losses.append(TemperedELBO().differentiable_loss(model, guide))
        return torch.stack(losses).mean()

    guide()
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=150, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with pyro.validation_enabled(False):
        optimizer.step(closure)
        return float(loss().detach())


@pytest.mark.parametrize("k", [2, 6])
def test_the_optimum_for_a_linear_model(monkeypatch, k):
    model, mean, precision, evidence = linear_model()
    basis = torch.linalg.qr(doubles(1, N, k, seed=7)).Q
    guide = SubspaceGuide(model, {"w": torch.ones(1, N, dtype=torch.float64)}, bases={"w": basis}, scale=0.5)
    loss = fitted_without_noise(monkeypatch, model, guide, k)
    torch.testing.assert_close(guide.median()["w"][0], mean, atol=1e-4, rtol=0)
    factor = guide.given("w", 2, {}, {}).scale_tril.detach()[0]
    torch.testing.assert_close(factor @ factor.mT, torch.linalg.inv(basis[0].mT @ precision @ basis[0]), atol=1e-4, rtol=0)
    assert (factor.tril(-1) != 0).sum() == k * (k - 1) / 2  # the directions are correlated
    if k == N:  # the posterior itself
        assert -loss == pytest.approx(evidence, abs=1e-6)


def test_with_all_directions_it_is_the_posterior_of_independent_tasks():
    model = LinearGaussian(Independent(), shape=(2, 1, 3))
    guide = SubspaceGuide(model, model.sites_at_maximum(0.0), dimensions=3, scale=0.5)
    guide()
    with torch.no_grad():
        guide.get("log_scale", "theta.q.x").copy_(-0.5 * model.curvature().flatten(2).log())
    with poutine.seed(rng_seed=0), torch.no_grad():
        bounds = [-Trace_ELBO().loss(model, guide) for _ in range(5)]
    assert bounds == pytest.approx([float(model.log_evidence(0.0))] * 5, abs=1e-5)


def squares(rows):
    return rows.mT @ rows


@pytest.mark.parametrize("budget", [20, 10_000])
def test_the_rows_have_the_fisher_information_of_the_documents(budget):
    model, split = tiny_bora(), tiny_split((3, 0, 4))
    theta = random_weights(model)
    of_tasks, of_all = leading_gradients(model, theta, split, number=7, token_budget=budget)
    task, gradients = next(iter(gradients_of(model, theta, split, token_budget=10_000)))
    for name, gradient in gradients.items():
        whole = gradient.flatten(2).transpose(0, 1)
        torch.testing.assert_close(
            squares(of_all[name]), squares(whole), rtol=1e-3, atol=1e-4 * float(squares(whole).abs().max())
        )
        for d in range(3):
            own = squares(whole[:, task == d])
            torch.testing.assert_close(squares(of_tasks[name][d]), own, rtol=1e-3, atol=1e-4 * float(squares(whole).abs().max()))
        assert not of_tasks[name][1].any()


def test_few_rows_keep_most_of_the_information():
    model, split = tiny_bora(), tiny_split((30, 30, 30))
    theta = random_weights(model)
    _, of_all = leading_gradients(model, theta, split, number=10, token_budget=60)
    _, exact = leading_gradients(model, theta, split, number=64, token_budget=10_000)
    for name, rows in of_all.items():
        found, best = (
            (value @ orthonormal([value], dimensions=5, seed=0)).square().sum((-2, -1)) for value in (rows, exact[name])
        )
        kept = (exact[name] @ orthonormal([rows], dimensions=5, seed=0)).square().sum((-2, -1))
        assert bool((kept > 0.97 * best).all())
        assert bool((found <= best * 1.001).all())


def test_a_basis_has_the_largest_directions_and_is_filled_up():
    rows = torch.zeros(1, 2, 5)
    rows[0, 0, 3] = 2.0
    shared = torch.zeros(1, 2, 5)
    shared[0, 0, 0], shared[0, 1, 3] = 7.0, 70.0
    basis = orthonormal([rows, shared], dimensions=3, seed=0)[0]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), atol=1e-6, rtol=0)
    assert basis[:, 0].abs().argmax() == 3
    assert basis[:, 1].abs().argmax() == 0  # of the second part, what the first one does not have
    assert basis[:, :2].abs().amax(0).min() > 0.999
    assert torch.equal(orthonormal([rows, shared], dimensions=3, seed=0)[0], basis)


def test_the_directions_are_those_of_the_sites():
    """A gradient with respect to z = √τ (θ − Θ) is that of θ over √τ, which may differ between entries."""
    model, split = tiny_bora(), tiny_split((1, 0, 4))
    theta = random_weights(model)
    tau = {name: (doubles(*start.shape, seed=8).exp() * 10).float() for name, start in model.starts.items()}
    model.prior = Given({name: start.clone() for name, start in model.starts.items()}, tau)
    bases = directions(model, model.sites_given(theta, model.starts), split, dimensions=2)
    gradients = {name: value for task, found in gradients_of(model, theta, split) for name, value in found.items()}
    task = torch.cat([task for task, _ in gradients_of(model, theta, split)])
    assert len(bases) == len(model.starts)
    for name, gradient in gradients.items():
        of_site = (gradient[task == 0][0] / tau[name].sqrt()).flatten(1)
        basis = bases[f"theta.{name}_decentered"]
        found = (of_site / of_site.norm(dim=-1, keepdim=True))[:, None] @ basis[0][:, :, :1]
        torch.testing.assert_close(found.abs().flatten(), torch.ones(2), atol=1e-4, rtol=0)
        # a task without documents has the directions of all of them
        whole = (gradient / tau[name].sqrt()).flatten(2).transpose(0, 1)
        expected = torch.linalg.svd(whole, full_matrices=False).Vh[:, :1]
        torch.testing.assert_close((expected @ basis[1][:, :, :1]).abs().flatten(), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("subsampling", [False, True])
def test_a_fit_moves_it_and_leaves_the_directions(subsampling):
    model, data = tiny_bora(prior=HierarchicalNormal(10.0)), tiny_data()
    data.validation = data.validation.subset(torch.arange(0))  # the last epoch is kept
    sites = model.sites_given(random_weights(model), {name: value + 0.1 for name, value in model.starts.items()})
    guide = subspace_guide(model, sites, data=data, dimensions=2)
    bases = directions(model, sites, data.train, dimensions=2)
    fitted = fit(model, data, guide=guide, epochs=2, token_budget=30, patience=0, task_subsampling=subsampling)
    assert fitted.history[-1]["objective"] < fitted.history[0]["objective"]
    state = guide.state_dict()
    for name, basis in bases.items():
        assert torch.equal(state[f"basis/{name.replace('.', '/')}"], basis)
    coupled = [value for name, value in state.items() if name.startswith("coupling")]
    assert all(bool(value.tril(-1).any()) and not value.triu().any() for value in coupled)
    with poutine.seed(rng_seed=0):
        shift = guide()["theta.q_proj.lora_A_decentered"] - guide.median()["theta.q_proj.lora_A_decentered"]
    basis = bases["theta.q_proj.lora_A_decentered"]
    inside = basis @ (basis.mT @ shift.detach().flatten(2)[..., None])
    torch.testing.assert_close(inside[..., 0], shift.detach().flatten(2), atol=1e-5, rtol=1e-4)


def test_a_drawn_task_has_its_own_directions():
    model = tiny_bora()
    guide = subspace_guide(model, data=tiny_data(), dimensions=2)
    guide(tiny_batch())
    draw = TaskDraw(torch.tensor([0, 2]), torch.ones(2))
    whole, some = (
        poutine.trace(guide).get_trace(batch).nodes["theta.q_proj.lora_B_decentered"]["fn"] for batch in (tiny_batch(), draw)
    )
    assert torch.equal(some.basis, whole.basis[[0, 2]])
    assert some.loc.shape == some.sample().shape == (2, *whole.event_shape)


def test_a_random_tau_has_a_normal_of_its_own():
    model = tiny_bora(prior=RandomPrecision())
    guide = subspace_guide(model, dimensions=2)
    guide(tiny_batch())
    with poutine.seed(rng_seed=0):
        loss = TemperedELBO().differentiable_loss(model, guide, tiny_batch())
    assert loss.isfinite()
    assert not any("precision" in name for name in guide.state_dict() if name.startswith("basis"))


def test_what_it_cannot_take_is_refused():
    model = tiny_bora(adapter=SharedPlusTaskLoRA(rank=2))
    with pytest.raises(InputError, match="dimensions is 0; give a whole number from 1 up"):
        subspace_guide(model, **guide_options("subspace", ["dimensions=0"]))
    fitted = fit(tiny_bora(), tiny_data(), epochs=1)
    with pytest.raises(InputError, match="guide is 'subspace'; allowed: map, normal"):
        adapt(fitted, tiny_data((2, 1)), guide="subspace")
