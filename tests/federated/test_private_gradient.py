"""Private steps: the bound of a document, the noise, the sample, and the ordinary step as their limit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bora_pyro import CausalLM, Choice, FrozenALoRA, HierarchicalNormal, InputError, Pooled
from bora_pyro.data import TokenSplit
from bora_pyro.federated.client import Client
from bora_pyro.federated.options import FederatedOptions
from bora_pyro.federated.private_gradient import PrivateGradient, clip_documents
from bora_pyro.federated.random_bits import RandomBits
from bora_pyro.federated.strategies import FFA, FederatedBoRA, FedIT, NoncenteredBoRA
from bora_pyro.guides.curvature import document_gradients, gradients_of
from tests.tiny import random_weights, tiny_bora, tiny_data, tiny_questions, tiny_split

PLAIN = {"optimizer": "sgd", "warmup": 0.0, "schedule": "constant", "gradient_clip": math.inf, "learning_rate": 0.5}
STRATEGIES = {"ffa": FFA, "fedit": FedIT, "bora": FederatedBoRA, "bora_noncentered": NoncenteredBoRA}


def options(**changes):
    return FederatedOptions(**{"noise_multiplier": 0.0, "sample_rate": 1.0, "delta": 0.1, "noise_seed": 0} | changes)


def model_of(strategy, **more):
    adapter = FrozenALoRA(rank=2) if strategy == "ffa" else None
    prior = HierarchicalNormal(50.0) if STRATEGIES[strategy].personal else Pooled()
    return tiny_bora(targets=["q_proj", "fc1"], adapter=adapter, prior=prior, **more)


def theta_of(model, personal, *, seed=0):
    """θ of all tasks, one for all of them if they are not personal."""
    theta = random_weights(model, seed=seed)
    return theta if personal else {name: value[:1].expand(value.shape) for name, value in theta.items()}


def norm_of(gradients):
    return torch.stack([value.double().square().sum() for value in gradients.values()]).sum().sqrt()


def test_no_gradient_is_longer_than_the_bound():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 50)
    gradients = {name: scale.view(-1, 1, 1) * torch.randn((50, 4, 70), generator=generator) for name in ("a", "b")}
    clip = 1.0
    clipped = clip_documents(gradients, clip)
    before, after = (
        torch.stack([value.double().flatten(1).square().sum(1) for value in of.values()]).sum(0).sqrt()
        for of in (gradients, clipped)
    )
    long = before > clip
    assert 10 < int(long.sum()) < 45
    assert float(after.max()) <= clip
    assert float(after[long].min()) >= clip * (1 - 1e-4)
    for name, value in clipped.items():
        assert torch.equal(value[~long], gradients[name][~long])
        direction = value[long].flatten(1) / after[long, None].float()
        torch.testing.assert_close(direction, gradients[name][long].flatten(1) / before[long, None].float())
        assert torch.equal(clip_documents(gradients, math.inf)[name], gradients[name])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_counts_as_nothing(wrong):
    gradients = {"a": torch.tensor([[1.0, wrong], [0.1, 0.0]]), "b": torch.full((2, 3), 0.1)}
    gradients["a"][0, 0] = wrong
    for clip in (1.0, math.inf):
        clipped = clip_documents(gradients, clip)
        assert all(torch.equal(value[0], torch.zeros_like(value[0])) for value in clipped.values())
        assert all(torch.equal(clipped[name][1], gradients[name][1]) for name in gradients)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_document_moves_the_sum_by_the_bound_at_most(strategy):
    personal, model, split, clip = STRATEGIES[strategy].personal, model_of(strategy), tiny_split((3, 2, 4)), 0.5
    theta = theta_of(model, personal)

    def estimate(own):
        return PrivateGradient("ada", own, options(document_clip=clip))(model, theta, personal=personal)

    whole, moves = estimate(split), []
    for left_out in range(len(split)):
        rest = estimate(split.subset((torch.arange(len(split)) != left_out).nonzero()[:, 0]))
        moves.append(float(norm_of({name: whole[name] - rest[name] for name in whole})))
    assert max(moves) == pytest.approx(clip, rel=1e-3)  # it is reached, and not passed
    assert all(value.shape == (theta[name].shape if personal else theta[name].shape[1:]) for name, value in whole.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_noise_and_bound_it_is_the_ordinary_step_on_the_same_documents(strategy):
    model, data, rate = model_of(strategy, likelihood=CausalLM("documents")), tiny_data((6, 4, 8)), 0.5
    private = options(sample_rate=rate, document_clip=math.inf, local_steps=1, **PLAIN)
    client = Client("ada", model, data, STRATEGIES[strategy](), private)
    rows = PrivateGradient("ada", data.train, private).sample()
    assert 0 < len(rows) < len(data.train)
    ordinary = Client("ada", model, data, STRATEGIES[strategy](), FederatedOptions(local_steps=1, **PLAIN))
    [batch] = data.train.subset(rows).batches(token_budget=10_000)
    ordinary._next_documents = lambda: [replace(batch, scale=1 / rate)]
    generator = torch.Generator().manual_seed(5)
    for name, value in client.values.items():  # with B at 0, A would not move
        value.data += 0.1 * torch.randn(value.shape, generator=generator)
        ordinary.values[name].data.copy_(value.data)
    assert ordinary.enrolment == client.enrolment
    client.train(1)
    ordinary.train(1)
    for name, value in ordinary.parameters.items():
        assert not torch.equal(value, ordinary.common[name.removeprefix("prior_mean.")])
        torch.testing.assert_close(client.parameters[name], value, rtol=1e-4, atol=1e-6)
    assert client.private.steps == 1


def test_a_private_step_has_weights_of_tasks_and_any_size_of_batch():
    weights = torch.tensor([2.0, 1.0, 0.5])
    model, split = model_of("bora", likelihood=CausalLM(task_weights=weights)), tiny_split()
    theta = theta_of(model, True)
    one = PrivateGradient("ada", split, options(document_clip=math.inf))(model, theta, personal=True)
    some = PrivateGradient("ada", split, options(document_clip=math.inf, token_budget=10))(model, theta, personal=True)
    [(task, gradients)] = gradients_of(model, theta, split)
    for name, value in gradients.items():
        expected = torch.zeros_like(theta[name]).index_add_(0, task, value * weights[task].view(-1, 1, 1, 1))
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(some[name], expected, rtol=1e-4, atol=1e-5)


def pieces_of_one():
    """Three pieces of one document, and a whole one."""
    documents = [[0, 5, 6, 9], [0, 7, 8], [0, 11, 12], [0, 9, 10, 4]]
    return TokenSplit.from_documents(documents, task=[1, 1, 1, 1], num_tasks=3, document_index=[4, 4, 7, 4])


def test_a_document_in_pieces_is_clipped_once_and_sampled_as_a_whole():
    model, split, clip = model_of("bora"), pieces_of_one(), 0.5
    theta = theta_of(model, True)
    found = PrivateGradient("ada", split, options(document_clip=clip))(model, theta, personal=True)
    [batch] = split.batches(token_budget=10_000)
    of_rows = document_gradients(model, theta, batch)
    by_document = {
        name: torch.stack([value[split.document_of[batch.index] == n].sum(0) for n in range(2)])
        for name, value in of_rows.items()
    }
    expected = {name: value.sum(0) for name, value in clip_documents(by_document, clip).items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name][1], value, rtol=1e-3, atol=1e-5)
        assert not found[name][[0, 2]].any()
    alone = split.subset(torch.tensor([0, 1, 3]))
    found = PrivateGradient("ada", alone, options(document_clip=clip))(model, theta, personal=True)
    assert float(norm_of(found)) == pytest.approx(clip, rel=1e-3)  # three pieces, clipped apart, could reach three times that
    sampler = PrivateGradient("ada", split, options(sample_rate=0.5))
    assert sampler.documents == 2
    assert {tuple(sampler.sample().tolist()) for _ in range(60)} == {(), (2,), (0, 1, 3), (0, 1, 2, 3)}


def test_the_options_of_a_question_are_one_document():
    model, split, clip = model_of("bora", likelihood=Choice()), tiny_questions((2, 1, 2)), 0.05
    theta = theta_of(model, True)
    estimate = PrivateGradient("ada", split, options(document_clip=clip))
    assert estimate.documents == 5
    norm = [float(norm_of({name: value[d] for name, value in estimate(model, theta, personal=True).items()})) for d in range(3)]
    assert norm[1] == pytest.approx(clip, rel=1e-3)
    assert max(norm) <= 2 * clip


def test_samples_are_independent_draws_of_each_document():
    split, rate, draws = tiny_split((3, 1, 4)), 0.2, 4000
    sampler = PrivateGradient("ada", split, options(sample_rate=rate))
    chosen = torch.zeros(draws, len(split))
    for number in range(draws):
        chosen[number, sampler.sample()] = 1
    error = (rate * (1 - rate) / draws) ** 0.5
    assert float((chosen.mean(0) - rate).abs().max()) < 5 * error
    size = chosen.sum(1)
    assert float(size.var()) == pytest.approx(len(split) * rate * (1 - rate), rel=0.15)
    assert float((size == 0).float().mean()) == pytest.approx((1 - rate) ** len(split), abs=0.05)
    correlation = torch.corrcoef(chosen.T) - torch.eye(len(split))
    assert float(correlation.abs().max()) < 6 / draws**0.5


@pytest.mark.parametrize("strategy", ["ffa", "bora"])
def test_the_noise_has_the_variance_that_the_accountant_assumes(strategy):
    """Of samples that are all but surely empty, so that the estimate is noise alone."""
    personal, model, sigma, clip, rate = strategy == "bora", model_of(strategy), 1.5, 0.4, 1e-12
    theta = theta_of(model, personal)
    estimate = PrivateGradient(
        "ada", tiny_split(), options(noise_multiplier=sigma, document_clip=clip, sample_rate=rate, noise_seed=3)
    )
    assert len(estimate.sample()) == 0
    draws = [estimate(model, theta, personal=personal) for _ in range(30)]
    noise = torch.stack([torch.cat([value.flatten() for value in draw.values()]) for draw in draws]).double() * rate
    assert float(noise.var()) == pytest.approx((sigma * clip) ** 2, rel=0.05)
    assert float(noise.mean().abs()) < 5 * sigma * clip / noise.numel() ** 0.5
    # independent from step to step, and from entry to entry
    assert abs(float(torch.corrcoef(torch.stack([noise[0], noise[1]]))[0, 1])) < 6 / noise.shape[1] ** 0.5
    assert float(noise.mean(0).var()) == pytest.approx((sigma * clip) ** 2 / 30, rel=0.2)
    assert estimate.steps == 30


def test_random_numbers():
    seeded, same, other = (RandomBits(1, "ada"), RandomBits(1, "ada"), RandomBits(1, "bob"))
    normal = seeded.normal((400, 500))
    assert torch.equal(normal, same.normal((400, 500)))
    assert not torch.equal(normal, other.normal((400, 500)))
    assert not torch.equal(normal, seeded.normal((400, 500)))
    for source in (normal, RandomBits().normal((400, 500))):
        assert abs(float(source.mean())) < 0.02
        assert float(source.var()) == pytest.approx(1.0, abs=0.03)
        assert float(source.pow(4).mean()) == pytest.approx(3.0, abs=0.2)
    assert not torch.equal(RandomBits().uniform(4), RandomBits().uniform(4))
    assert not torch.equal(RandomBits(1).uniform(4), RandomBits(1 + 2**32).uniform(4))
    uniform = RandomBits().uniform(10_000)
    assert float(uniform.min()) > 0
    assert float(uniform.max()) < 1
    edge = RandomBits()
    edge._bytes = lambda number: b"\xff" * (number // 2) + b"\0" * (number // 2)
    assert bool(edge.normal((2,)).isfinite().all())


def test_one_document_needs_a_delta():
    alone = tiny_split((1, 0, 0))
    with pytest.raises(InputError, match="client 'Ada' has one training document, for which delta = 1 / N = 1 promises nothing"):
        PrivateGradient("Ada", alone, options(delta=None))
    assert PrivateGradient("Ada", alone, options(delta=0.01)).delta == 0.01
    assert PrivateGradient("Ada", tiny_split((3, 1, 4)), options(delta=None)).delta == 1 / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 2.0}, "epsilon is 1 and noise_multiplier is 2, which decide the same noise"),
        ({"epsilon": 0.0}, "epsilon is 0.0; give a finite number above 0"),
        ({"epsilon": math.inf}, "epsilon is inf; give a finite number above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0; give a finite number from 0 up"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan; give a finite number from 0 up"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta is 1.0; give a number between 0 and 1"),
        ({"epsilon": 1.0, "sample_rate": 0.0}, "sample_rate is 0.0; give a probability above 0 and up to 1"),
        ({"epsilon": 1.0, "sample_rate": 1.5}, "sample_rate is 1.5; give a probability above 0 and up to 1"),
        ({"epsilon": 1.0, "document_clip": 0.0}, "document_clip is 0.0; give a number above 0"),
        ({"epsilon": 1.0, "document_clip": math.inf}, "document_clip is inf, and noise is measured by it"),
        ({"noise_multiplier": 1.0, "document_clip": math.inf}, "document_clip is inf, and noise is measured by it"),
        ({"epsilon": 1.0, "accountant": "gdp"}, "accountant is 'gdp'; allowed: rdp, prv"),
        ({"delta": 0.1}, "delta is 0.1, and neither epsilon nor noise_multiplier is given"),
        ({"document_clip": 2.0}, "document_clip is 2.0, and neither epsilon nor noise_multiplier is given"),
        ({"noise_seed": 0}, "noise_seed is 0, and neither epsilon nor noise_multiplier is given"),
    ],
)
def test_options_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        FederatedOptions(**changes).validate()


def test_options_that_are_taken():
    for changes in ({"epsilon": 1.0}, {"noise_multiplier": 0.0, "document_clip": math.inf}, {"epsilon": 1.0, "sample_rate": 1.0}):
        FederatedOptions(**changes).validate()
