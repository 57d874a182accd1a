"""Advantages, the clipped surrogate and the estimated divergence, against their formulas."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.likelihoods.policy import EQUAL, RewardBuffer, divergence, is_clipped, standardised, surrogate


def rewards(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_have_mean_0_and_deviation_1():
    advantage = standardised(rewards(5, 8))
    torch.testing.assert_close(advantage.mean(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(advantage.std(-1, correction=0), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(("shift", "factor"), [(7.0, 1.0), (0.0, 3.0), (-100.0, 0.01), (1e6, 1e3)])
def test_a_shift_and_a_scale_change_no_advantage(shift, factor):
    given = rewards(4, 6)
    torch.testing.assert_close(standardised(factor * given + shift), standardised(given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-300, 1e300, 1 / 3])
def test_equal_rewards_have_no_advantage(value):
    assert not standardised(torch.full((2, 7), value, dtype=torch.float64)).any()


def test_differences_of_rounding_are_none():
    given = torch.ones(6, dtype=torch.float64)
    given[0] += EQUAL / 8
    assert not standardised(given).any()


def test_the_largest_rewards_overflow_nothing():
    given = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64)
    torch.testing.assert_close(standardised(given), torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_advantages_are_cut():
    given = torch.zeros(1000, dtype=torch.float64)
    given[0] = 1.0  # (1 - 1/n) / sqrt(1/n - 1/n²) = sqrt(n - 1), more than 31
    assert standardised(given)[0] == 10.0
    assert standardised(-given)[0] == -10.0
    assert standardised(given, most=100.0)[0] == pytest.approx(999**0.5)


def test_a_buffer_keeps_the_newest_rewards_of_a_prompt():
    buffer, seen = RewardBuffer(prompts=2, size=5, least=4), []
    for step in range(6):
        given = rewards(1, 2, seed=step)
        seen += given[0].tolist()
        found = buffer.advantages(torch.tensor([1]), given)
        newest = torch.tensor(seen[-5:], dtype=torch.float64)
        # with fewer than four rewards of the prompt, those of the step are the baseline
        torch.testing.assert_close(found[0], standardised(given[0], newest if len(seen) >= 4 else given[0]))
    assert not buffer.added[0]


def test_prompts_without_enough_rewards_are_compared_with_all_of_the_step():
    buffer, given = RewardBuffer(prompts=3, size=8, least=3), rewards(3, 2)
    found = buffer.advantages(torch.tensor([2, 0, 1]), given)
    torch.testing.assert_close(found.flatten(), standardised(given.flatten()))


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 0.5])
def test_the_surrogate_is_ppos(advantage):
    log_ratio = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64)
    ratio, a = log_ratio.exp(), torch.tensor(advantage, dtype=torch.float64)
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(-surrogate(log_ratio, a, clip=0.2), loss)


def test_the_loss_where_texts_were_written_is_minus_the_mean_advantage():
    advantage = standardised(rewards(3, 4), rewards(3, 4, seed=1))
    assert float(-surrogate(torch.zeros(3, 4), advantage, clip=0.1).mean()) == pytest.approx(-float(advantage.mean()))


def test_the_gradient_is_the_advantage_at_first_and_0_where_it_is_clipped():
    log_ratio = torch.tensor([0.0, 0.0, 0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, -3.0, 1.0, -1.0, 1.0, -1.0])
    surrogate(log_ratio, advantage, clip=0.2).sum().backward()
    torch.testing.assert_close(log_ratio.grad[:2], advantage[:2])
    assert (log_ratio.grad == 0).tolist() == is_clipped(log_ratio.detach(), advantage, clip=0.2).tolist()
    assert (log_ratio.grad == 0).tolist() == [False, False, True, False, False, True]


def test_ratios_of_any_size_give_finite_numbers():
    log_ratio = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4], requires_grad=True)
    value = surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]), clip=0.2)
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert bool(log_ratio.grad.isfinite().all())


def test_the_mean_of_the_estimate_is_the_divergence():
    p, q = (torch.softmax(rewards(6, seed=seed), 0) for seed in (2, 3))
    estimate = divergence(p.log(), q.log())
    assert float(estimate.min()) >= 0
    assert float((p * estimate).sum()) == pytest.approx(float((p * (p / q).log()).sum()))
