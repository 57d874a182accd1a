"""Shrinkage against closed forms: a linear-Gaussian toy by hand, dense matrices, another gauge, and the two limits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from bora_pyro import FrozenALoRA, InputError, LoRA
from bora_pyro.adapters import Adapter, SharedPlusTaskLoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.diagnostics.deviations import (
    SPACES,
    PosteriorPooling,
    active_entries,
    adapter_matrix,
    delta_w_deviations,
    delta_w_norms,
    deviations,
    distances,
    effective_parameters,
    pooling_factor,
    root_mean_square,
    task_gram,
)
from bora_pyro.inference.fitted import Fitted, entries_of
from tests.tiny import of_task, random_weights, tiny_bora

ADAPTERS = {"lora": None, "frozen A": FrozenALoRA(rank=2, alpha=3.0), "shared": SharedPlusTaskLoRA(rank=2, alpha=3.0)}


class Known(Fitted):
    """A fit whose weights are given."""

    def __init__(self, model, theta, mean):
        super().__init__(model, None, [f"task {d}" for d in range(model.num_tasks)])
        self.given = theta, mean

    def weights(self):
        return self.given


def known(**options):
    """Random θ and another random Θ."""
    model = tiny_bora(**options)
    return Known(model, random_weights(model), of_task(random_weights(model, seed=1), 0))


def dense(fitted, weights):
    """ΔW = (α/r) B A of one task in all layers, as one vector, and by slot and layer."""
    model = fitted.model
    parts = {}
    for slot in model.backbone.slots:
        for layer in range(slot.layers):
            own = {name: weights[f"{slot.name}.{name}"][layer] for name in model.tensors.names(slot)}
            factors = model.adapter.factors(model.tensors.at_layer(slot, layer, own))
            parts[slot.name, layer] = model.adapter.scaling * factors.lora_B.double() @ factors.lora_A.double()
    return parts


def regauged(weights, *, seed):
    """The same ΔW in another gauge: (B G⁻¹, G A)."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in weights.items():
        if name.endswith("lora_A"):
            g = torch.randn(*value.shape[:-2], 2, 2, generator=generator, dtype=torch.float64) + 2 * torch.eye(2)
            other = name.replace("lora_A", "lora_B")
            result[name] = (g @ value.double()).to(value.dtype)
            result[other] = (weights[other].double() @ torch.linalg.inv(g)).to(value.dtype)
    return result


def test_a_linear_gaussian_toy_by_hand():
    # y_dn ~ Normal(δ_d, 2²), δ_d ~ Normal(0, 1/3): h_d = n_d/4, posterior mean h/(h + 3) ȳ_d, posterior variance 1/(h + 3)
    number, mean = np.array([4, 20, 36]), np.array([1.0, -2.0, 0.5])
    fisher, tau = number / 4, 3.0
    estimate = fisher / (fisher + tau) * mean  # 0.25, -1.25, 0.375
    as_tensor = torch.tensor(fisher).view(3, 1, 1)
    gamma = effective_parameters(as_tensor, torch.tensor(tau))
    assert gamma.tolist() == pytest.approx([0.25, 0.625, 0.75])
    # V_d of (0.25, -1.25, 0.375) with divisor 2, and the mean of (1/4, 1/8, 1/12)
    between = ((0.25 + 5 / 24) ** 2 + (-1.25 + 5 / 24) ** 2 + (0.375 + 5 / 24) ** 2) / 2
    within = (1 / 4 + 1 / 8 + 1 / 12) / 3
    factor = pooling_factor(torch.tensor(estimate).view(3, 1, 1), as_tensor, torch.tensor(tau))
    assert factor.tolist() == pytest.approx([1 - between / (between + within)])


