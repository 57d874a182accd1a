from __future__ import annotations

import math

import pytest
import torch

from bora_pyro.errors import InputError
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage, JamesStein, MarginalLikelihood

DOCUMENTS = [5.0, 8.0, 12.0, 20.0, 33.0, 60.0, 110.0, 200.0, 400.0, 900.0]


def simulated(documents, entries, tau, information, *, seed=0):
    """Θ, θ_d and their estimates y_d: (entries,), (D, entries), (D, entries), float64."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(documents, dtype=torch.float64)[:, None]

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mean = 3 * normal(entries)
    truth = mean + normal(len(documents), entries) / tau**0.5
    return mean, truth, truth + normal(len(documents), entries) / (information * counts).sqrt()


def gram(y):
    return y @ y.mT


@pytest.mark.parametrize(("tau", "information"), [(50.0, 2.0), (4.0, 2.0), (400.0, 0.3)])
def test_tau_and_information_are_recovered(tau, information):
    mean, truth, y = simulated(DOCUMENTS * 2, 4000, tau, information)
    found = MarginalLikelihood(DOCUMENTS * 2)(gram(y), 4000)
    assert found.tau == pytest.approx(tau, rel=0.1)
    assert found.information == pytest.approx(information, rel=0.1)
    counts = torch.tensor(DOCUMENTS * 2, dtype=torch.float64)
    torch.testing.assert_close(found.shrinkage, tau / (tau + information * counts), rtol=0.15, atol=0.01)
    # Θ̂ is as good as its own variance says, and each θ̂_d better than y_d
    theta = found.weights @ y
    variance = 1 / (1 / (1 / tau + 1 / (information * counts))).sum()
    assert (theta - mean).square().mean() == pytest.approx(variance.item(), rel=0.1)
    shrunk = (1 - found.shrinkage[:, None]) * y + found.shrinkage[:, None] * theta
    raw_error, error = (value.sub(truth).square().mean(1) for value in (y, shrunk))
    assert (error < raw_error)[counts < 500].all()
    assert error.sum() < raw_error.sum()
    # the least error that any estimate has, when τ, h and Θ are known, is 1/(τ + h N_d)
    assert error.mean().item() == pytest.approx(
        (1 / (tau + information * counts)).mean().item() + _of_theta(found, variance), rel=0.1
    )


def _of_theta(found, variance):
    """What not knowing Θ adds to the error."""
    return float(found.shrinkage.square().mean() * variance)


def test_the_likelihood_is_that_of_all_contrasts():
    """REML by its definition: the density of an orthonormal basis of contrasts, D − 1 numbers an entry."""
    documents = [2.0, 3.0, 10.0, 50.0]
    *_, y = simulated(documents, 60, 20.0, 3.0, seed=4)
    contrasts = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.eye(4)[:, :3]], 1).double()).Q[:, 1:].mT  # (3, 4)
    counts = torch.tensor(documents, dtype=torch.float64)

    def log_density(between, information):
        covariance = contrasts @ torch.diag(between + 1 / (information * counts)) @ contrasts.mT
        density = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
        return float(density.log_prob((contrasts @ y).mT).sum())

    found = MarginalLikelihood(documents)(gram(y), 60)
    best = log_density(1 / found.tau, found.information)
    for a, b in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98), (1.02, 0.98), (0.5, 2), (2, 2), (1e-3, 1), (1, 1e-3), (1e-3, 0.5)):
        assert log_density(a / found.tau, b * found.information) < best


def test_entries_and_scale_do_not_change_the_shrinkage():
    *_, y = simulated(DOCUMENTS, 300, 20.0, 1.0)
    one, many = MarginalLikelihood(DOCUMENTS)(gram(y), 300), MarginalLikelihood(DOCUMENTS)(gram(3 * y), 900)
    torch.testing.assert_close(one.shrinkage, many.shrinkage, rtol=1e-6, atol=0)
    assert many.tau == pytest.approx(one.tau / 3, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends(sign):
    """Spread like 1/N_d is noise alone; spread that rises with N_d is none at all."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(DOCUMENTS, dtype=torch.float64)[:, None]
    y = torch.randn(10, 500, generator=generator, dtype=torch.float64) * counts ** (-0.5 * sign)
    found = MarginalLikelihood(DOCUMENTS)(gram(y), 500)
    if sign == 1:
        assert found.tau > 1e3
        assert (found.shrinkage > 0.9).all()
    else:
        assert found.information == math.inf
        assert (found.shrinkage == 0).all()


@pytest.mark.parametrize("estimator", [MarginalLikelihood([1, 2, 3]), JamesStein(0.1), FixedShrinkage(0.3)])
def test_copies_of_one_estimate(estimator):
    found = estimator(torch.full((3, 3), 7.0, dtype=torch.float64), 5)
    assert found.tau == math.inf
    assert bool(found.shrinkage.isfinite().all())
    torch.testing.assert_close(found.weights.sum().item(), 1.0)


def test_james_and_stein():
    generator = torch.Generator().manual_seed(1)
    truth = 0.3 * torch.randn(6, 50, generator=generator, dtype=torch.float64)
    ours = theirs = 0.0
    for _ in range(50):
        y = truth + 0.4 * torch.randn(6, 50, generator=generator, dtype=torch.float64)
        found = JamesStein(0.4)(gram(y), 50)
        squares = (y - y.mean(0)).square().sum()
        assert found.shrinkage.tolist() == pytest.approx([min(1.0, (0.16 * (250 - 2) / squares).item())] * 6)
        assert found.variance == pytest.approx((squares / 250).item())
        assert 1 / found.tau == pytest.approx(max(found.variance - 0.16, 0.0))
        s = found.shrinkage[:, None]
        ours += ((1 - s) * y + s * y.mean(0) - truth).square().sum()
        theirs += (y - truth).square().sum()
    assert ours < 0.6 * theirs
    assert (JamesStein(9.0)(gram(y), 50).shrinkage == 1).all()


def test_a_share():
    y = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
    for s, tau in ((0.0, 0.5), (0.25, 1 / 1.5), (1.0, math.inf)):
        found = FixedShrinkage(s)(gram(y), 2)
        assert (found.tau, found.information) == (pytest.approx(tau), None)
        assert found.shrinkage.tolist() == [s] * 3
        assert found.weights.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MarginalLikelihood([3, 3, 3]),
            "all 3 tasks have 3 documents, which cannot separate noise from the differences",
        ),
        (lambda: MarginalLikelihood([3, 0]), "give a positive number for each of two or more tasks"),
        (lambda: MarginalLikelihood([3, math.inf]), "give a positive number"),
        (lambda: MarginalLikelihood([3]), "give a positive number for each of two or more"),
        (lambda: JamesStein(0), "noise 0 is not allowed; it is a standard deviation, positive and finite"),
        (lambda: JamesStein(math.nan), "noise nan is not allowed"),
        (lambda: FixedShrinkage(1.2), "shrinkage 1.2 is not allowed; it is a share from 0 to 1, nearest: 1"),
        (lambda: FixedShrinkage(-0.1), "nearest: 0"),
        (lambda: FixedShrinkage(math.nan), "shrinkage nan is not allowed"),
        (lambda: MarginalLikelihood([1, 2])(torch.eye(3).double(), 4), "3 tasks given; give 2"),
        (lambda: JamesStein(1)(torch.eye(1).double(), 4), "1 tasks given; give 2 or more"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
