"""The linearised model against finite differences, and where it must equal the network itself."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import BoRA, FrozenALoRA, HierarchicalNormal, InputError, Pooled
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.data import TokenSplit
from bora_pyro.guides import laplace_guide, normal_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods import Choice
from bora_pyro.predict.linearised import LinearisedBoRA
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.posterior import Posterior
from tests.tiny import ARCHITECTURES, TASKS, random_weights, tiny_backbone, tiny_batch, tiny_bora, tiny_data, tiny_split
from tests.toy_members import model_with


def moved(centre, direction, length):
    return {name: value + length * direction[name] for name, value in centre.items()}


def check_derivative(model):
    """J v of the linearised model has the products u·J v that reverse-mode differentiation finds as (Jᵀ u)·v."""
    centre, direction = random_weights(model), random_weights(model, seed=1)
    batch, linear = tiny_batch(), LinearisedBoRA(model, centre)
    at_centre = linear.logits(batch, centre)
    change = linear.logits(batch, moved(centre, direction, 1.0)) - at_centre
    leaves = {name: value.clone().requires_grad_() for name, value in centre.items()}
    logits = model.logits(batch, leaves)
    for seed in range(3):
        u = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed))
        gradients = torch.autograd.grad(logits, list(leaves.values()), u, retain_graph=True)
        expected = sum((gradient * direction[name]).sum() for name, gradient in zip(leaves, gradients, strict=True))
        scale = (u.square() * change.square()).sum().sqrt()
        assert abs((u * change).sum() - expected) < 1e-4 * scale
    # twice as far, twice the change
    torch.testing.assert_close(linear.logits(batch, moved(centre, direction, 2.0)) - at_centre, 2 * change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_derivative_is_that_of_reverse_mode(architecture):
    check_derivative(tiny_bora(architecture))


@pytest.mark.parametrize("adapter", [FrozenALoRA(rank=2), SharedPlusTaskLoRA(rank=2)], ids=repr)
def test_the_derivative_of_other_adapters(adapter):
    check_derivative(tiny_bora("llama", adapter=adapter))


@pytest.mark.parametrize("member", ["adapter", "wrapper", "router"])
def test_the_derivative_of_members_that_users_write(member):
    check_derivative(model_with(member))


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])  # others compute their norms in float32
def test_the_derivative_is_that_of_finite_differences(architecture):
    model, batch = tiny_bora(architecture), tiny_batch()
    model.backbone.model.double()
    centre, direction = ({name: value.double() for name, value in random_weights(model, seed=seed).items()} for seed in (0, 1))
    with torch.no_grad():
        forth, back = (model.logits(batch, moved(centre, direction, step)) for step in (1e-5, -1e-5))
    linear = LinearisedBoRA(model, centre)
    change = linear.logits(batch, moved(centre, direction, 1.0)) - linear.logits(batch, centre)
    torch.testing.assert_close(change, (forth - back) / 2e-5, rtol=1e-5, atol=1e-6)
    assert change.abs().mean() > 0.1


def test_without_spread_it_is_the_network():
    model, split = tiny_bora("gemma"), tiny_split()
    theta = random_weights(model)
    linear = LinearisedBoRA(model, theta)
    expected = predictive(model, split, lambda: [theta])
    for weights in (theta, dict(theta)):
        found = predictive(linear, split, lambda weights=weights: [weights] * 2)
        torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-5)
        assert found.epistemic.abs().max() < 1e-5
    base, same = evaluate(model, split, None)[0], evaluate(linear, split, None)[0]
    assert torch.equal(base.log_likelihood, same.log_likelihood)


def linear_network():
    """A model whose logits are linear in the weights: B in the last layer, with A frozen and without a norm after it."""
    backbone = tiny_backbone("opt", targets="fc2", num_hidden_layers=1)
    model = BoRA(backbone, TASKS, adapter=FrozenALoRA(rank=2), prior=HierarchicalNormal(2.0))
    model.backbone.model.model.decoder.final_layer_norm = torch.nn.Identity()
    return model


def test_it_is_exact_where_the_network_is_linear():
    model, data = linear_network(), tiny_data()
    theta = random_weights(model)
    sites = model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()})
    for guide in (laplace_guide(model, sites, data=data), normal_guide(model, sites, scale=1.0)):
        guide(tiny_batch())
        posterior = Posterior(Fitted(model, guide, data.tasks), seed=4)
        network, linear = (posterior.score(data.test, draws=5, linearised=linearised) for linearised in (False, True))
        torch.testing.assert_close(linear.log_likelihood, network.log_likelihood, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear.epistemic, network.epistemic, rtol=1e-4, atol=1e-4)
        assert network.epistemic.mean() > 0.01


def test_draws_are_numbered():
    model, data = tiny_bora(), tiny_data()
    guide = laplace_guide(model, data=data)
    posterior, again, other = (Posterior(Fitted(model, guide, data.tasks), seed=seed) for seed in (0, 0, 1))
    first, same, different = (each.score(data.test, draws=2, linearised=True) for each in (posterior, again, other))
    assert torch.equal(first.log_likelihood, same.log_likelihood)
    assert not torch.equal(first.log_likelihood, different.log_likelihood)
    assert not torch.allclose(first.log_likelihood, posterior.score(data.test, draws=2).log_likelihood)


def test_tasks_that_share_one_value():
    model, split = tiny_bora(prior=Pooled()), tiny_split()
    (first, _), (second, _) = (
        model.weights_given({f"prior_mean.{name}": value[0] for name, value in random_weights(model, seed=seed).items()})
        for seed in (0, 1)
    )
    pooled, copies = (
        LinearisedBoRA(model, centre) for centre in (first, {name: value.contiguous() for name, value in first.items()})
    )
    for found, expected in zip(evaluate(pooled, split, second), evaluate(copies, split, second), strict=True):
        assert torch.equal(found.log_likelihood, expected.log_likelihood)


def test_the_weights_of_some_tasks():
    model, split = tiny_bora(), tiny_split()
    centre, theta = random_weights(model), random_weights(model, seed=1)
    linear = LinearisedBoRA(model, centre)
    whole, some = evaluate(linear, split, theta, lambda index: {name: value[index] for name, value in theta.items()})
    torch.testing.assert_close(some.log_likelihood, whole.log_likelihood)


def test_answers_whether_prompts_are_shared_or_not():
    model = tiny_bora("llama", likelihood=Choice())
    prompt = [0, 9, 8, 7, 6]
    rows = [[*prompt, *option] for option in ([5], [4, 3], [10, 11], [12])]
    more = {"read": [len(prompt)] * 4, "document_index": [0, 0, 1, 1], "correct": [True, False, False, True]}
    split = TokenSplit.from_documents(rows, task=[1, 1, 2, 2], num_tasks=TASKS, **more)
    linear, theta, found = LinearisedBoRA(model, random_weights(model)), random_weights(model, seed=1), []
    for longest in (model.longest_shared, 0):
        model.backbone.longest_shared = longest
        found.append(evaluate(linear, split, theta)[0].log_p)
    assert linear.longest_shared == 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_base_without_a_forward_derivative(monkeypatch):
    class Quantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    model = tiny_bora()
    for layer in model.backbone.model.model.decoder.layers:
        monkeypatch.setattr(layer.activation_fn, "forward", Quantised.apply)
    with pytest.raises(InputError, match=r"the base 'opt' cannot be linearised, .* predict with the draws themselves") as found:
        LinearisedBoRA(model, random_weights(model)).logits(tiny_batch(), random_weights(model, seed=1))
    assert "\n" not in str(found.value)