def test_the_denominator_is_the_expected_variance_over_the_posterior():
    # the variance is a quadratic form, so that two points at ± one standard deviation each give its exact expectation
    estimate, fisher, tau = np.array([0.3, -1.0, 0.4]), np.array([1.0, 5.0, 9.0]), 3.0
    sd = (fisher + tau) ** -0.5
    expected = np.mean([np.var(estimate + np.array(sign) * sd, ddof=1) for sign in product((-1, 1), repeat=3)])
    shape = (3, 1, 1)
    factor = pooling_factor(torch.tensor(estimate).view(shape), torch.tensor(fisher).view(shape), torch.tensor(tau))
    assert factor.item() == pytest.approx(1 - np.var(estimate, ddof=1) / expected)


def test_the_pooling_factor_of_a_layer_is_the_average_over_its_entries():
    generator = torch.Generator().manual_seed(0)
    deviation, fisher = (torch.rand(4, 2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    tau = torch.rand(4, 2, 1, 1, generator=generator, dtype=torch.float64)  # another one for each task and layer
    expected = np.empty((2, 3, 5))
    for index in np.ndindex(2, 3, 5):
        of_entry = (slice(None), *index)
        within = np.mean(1 / (fisher[of_entry] + tau[:, index[0], 0, 0]).numpy())
        between = np.var(deviation[of_entry].numpy(), ddof=1)
        expected[index] = 1 - between / (between + within)
    assert pooling_factor(deviation, fisher, tau).tolist() == pytest.approx(expected.mean((1, 2)).tolist())
    gamma = (fisher / (fisher + tau)).sum((1, 2, 3))
    torch.testing.assert_close(effective_parameters(fisher, tau), gamma)


def test_pooled_is_the_limit_of_a_large_tau():
    fisher = torch.tensor([[[2.0, 0.0]], [[5.0, 0.0]]])
    still = torch.zeros(2, 1, 2)
    infinite = torch.tensor(torch.inf)
    assert effective_parameters(fisher, infinite).tolist() == [0.0, 0.0]
    assert pooling_factor(still, fisher, infinite).tolist() == [1.0]
    # the estimate of data with the mean ±1 at a large τ
    large = torch.tensor(1e6)
    estimate = fisher / (fisher + large) * torch.tensor([1.0, -1.0])[:, None, None]
    assert pooling_factor(estimate, fisher, large).item() == pytest.approx(1, abs=2e-5)
    assert effective_parameters(fisher, large).tolist() == pytest.approx([2e-6, 5e-6], rel=1e-4)


def test_independent_counts_what_has_information():
    # three tasks, one layer, entries: known everywhere; known for two tasks; known for one; known for none
    fisher = torch.tensor([[[4.0, 0.0, 0.0, 0.0]], [[2.0, 5.0, 0.0, 0.0]], [[1.0, 2.0, 3.0, 0.0]]], dtype=torch.float64)
    deviation = torch.tensor([[[1.0, 7.0, 0.0, 0.0]], [[2.0, 1.0, 0.0, 0.0]], [[3.0, 2.0, 5.0, 0.0]]], dtype=torch.float64)
    zero = torch.tensor(0.0)
    assert effective_parameters(fisher, zero).tolist() == [1.0, 2.0, 3.0]
    first, second = (0.25 + 0.5 + 1) / 3, (0.2 + 0.5) / 2  # mean of 1/h over the tasks that know it
    expected = np.mean([first / (1.0 + first), second / (0.5 + second)])  # V_d of (1, 2, 3) and of (1, 2)
    assert pooling_factor(deviation, fisher, zero).tolist() == pytest.approx([expected])
    assert pooling_factor(deviation[..., 2:], fisher[..., 2:], zero).isnan().all()


def test_root_mean_square():
    deviation = torch.tensor([[[[3.0, 4.0]], [[0.0, 2.0]]]])  # one task, two layers of 1 x 2
    assert root_mean_square(deviation).tolist() == [pytest.approx([12.5**0.5, 2**0.5])]


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_delta_w_equals_the_dense_computation(adapter):
    fitted = known(adapter=adapter)
    theta, mean = fitted.weights()
    norms, distances = delta_w_norms(fitted), delta_w_deviations(fitted)
    of_mean = dense(fitted, mean)
    for d in range(fitted.model.num_tasks):
        for (slot, layer), change in dense(fitted, of_task(theta, d)).items():
            assert norms[slot][d, layer].item() == pytest.approx(change.norm().item(), rel=1e-9)
            assert distances[slot][d, layer].item() == pytest.approx((change - of_mean[slot, layer]).norm().item(), rel=1e-9)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_the_gram_matrix_of_delta_w_equals_the_dense_one(adapter):
    fitted = known(adapter=adapter)
    theta, mean = fitted.weights()
    of_mean = torch.cat([change.flatten() for change in dense(fitted, mean).values()])
    rows = [
        torch.cat([change.flatten() for change in dense(fitted, of_task(theta, d)).values()]) - of_mean
        for d in range(fitted.model.num_tasks)
    ]
    matrix = torch.stack(rows)
    torch.testing.assert_close(task_gram(fitted), matrix @ matrix.mT, rtol=1e-9, atol=1e-9)
    squares = sum(value.square().sum(1) for value in delta_w_deviations(fitted).values())
    torch.testing.assert_close(task_gram(fitted).diagonal(), squares)


def test_the_gram_matrix_of_weights_is_that_of_the_adapter_matrix():
    fitted = known()
    matrix = adapter_matrix(fitted)
    assert matrix.shape == (3, sum(value[0].numel() for value in fitted.weights()[0].values()))
    torch.testing.assert_close(task_gram(fitted, space="weights"), matrix.double() @ matrix.double().mT)
    torch.testing.assert_close(task_gram(fitted, space="weights").diagonal().sqrt().float(), fitted.deviation_norms())


def test_the_gauge_changes_weights_and_not_delta_w():
    fitted = known()
    theta, mean = ({name: value.double() for name, value in weights.items()} for weights in fitted.weights())
    other = Known(fitted.model, regauged(theta, seed=2), regauged(mean, seed=3))
    assert not torch.allclose(other.deviation_norms(), fitted.deviation_norms().double(), rtol=0.1)
    for measure in (delta_w_norms, delta_w_deviations):
        for slot, value in measure(other).items():
            torch.testing.assert_close(value, measure(fitted)[slot], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(task_gram(other), task_gram(fitted), rtol=1e-6, atol=1e-8)


def test_equal_adapters_are_at_distance_zero_exactly():
    model = tiny_bora()
    mean = of_task(random_weights(model), 0)
    fitted = Known(model, {name: value.expand(3, *value.shape) for name, value in mean.items()}, mean)
    for space in SPACES:
        assert not task_gram(fitted, space=space).any()
    assert not any(value.any() for value in delta_w_deviations(fitted).values())
    assert not any(value.any() for value in deviations(fitted).values())


def test_an_unknown_space():
    with pytest.raises(InputError, match=r"space 'deltaw' is not known; it is one of delta_w, weights; did you mean 'delta_w'\?"):
        task_gram(known(), space="deltaw")


class Bias(Adapter):
    """Adds a vector to the output: no product of two matrices."""

    def start(self, slot, weight, generator):
        return Start({"bias": torch.zeros(slot.out_features)})

    def output(self, x, tensors):
        return tensors["bias"][:, None].expand(-1, x.shape[1], -1)


class Dense(LoRA):
    """LoRA that gives ΔW and not its matrices."""

    def factors(self, tensors):
        return None

    def delta(self, tensors):
        return LoRA(self.rank, self.alpha).delta(tensors)


def test_an_adapter_that_gives_delta_w_alone():
    dense, lora = (known(adapter=adapter(rank=2, alpha=3.0)) for adapter in (Dense, LoRA))
    for measure in (delta_w_norms, delta_w_deviations):
        torch.testing.assert_close(measure(dense), measure(lora))
    torch.testing.assert_close(task_gram(dense), task_gram(lora))


def test_adapters_without_a_delta_w():
    for measure in (delta_w_norms, delta_w_deviations, task_gram):
        with pytest.raises(InputError, match="cannot be written as LoRA matrices"):
            measure(known(adapter=Bias()))
    fitted = known(adapter=Bias())
    torch.testing.assert_close(task_gram(fitted, space="weights").diagonal().sqrt().float(), fitted.deviation_norms())


class Cut(LoRA):
    """LoRA of rank 3 of which the tasks have the given ranks; one number: all tasks."""

    ranks = (2,)

    def start(self, slot, weight, generator):
        start = super().start(slot, weight, generator)
        active = torch.arange(self.rank) < torch.tensor(self.ranks)[:, None]  # (D, r)
        active = active if len(self.ranks) > 1 else active[0]
        start.masks.update({"lora_A": active[..., :, None], "lora_B": active[..., None, :]})
        return start


class CutByTask(Cut):
    """Tasks of rank 1, 2 and 3."""

    ranks = (1, 2, 3)


def ranks_of(values, rank):
    return {name: (value[..., :rank, :] if name.endswith("_A") else value[..., :rank]) for name, value in values.items()}


def test_masked_entries_are_as_if_they_were_not_there():
    """Whatever a draw of a posterior has there: an adapter of rank 3 cut to 2 has the numbers of one of rank 2."""
    fitted = known(adapter=Cut(rank=3, alpha=3.0))
    plain = tiny_bora(adapter=LoRA(rank=2, alpha=2.0))
    small = Known(plain, ranks_of(fitted.given[0], 2), ranks_of(fitted.given[1], 2))
    delta, expected = deviations(fitted), deviations(small)
    torch.testing.assert_close(distances(delta), distances(expected))
    torch.testing.assert_close(task_gram(fitted, space="weights"), task_gram(small, space="weights"))
    generator = torch.Generator().manual_seed(0)
    draws, draws_of_small = PosteriorPooling(), PosteriorPooling()
    for _ in range(3):
        noise = {name: torch.randn(value.shape, generator=generator) for name, value in delta.items()}
        draws.add(noise)
        draws_of_small.add(ranks_of(noise, 2))
    active = {name: active_entries(fitted.model, name) for name in delta}
    found, wanted = draws.factors(active), draws_of_small.factors()
    for name, value in delta.items():
        fisher = torch.rand(value.shape, generator=generator)
        own = ranks_of({name: fisher}, 2)[name]
        tau = torch.tensor(3.0)
        torch.testing.assert_close(root_mean_square(value, active[name]), root_mean_square(expected[name]))
        torch.testing.assert_close(pooling_factor(value, fisher, tau, active[name]), pooling_factor(expected[name], own, tau))
        torch.testing.assert_close(found[name], wanted[name])


def test_tasks_with_ranks_of_their_own_count_their_own_entries():
    fitted = known(adapter=CutByTask(rank=3, alpha=3.0))
    theta, mean = fitted.given
    for name, value in deviations(fitted).items():
        found = root_mean_square(value, active_entries(fitted.model, name))
        for d, rank in enumerate((1, 2, 3)):
            own = ranks_of({name: theta[name][d] - mean[name]}, rank)[name]
            torch.testing.assert_close(found[d], own.flatten(1).double().square().mean(1).sqrt())
    assert active_entries(tiny_bora(), "q_proj.lora_A") is None


def test_tau_weights_the_entries_that_tasks_have():
    model = tiny_bora(adapter=CutByTask(rank=3))
    for name, start in model.starts.items():
        assert entries_of(model)[name] == 2 * start.numel()  # ranks 1, 2 and 3 instead of 3, 3 and 3
    assert entries_of(tiny_bora())["q_proj.lora_A"] == 3 * tiny_bora().starts["q_proj.lora_A"].numel()
