"""Policy gradients from rewards: standardised advantages, PPO's clipped surrogate, and the divergence from a reference.

>>> advantage = standardised(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
>>> advantage  # equal rewards say nothing
tensor([[-1.,  1.],
        [ 0.,  0.]])
>>> surrogate(torch.zeros(2, 2), advantage, clip=0.2)  # the model that wrote the texts: the advantage itself
tensor([[-1.,  1.],
        [ 0.,  0.]])

Sources: advantages by prompt and the loss max(−Aρ, −A clip(ρ, 1−ε, 1+ε)) as in Chen et al., "Enhancing Diffusion Models with
Text-Encoder Reinforcement Learning" (TexForce, ECCV 2024, arXiv 2311.15657), after Schulman et al., "Proximal Policy Optimization
Algorithms" (arXiv 1707.06347, equation 7) and Black et al., "Training Diffusion Models with Reinforcement Learning" (arXiv
2305.13301). The divergence is the estimate of Shao et al., "DeepSeekMath" (arXiv 2402.03300, equation 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest advantage, in standard deviations.
MOST_ADVANTAGE = 10.0
#: Rewards that differ by less than this part of the largest of them are equal.
EQUAL = 1e-12
#: The largest |log ρ|. Beyond it, ρ or its inverse would overflow; the gradient there is 0.
MOST_LOG_RATIO = 20.0


def standardised(rewards: Tensor, among: Tensor | None = None, *, most: float = MOST_ADVANTAGE) -> Tensor:
    """Advantages: (r − mean)/sd, cut at ±``most``; 0 where the rewards are equal. A shift and a positive factor change nothing.

        >>> standardised(torch.tensor([4.0]), torch.tensor([0.0, 2.0]))
        tensor([3.])

    Args:
        rewards: (..., n) finite numbers; the last dimension is a group.
        among: (..., m) the rewards whose mean and standard deviation count, with 1/m; default: ``rewards``.
        most: the largest advantage.
    """
    among = rewards if among is None else among
    # in units of the power of two next to the largest reward, so that no square overflows, and nothing is rounded
    largest = torch.maximum(among.abs().amax(-1, keepdim=True), rewards.abs().amax(-1, keepdim=True))
    exponent = torch.frexp(largest).exponent.clamp(-100, 120 if among.dtype == torch.float32 else 1000)
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    scaled = among / unit
    differ = scaled.amax(-1, keepdim=True) - scaled.amin(-1, keepdim=True) > EQUAL
    deviation = scaled.std(-1, correction=0, keepdim=True)
    advantage = (rewards / unit - scaled.mean(-1, keepdim=True)) / torch.where(differ, deviation, 1.0)
    return torch.where(differ, advantage, 0.0).clamp(-most, most)


class RewardBuffer:
    """The newest rewards of each prompt, which say how good a reward is for this prompt.

        >>> buffer = RewardBuffer(prompts=2, size=4, least=3)
        >>> buffer.advantages(torch.tensor([0, 1]), torch.tensor([[1.0, 3.0], [0.0, 0.0]]))  # few rewards: those of all prompts
        tensor([[ 0.0000,  1.6330],
                [-0.8165, -0.8165]], dtype=torch.float64)
        >>> buffer.advantages(torch.tensor([0]), torch.tensor([[1.0, 3.0]]))  # of 1, 3, 1, 3
        tensor([[-1.,  1.]], dtype=torch.float64)

    The rewards are added before the advantages are computed, so that they count too.

    Args:
        prompts: number of prompts.
        size: rewards that are kept of each prompt.
        least: with fewer rewards of a prompt, the mean and the standard deviation are those of all rewards of the step.
    """

    def __init__(self, prompts: int, *, size: int = 32, least: int = 16) -> None:
        self.least = least
        self.rewards = torch.zeros((prompts, size), dtype=torch.float64)
        self.added = torch.zeros(prompts, dtype=torch.int64)

    def advantages(self, prompt: Tensor, rewards: Tensor, *, most: float = MOST_ADVANTAGE) -> Tensor:
        """Add the rewards of some prompts, and return their advantages.

        Args:
            prompt: (n,) int64, different prompts.
            rewards: (n, samples) their rewards.
            most: the largest advantage.
        """
        rewards, size = rewards.double(), self.rewards.shape[1]
        found = torch.empty_like(rewards)
        for place, number in enumerate(prompt.tolist()):
            for reward in rewards[place]:
                self.rewards[number, self.added[number] % size] = reward
                self.added[number] += 1
            own = self.rewards[number, : min(int(self.added[number]), size)]
            found[place] = standardised(rewards[place], own if len(own) >= self.least else rewards.flatten(), most=most)
        return found


def surrogate(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """PPO's surrogate min(A ρ, A clip(ρ, 1 − ε, 1 + ε)), which is maximised. Its negative is the loss.

    Args:
        log_ratio: log ρ, the log-probability under the model minus that under the model that wrote the text, in nats; of any
            shape, by token or by text. At 0 the gradient is A ∇log p, that of REINFORCE.
        advantage: A; it broadcasts against ``log_ratio``.
        clip: ε, above 0.
    """
    ratio = log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))


def is_clipped(log_ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Where the surrogate has no gradient, because the model has already moved far enough the way that the advantage says.

    >>> is_clipped(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([1.0, -1.0, -1.0]), clip=0.2)
    tensor([ True, False,  True])
    """
    ratio = log_ratio.exp()
    return ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))


def divergence(log_prob: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(p ‖ q) from draws of p: q/p − log(q/p) − 1, which is never negative and whose mean over p is exact.

    >>> divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    tensor([0.0000, 0.1931])

    Args:
        log_prob: log p of what was drawn, in nats.
        reference: log q of the same.
    """
    difference = (reference - log_prob).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    return difference.expm1() - difference
