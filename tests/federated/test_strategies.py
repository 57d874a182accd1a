"""What each strategy averages, in closed form, and the models that it refuses."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import BoRA, FrozenALoRA, HierarchicalNormal, InputError, LoRA, Pooled
from bora_pyro.adapters import SharedPlusTaskLoRA, TriAdaptLoRA
from bora_pyro.federated.aggregate import weighted_mean
from bora_pyro.federated.strategies import FFA, STRATEGIES, ExactProduct, FedIT
from bora_pyro.federated.strategies.base import Enrolment, check_members
from tests.tiny import tiny_backbone, tiny_bora
from tests.toy_members import model_with

WEIGHTS = [3.0, 1.0, 4.0]


def factors(clients=3, *, rank=2, common_a=False, seed=0):
    """A and B of two layers of several clients, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a = draw(2, rank, 5)
    return [{"q.lora_A": a if common_a else draw(2, rank, 5), "q.lora_B": draw(2, 4, rank)} for _ in range(clients)]


def mean_product(values):
    parts = [weight * (value["q.lora_B"] @ value["q.lora_A"]) for weight, value in zip(WEIGHTS, values, strict=True)]
    return torch.stack(parts).sum(0) / sum(WEIGHTS)


def test_with_a_common_a_the_average_of_b_is_the_average_of_the_changes():
    values = factors(common_a=True)
    mean = weighted_mean([FFA().averaged({"q.lora_B": value["q.lora_B"]}) for value in values], WEIGHTS)
    torch.testing.assert_close(mean["q.lora_B"] @ values[0]["q.lora_A"], mean_product(values), rtol=1e-12, atol=1e-12)


def test_factors_averaged_apart_are_not_the_average_of_the_products():
    values = factors()
    mean = weighted_mean([FedIT().averaged(value) for value in values], WEIGHTS)
    error = (mean["q.lora_B"] @ mean["q.lora_A"] - mean_product(values)).norm() / mean_product(values).norm()
    assert error > 0.2


@pytest.mark.parametrize("rank", [1, 2])
def test_the_cut_product_is_the_best_of_its_rank(rank):
    strategy, values = ExactProduct(), factors(rank=rank)
    mean = weighted_mean([strategy.averaged(value) for value in values], WEIGHTS)
    torch.testing.assert_close(mean["q"], mean_product(values))
    merged = strategy.merged(mean, values[0])
    assert list(merged) == list(values[0])
    singular = torch.linalg.svdvals(mean["q"])
    expected = float(singular[:, rank:].square().sum().sqrt() / singular.square().sum().sqrt())
    assert strategy.lost(mean, merged) == pytest.approx(expected, rel=1e-9)
    gram_a, gram_b = merged["q.lora_A"] @ merged["q.lora_A"].mT, merged["q.lora_B"].mT @ merged["q.lora_B"]
    torch.testing.assert_close(gram_a, gram_b)  # balanced


def test_one_client_s_product_is_kept_and_unused_directions_stay_alive():
    strategy, [value] = ExactProduct(), factors(1)
    value["q.lora_B"][..., 1] = 0.0  # rank 1 of 2
    merged = strategy.merged(strategy.averaged(value), value)
    torch.testing.assert_close(merged["q.lora_B"] @ merged["q.lora_A"], value["q.lora_B"] @ value["q.lora_A"])
    assert not merged["q.lora_B"][..., 1].any()
    assert (merged["q.lora_A"].norm(dim=-1) > 0.1).all()
    nothing = {"q.lora_A": value["q.lora_A"], "q.lora_B": torch.zeros_like(value["q.lora_B"])}
    again = strategy.merged(strategy.averaged(nothing), nothing)
    assert not again["q.lora_B"].any()
    assert (again["q.lora_A"].norm(dim=-1) > 0.1).all()
    assert strategy.lost(strategy.averaged(nothing), again) == 0.0


def test_weights_are_those_of_the_training_documents():
    client = Enrolment("ada", documents=3, observations=50.0, tasks=2)
    assert [FFA().weight(client, by) for by in ("observations", "documents")] == [50.0, 3.0]


@pytest.mark.parametrize("name", ["ffa", "fedit", "exact_product"])
def test_models_that_a_strategy_refuses(name):
    strategy, own = STRATEGIES[name](), FrozenALoRA(rank=2) if name == "ffa" else LoRA(rank=2)
    backbone = tiny_backbone(targets=["q_proj"])
    strategy.check(BoRA(backbone, 3, adapter=own, prior=Pooled()))
    with pytest.raises(InputError, match=r"fits one adapter for all clients, and the prior is HierarchicalNormal\(tau=100\)"):
        strategy.check(BoRA(backbone, 3, adapter=own, prior=HierarchicalNormal(100)))
    other = LoRA(rank=2) if name == "ffa" else FrozenALoRA(rank=2)
    with pytest.raises(InputError, match=r"give FrozenALoRA\(rank=2\)" if name == "ffa" else r"give LoRA\(\)"):
        strategy.check(BoRA(backbone, 3, adapter=other, prior=Pooled()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_bora(adapter=TriAdaptLoRA(rank=2)), "changes during a fit, which a federated fit does not do"),
        (lambda: tiny_bora(adapter=SharedPlusTaskLoRA(rank=2)), "all tasks share shared_A, shared_B, which a federated fit"),
        (lambda: model_with("router"), "reads a token by the adapters of all tasks, which no client has|changes during a fit"),
    ],
)
def test_members_that_no_client_can_compute_alone(model, message):
    with pytest.raises(InputError, match=message):
        check_members(model())
