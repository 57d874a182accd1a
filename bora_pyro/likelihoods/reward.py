"""Rewards of texts that the model wrote itself are observed: PPO's surrogate in place of a log-likelihood.

>>> RewardObjective(clip=0.2)
RewardObjective(clip=0.2, ratio='token', kl_weight=0)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.rollout import Rollout
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_one_of
from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.distribution import NextTokens
from bora_pyro.likelihoods.measure import Measure
from bora_pyro.likelihoods.policy import divergence, is_clipped, surrogate
from bora_pyro.likelihoods.scores import Scores

#: What ρ is the ratio of: the probabilities of a token, or those of a whole text.
RATIOS = ("token", "text")
#: What a fit minimises on held-out prompts: minus the mean reward.
NEGATIVE_REWARD = Measure("negative_reward", "negative reward", "document", exponential=False, digits=4)

#: Returns the mean reward of texts that a model writes behind each prompt of a batch, (rows,).
Judge = Callable[[Any, dict[str, Tensor] | None, Batch], Tensor]


class RewardScores(Scores):
    """Rewards of the prompts of one split. ``log_likelihood`` has the mean reward of each prompt.

    >>> scores = RewardScores(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2, 2, 0]), torch.ones(3), torch.tensor([0, 1, 1]))
    >>> scores.value(), scores.value(task=1), scores.sums()  # the last prompt was not read
    (-2.0, -3.0, tensor([4., 2.], dtype=torch.float64))
    """

    measure: ClassVar[Measure] = NEGATIVE_REWARD

    def value(self, task: int | None = None) -> float | None:
        """Minus the mean reward of all prompts, or of those of one task; None if there is none."""
        chosen = self._of(task) & (self.tokens > 0)
        return -float(self.log_likelihood[chosen].mean()) if chosen.any() else None

    def sums(self) -> Tensor:
        return torch.stack([self.log_likelihood.sum().double(), (self.tokens > 0).sum().double()])

    def numbers(self, task: int | None = None) -> dict[str, float | None]:
        value = self.value(task)
        return {"reward": None if value is None else -value}


class RewardObjective(Likelihood):
    """The rewards of rollouts are observed. A rollout with advantage A pulls on the adapters as A observed documents do.

        >>> RewardObjective(clip=0)
        Traceback (most recent call last):
        bora_pyro.errors.InputError: clip is 0; give a finite number above 0, such as 0.2

    In place of the log-likelihood of N_d documents stands, for the N_d prompts of task d with G texts w each,

        Σ_n (1/G) Σ_g Σ_i min(A ρ_i, A clip(ρ_i, 1 − ε, 1 + ε)),   ρ_i = p(w_i | w_{1:i-1}, θ_d) / p(w_i | w_{1:i-1}, θ_d°)

    with the sum over the written tokens i, and θ_d° the adapter that wrote the text. With ``ratio="text"``, ρ is the ratio of the
    whole text, and the sum over i falls away. At ρ = 1 the gradient is in both forms that of REINFORCE,
    Σ_n (1/G) Σ_g A ∇ log p(text | prompt, θ_d): a text with A = 1 has the gradient of an observed document. So a prompt counts
    as one document, whatever G is, and τ has the meaning that it has in a fit to N_d documents. The prior of the adapters is the
    anchor; there is no divergence from a reference model unless ``kl_weight`` is above 0. Then β Σ_i (q/p − log(q/p) − 1) is
    subtracted from the text's sum, with the base q.

    A batch that is no :class:`~bora_pyro.data.rollout.Rollout` is prompts alone, of which nothing is observed.

    Args:
        clip: ε, above 0.
        ratio: ``token`` or ``text``.
        kl_weight: β, 0 or more.
        judge: rewards the prompts of a held-out split; needed by ``score``.

    Attributes:
        counts: (4,) float64, sums over the batches since they were last set to 0: ratios, those that were clipped, written
            tokens, and the divergence of these tokens from the base in nats (0 if a rollout lacks the base's probabilities).

    Raises:
        InputError: a number is out of range, or ``ratio`` is unknown.
    """

    measure: ClassVar[Measure] = NEGATIVE_REWARD

    def __init__(self, clip: float = 0.2, ratio: str = "token", kl_weight: float = 0.0, *, judge: Judge | None = None) -> None:
        if not 0 < clip < math.inf:
            raise InputError(f"clip is {clip}; give a finite number above 0, such as 0.2")
        check_one_of("ratio", ratio, RATIOS)
        if not 0 <= kl_weight < math.inf:
            raise InputError(f"kl_weight is {kl_weight}; give a finite number from 0 (no divergence) up")
        self.clip, self.ratio, self.kl_weight, self.judge = float(clip), ratio, float(kl_weight), judge
        self.counts = torch.zeros(4, dtype=torch.float64)

    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        if not isinstance(batch, Rollout):
            pyro.factor("reward", torch.zeros((), device=batch.labels.device))
            return
        value = self.values(token_log_probs(model, weights, batch), batch)
        assert batch.piece_share is not None
        weight = batch.piece_share * self.task_weight(batch.task)
        pyro.factor("reward", batch.scale * (weight * value).sum())

    def values(self, log_prob: Tensor, batch: Rollout) -> Tensor:
        """The objective of each text, (rows,), of log-probabilities (rows, tokens) as `token_log_probs` returns them."""
        assert batch.advantage is not None and batch.sampled_log_prob is not None
        written = written_tokens(batch)
        log_ratio = log_prob - batch.sampled_log_prob
        advantage, counts = batch.advantage[:, None], written
        if self.ratio == "text":
            log_ratio, counts = log_ratio.sum(-1, keepdim=True), written.any(-1, keepdim=True)
        value = (surrogate(log_ratio, advantage, clip=self.clip) * counts).sum(-1)
        kl = torch.zeros_like(value)
        if batch.base_log_prob is not None:
            kl = (divergence(log_prob, batch.base_log_prob) * written).sum(-1)
        clipped = is_clipped(log_ratio.detach(), advantage, clip=self.clip) & counts
        found = [counts.sum(), clipped.sum(), written.sum(), kl.detach().sum()]
        self.counts = self.counts + torch.stack([number.cpu().double() for number in found])
        return value - self.kl_weight * kl if self.kl_weight else value

    def observations(self, documents: float, tokens: float) -> float:
        return documents

    def check(self, rows: Batch | TokenSplit) -> None:
        if rows.correct is not None:
            raise InputError(f"{self} observes texts behind prompts, and these documents have options; leave options_column out")

    def score(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
        """The mean reward of texts that are written behind each prompt, (rows,)."""
        if self.judge is None:
            raise InputError(f"{self} has no judge to reward held-out prompts; give RewardObjective(judge=...)")
        return self.judge(model, weights, batch)

    def scores(self, split: TokenSplit, log_likelihood: Tensor, tokens: Tensor) -> Scores:
        return RewardScores(log_likelihood, tokens, split.characters, split.task)

    def __repr__(self) -> str:
        return f"RewardObjective(clip={self.clip:g}, ratio={self.ratio!r}, kl_weight={self.kl_weight:g}{self._weights_text()})"


def token_log_probs(model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
    """log p of each written token in nats, (rows, tokens) float32; entry i is that of the token at position i + 1."""
    return NextTokens(model.lazy_logits(batch, weights)).token_log_probs(batch.labels)


def written_tokens(batch: Batch) -> Tensor:
    """(rows, tokens) bool, whether the token at position i + 1 was written by the model."""
    return torch.nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
