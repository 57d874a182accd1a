"""The inner steps: the closed forms of a linear-Gaussian toy, the limits of β, and tasks together as alone."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch

from bora_pyro import CausalLM, InputError, Pooled
from bora_pyro.guides import task_normal_guide
from bora_pyro.inference.inner_steps import InnerOptions, InnerSteps
from bora_pyro.likelihoods.base import Likelihood
from bora_pyro.priors import AmortisedNormal
from tests.tiny import TASKS, random_weights, tiny_bora, tiny_split

COUNTS, SCALE = (3, 1, 4), 0.2


class Pull(Likelihood):
    """Every document observes all latents of its task with precision 1, at a place of the task: a linear-Gaussian model."""

    def __init__(self, places):
        self.places = places

    def __call__(self, model, weights, batch):
        squares = [
            (weights[name][batch.row] - place[batch.task]).flatten(1).square().sum(1) for name, place in self.places.items()
        ]
        pyro.factor("pull", -0.5 * batch.scale * torch.stack(squares).sum())

    def observations(self, documents, tokens):
        return documents


@pytest.fixture
def without_noise(monkeypatch):
    """A draw of a Normal is its mean."""
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self, shape=None: self.loc.expand(self.batch_shape))


def toy(**options):
    """The inner steps of the linear-Gaussian toy, its places, and its rows in one batch."""
    model = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(SCALE))
    model.likelihood = Pull(random_weights(model))
    inner = InnerSteps(model, task_normal_guide(model, scale=1.0), InnerOptions(**options))
    return inner, model.likelihood.places, tiny_split(COUNTS)


def text_model(scale=SCALE, **options):
    model = tiny_bora(targets=["q_proj", "fc1"], prior=AmortisedNormal(scale))
    generator = torch.Generator().manual_seed(5)
    for value in model.starts.values():  # B at 0 would leave A without a gradient
        value += 0.1 * torch.randn(value.shape, generator=generator)
    return InnerSteps(model, task_normal_guide(model, scale=1.0), InnerOptions(**options))


@pytest.mark.usefixtures("without_noise")
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5])
def test_the_means_after_k_steps(beta):
    """μ_K − μ* = (1 − r (1 + β/(σ₀² N_d)))^K (μ₀ − μ*) with μ* = (N_d y_d + β μ₀/σ₀²)/(N_d + β/σ₀²)."""
    steps, rate = 4, 0.05
    inner, places, split = toy(steps=steps, rate=rate, beta=beta)
    inner.all_tasks(split)
    counts, pull = torch.tensor(COUNTS).float().view(-1, 1, 1, 1), beta / SCALE**2
    for name, place in places.items():
        start = inner.model.starts[name]
        optimum = (counts * place + pull * start) / (counts + pull)
        expected = optimum + (1 - rate * (1 + pull / counts)) ** steps * (start - optimum)
        torch.testing.assert_close(inner.guide.get("loc", f"theta.{name}"), expected, rtol=1e-4, atol=1e-5)
        # with σ_d = σ₀ the KL divergence does not pull at the scale
        scale = inner.guide.scale_of(inner.guide.get("raw_scale", f"theta.{name}"))
        torch.testing.assert_close(scale, torch.full_like(scale, SCALE))


@pytest.mark.usefixtures("without_noise")
def test_a_large_beta_holds_every_task_at_the_global_point():
    furthest = []
    for beta in (1.0, 1e2, 1e4, 1e6):
        inner, places, split = toy(steps=5, rate=0.5, beta=beta)
        inner.all_tasks(split)
        moved = [inner.guide.get("loc", f"theta.{name}") - inner.model.starts[name] for name in places]
        furthest.append(max(float(value.detach().abs().max()) for value in moved))
    assert all(b < 0.02 * a for a, b in itertools.pairwise(furthest[1:]))
    assert furthest[1] < furthest[0]
    assert furthest[-1] < 1e-5


def test_without_beta_the_gradient_is_that_of_the_likelihood():
    inner = text_model(beta=0.0)
    batch = inner.batch(tiny_split(COUNTS), torch.arange(sum(COUNTS)))
    inner.reset(TASKS)
    with torch.no_grad():
        for value in inner.own:  # away from the prior
            value += 0.1
    with pyro.poutine.seed(rng_seed=1):
        found = inner.value(batch, inner.own)
    assert found.kl > 1
    with pyro.poutine.seed(rng_seed=1):
        draws = inner.guide(batch)
    theta = {name: draws[f"theta.{name}"] for name in inner.latents}
    score = CausalLM().score(inner.model, theta, batch).sum()
    for gradient, plain in zip(found.gradients, torch.autograd.grad(-score, inner.own), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
    assert found.log_likelihood == pytest.approx(float(score.detach()), rel=1e-5)


@pytest.mark.usefixtures("without_noise")
def test_tasks_together_are_as_alone():
    split, together = tiny_split(COUNTS), text_model(steps=3, rate=0.5)
    together.all_tasks(split)
    for d in range(TASKS):
        alone, rows = text_model(steps=3, rate=0.5), (split.task == d).nonzero()[:, 0]
        alone.take(alone.batch(split, rows), alone.observations(split, rows))
        for one, other in zip(together.own, alone.own, strict=True):
            torch.testing.assert_close(one[d], other[0], rtol=1e-4, atol=1e-6)
    assert (together.own[0].detach() - together.start_of(0)).flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.usefixtures("without_noise")
def test_a_batch_in_parts_has_the_same_gradient():
    split, found = tiny_split(COUNTS), []
    for budget in (4096, 18):
        inner = text_model(token_budget=budget)
        inner.reset(TASKS)
        batch = inner.batch(split, torch.arange(len(split)))
        found.append((len(batch.parts(budget)), inner.value(batch, inner.own)))
    (one, whole), (several, parts) = found
    assert one == 1 < several
    assert parts.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-5)
    for a, b in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def graph_size(value):
    """The number of nodes of the graph behind a tensor."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


def test_no_graph_of_the_inner_steps_is_kept():
    sizes = set()
    for steps in (0, 1, 4):
        inner = text_model(steps=steps)
        rows = torch.arange(sum(COUNTS))
        batch = inner.batch(tiny_split(COUNTS), rows)
        inner.take(batch, inner.observations(tiny_split(COUNTS), rows))
        assert all(value.is_leaf and value.grad_fn is None and value.grad is None for value in inner.own)
        sizes.add(graph_size(inner.elbo.differentiable_loss(inner.model, inner.guide, batch)))
    assert len(sizes) == 1


def test_without_steps_or_documents_a_task_is_the_prior():
    for steps, counts in ((0, COUNTS), (3, (3, 0, 4))):
        inner = text_model(steps=steps)
        inner.all_tasks(tiny_split(counts))
        theta, mean = inner.model.weights_given(inner.guide.median())
        moved = [any(not torch.equal(theta[name][d], mean[name]) for name in theta) for d in range(TASKS)]
        assert moved == [bool(steps and count) for count in counts]


def test_what_cannot_take_inner_steps():
    model = tiny_bora(prior=Pooled())
    with pytest.raises(InputError, match=r"the prior is Pooled\(\); inner steps need a mean and a scale of each entry"):
        InnerSteps(model, task_normal_guide(model), InnerOptions())
    inner = text_model(steps=60, rate=1e12, beta=0.0)
    with pytest.raises(InputError, match=r"not finite in the inner steps; use a smaller inner_rate \(now 1e\+12"):
        inner.all_tasks(tiny_split(COUNTS))
