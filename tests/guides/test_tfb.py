"""TFB: noise of a known covariance in ΔW, and the largest variance that a held-out loss allows."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from bora_pyro import FrozenALoRA, HierarchicalNormal, Independent, InputError, LearnedPrecision, LoRA, Pooled, TaskData, fit
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.guides import TfbGuide, tfb_guide
from bora_pyro.guides.tfb import largest_accepted
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.held_out import HeldOutMixture, settle
from bora_pyro.priors import with_shared
from tests.tiny import TASKS, random_weights, tiny_bora, tiny_data
from tests.tiny_base import toy_data, toy_model

PRIORS = {
    "normal": lambda: HierarchicalNormal(25.0),
    "centered": lambda: HierarchicalNormal(25.0, "centered"),
    "learned": lambda: LearnedPrecision(start=25.0),
    "independent": Independent,
    "pooled": Pooled,
}
A, B = "q_proj.lora_A", "q_proj.lora_B"


def around(prior="normal", *, weights=None, **options):
    """A model and a guide around random weights. The adapters have rank 2 and scale 1.5."""
    model = tiny_bora(targets=["q_proj"], prior=PRIORS[prior]())
    theta = weights or random_weights(model)
    if prior == "pooled":
        theta = {name: value[:1].expand_as(value) for name, value in theta.items()}
    mean = {name: value.mean(0) for name, value in theta.items()}
    return model, theta, TfbGuide(model, model.sites_given(theta, mean), **options)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_noise_of_a_change_is_isotropic_in_the_columns_of_b(prior):
    model, theta, guide = around(prior)
    sigma = torch.tensor([0.3, 0.3, 0.3] if prior == "pooled" else [0.3, 0.0, 2.0])
    guide.sigma.copy_(sigma)
    layer, inputs, outputs = 1, [0, 5], [0, 3, 9]  # some of the entries of one layer
    draws = []
    with poutine.seed(rng_seed=0), torch.no_grad():
        for _ in range(800):
            weights, mean = model.weights_given(guide())
            draws.append(weights[A][:, layer][..., inputs])
            torch.testing.assert_close(weights[B], theta[B])  # B has no noise
            if prior not in ("pooled", "independent"):  # there Θ is the tasks' adapter, or their average
                torch.testing.assert_close(mean[A], theta[A].mean(0))
    b = theta[B][:, layer].double()  # (tasks, out, r)
    change = 1.5 * b @ torch.stack(draws).double()  # (draws, tasks, out, inputs)
    entries = change[:, :, outputs].mT.flatten(2)  # columns one after the other
    for d in range(TASKS):
        u = torch.linalg.svd(b[d], full_matrices=False).U[outputs]
        covariance = sigma[d].double() ** 2 * torch.block_diag(u @ u.T, u @ u.T)
        variances = covariance.diagonal()
        error = ((covariance.square() + variances[:, None] * variances[None]) / len(draws)).sqrt()
        assert ((entries[:, d].T.cov() - covariance).abs() <= 5 * error + 1e-9).all()
        centre = (1.5 * b[d] @ theta[A][d, layer].double())[outputs][:, inputs].T.flatten()
        assert ((entries[:, d].mean(0) - centre).abs() <= 5 * (variances / len(draws)).sqrt() + 1e-5).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_without_variance_every_draw_is_the_map(prior):
    model, theta, guide = around(prior)
    for seed in range(2):
        with poutine.seed(rng_seed=seed):
            torch.testing.assert_close(model.weights_given(guide())[0], theta)
    torch.testing.assert_close(model.weights_given(guide.median())[0], theta)


def test_where_b_is_0_there_is_no_noise():
    weights = random_weights(tiny_bora(targets=["q_proj"]))
    weights[B][0] = 0.0
    weights[B][1, 0, :, 1] = weights[B][1, 0, :, 0]  # one direction of two
    model, theta, guide = around(weights=weights)
    guide.sigma.fill_(0.5)
    with poutine.seed(rng_seed=0):
        drawn, _ = model.weights_given(guide())
    noise = drawn[A] - theta[A]
    torch.testing.assert_close(noise[0], torch.zeros_like(noise[0]))
    # A changes along V = (1, 1)/√2 alone, as B (1, −1) is 0
    torch.testing.assert_close(noise[1, 0, 0], noise[1, 0, 1], rtol=1e-3, atol=1e-6)
    assert noise[1, 0].abs().max() > 0.01
    change = 1.5 * (theta[B][1, 0] @ noise[1, 0]).double()
    assert change.norm() == pytest.approx(0.5 * 32**0.5, rel=0.5)  # one direction, 32 inputs


class Quadratic:
    """Held-out documents whose loss is l_d (1 + c_d σ_d²)."""

    def __init__(self, guide, documents, slope=(1.0, 4.0, 0.01), loss=(100.0, 50.0, 10.0)):
        self.guide, self.documents = guide, torch.tensor(documents)
        self.tokens, self.slope, self.loss, self.calls = self.documents * 10, torch.tensor(slope), torch.tensor(loss), 0

    def nll(self):
        self.calls += 1
        return (self.loss * (1 + self.slope * self.guide.sigma.square())).double()


def test_each_task_gets_the_largest_variance_that_its_loss_allows():
    _, _, guide = around(tolerance=0.04, steps=20, largest=10.0)
    held_out = Quadratic(guide, (9, 9, 9))
    found = guide.settle(held_out)
    torch.testing.assert_close(guide.sigma, torch.tensor([0.2, 0.1, 2.0]), rtol=1e-4, atol=0)  # √(tolerance / c_d)
    assert found == {"sigma": guide.sigma.tolist(), "sigma_of_all_tasks": None, "few_documents": 0, "notes": []}
    assert held_out.calls == 21  # and a pass for the MAP
    # what was found is allowed, and with the resolution of the search more is not
    limit = held_out.loss * 1.04
    assert (held_out.nll() <= limit).all()
    guide.sigma.mul_((10.0 / 1e-4) ** (2.0**-20) * 1.0001)
    assert (held_out.nll() > limit).all()


def test_a_task_with_few_documents_gets_the_variance_of_all():
    _, _, guide = around(tolerance=0.04, steps=20, least_documents=3)
    found = guide.settle(Quadratic(guide, (2, 9, 0)))
    pooled = (0.04 * 160 / (100 * 1 + 50 * 4 + 10 * 0.01)) ** 0.5  # Σ l_d (1 + c_d σ²) = 1.04 Σ l_d
    torch.testing.assert_close(guide.sigma, torch.tensor([pooled, 0.1, pooled]), rtol=1e-4, atol=0)
    assert found["sigma_of_all_tasks"] == pytest.approx(pooled, rel=1e-4)
    assert found["few_documents"] == 2


def test_one_adapter_for_all_tasks_has_one_variance():
    _, _, guide = around("pooled", tolerance=0.04, steps=20)
    found = guide.settle(Quadratic(guide, (9, 9, 9)))
    assert len(set(found["sigma"])) == 1
    assert found["sigma"][0] == pytest.approx((0.04 * 160 / 300.1) ** 0.5, rel=1e-4)


def test_a_search_that_ends_at_its_range_says_so():
    _, _, guide = around(tolerance=0.04, largest=1.0)
    found = guide.settle(Quadratic(guide, (9, 9, 9), slope=(1e12, 4.0, 0.0)))
    assert found["sigma"][0] == 0.0
    assert found["sigma"][2] == pytest.approx(1.0, rel=0.04)
    few, many = found["notes"]
    assert (
        few == "1 of 3 tasks have no variance: a standard deviation of 0.0001 raises their loss too much; try a smaller smallest"
    )
    assert many == "1 of 3 tasks have the largest standard deviation, 1: noise does not raise their loss more than allowed"


def test_the_search_stays_in_its_range():
    found = largest_accepted(lambda x: x <= torch.tensor([1e-9, 0.5, 1e9]), 3, smallest=0.01, largest=100.0, steps=12)
    assert found[0] == 0.0
    assert found.tolist()[1:] == pytest.approx([0.5, 100.0], rel=1e4 ** (2.0**-12) - 1)
    not_a_number = largest_accepted(lambda x: x * float("nan") <= 1, 1, smallest=0.01, largest=1.0, steps=3)
    assert not_a_number.tolist() == [0.0]


def test_the_losses_of_a_model_stay_below_their_limits():
    model, data = toy_model(), toy_data()
    point = fit(model, data, epochs=6, learning_rate=0.03, token_budget=64)
    guide = tfb_guide(model, point.sites(), data=data, tolerance=0.05, largest=100.0)
    fitted = Fitted(model, guide, data.tasks)
    held_out = HeldOutMixture(fitted, data.validation, draws=2, seed=3)
    start = held_out.nll()
    settle(fitted, data.validation, draws=2, seed=3)
    inside = (guide.sigma > 0) & (guide.sigma < 50)  # a task whose adapter predicts badly has a loss that noise does not raise
    assert inside.any()
    assert (held_out.nll() <= 1.05 * start).all()
    guide.sigma.mul_((100.0 / 1e-4) ** (2.0**-8) * 1.001)  # beyond the next value of the search
    assert (held_out.nll() > 1.05 * start)[inside].all()


def test_a_shared_pair_beside_the_tasks_pair_has_no_noise():
    adapter = SharedPlusTaskLoRA(rank=2)
    model = tiny_bora(targets=["q_proj"], adapter=adapter, prior=with_shared(HierarchicalNormal(25.0), adapter.shared))
    theta = random_weights(model)
    shared = [name for name in theta if "shared" in name]
    theta |= {name: theta[name][:1].expand_as(theta[name]) for name in shared}
    guide = tfb_guide(model, model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()}))
    guide.sigma.fill_(1.0)
    with poutine.seed(rng_seed=0):
        drawn, _ = model.weights_given(guide())
    assert len(shared) == 2
    for name in shared:
        torch.testing.assert_close(drawn[name], theta[name])
    assert (drawn[A] - theta[A]).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0; give a finite number above 0"),
        (
            {"smallest": 1.0, "largest": 0.1},
            "smallest is 1.0 and largest 0.1; give finite numbers above 0, the smaller one first",
        ),
        ({"steps": 0}, "steps is 0; give a whole number from 1 up"),
        ({"least_documents": 0}, "least_documents is 0; give a whole number from 1 up"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        tfb_guide(tiny_bora(), **options)


def test_what_has_no_variance_is_one_line():
    with pytest.raises(InputError, match=r"guide tfb needs LoRA, whose tasks have an A and a B, not FrozenALoRA\(rank=2"):
        tfb_guide(tiny_bora(adapter=FrozenALoRA(2)))
    with pytest.raises(InputError, match=r"guide tfb needs a rank of at most 32, the inputs of .*; here it is 33"):
        tfb_guide(tiny_bora(adapter=LoRA(33)))
    data = tiny_data()
    nothing = data.validation.subset(torch.arange(0))
    with pytest.raises(InputError, match=r"guide tfb finds its variances on validation documents, and there are none"):
        tfb_guide(tiny_bora(), data=TaskData(data.tasks, data.train, nothing, data.test))
    model, _, guide = around()
    with pytest.raises(InputError, match=r"guide tfb finds its variances on validation documents, and there are none"):
        settle(Fitted(model, guide, data.tasks), nothing)
