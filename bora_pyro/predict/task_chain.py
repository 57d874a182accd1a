"""A hidden Markov model of the task of each token: the forward filter, the smoother and the most probable path.

    >>> start, emissions = torch.tensor([0.5, 0.5]).log(), torch.tensor([[[[0.0, -9.0]], [[0.0, -9.0]], [[-9.0, 0.0]]]])
    >>> chain = TaskChain(start, switch_rate=0.1)
    >>> predicted, log_prob = chain.filter(emissions)
    >>> predicted.exp()[0, :, 0, 0].tolist()  # p(task 0) before each of three tokens
    [0.5, 0.9498..., 0.9499...]
    >>> chain.path(emissions, torch.tensor([3]))[0].tolist()
    [[0, 0, 1]]

The state of the first token is drawn from p(s). Before every later token the state is drawn anew from p(s) with probability ρ,
the switch rate, and otherwise stays: p(s' | s) = (1 − ρ) 1[s' = s] + ρ p(s'). The new state may be the old one. A step costs as
many operations as there are states, not their square.

Tensors have the shape (texts, tokens, draws, states). A draw, such as one of an adapter's posterior, is chosen once for a text,
with equal probabilities, and no switch changes it. A text that is shorter than the others has the emission log 1 = 0 at its end:
such tokens change neither the filter nor the smoother of the tokens before them.

Source: Rabiner, "A tutorial on hidden Markov models", Proceedings of the IEEE 77, 1989 (forward-backward and Viterbi recursions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.errors import InputError


@dataclass(frozen=True, eq=False)
class TaskChain:
    """The chain of states, with emissions that are given.

    Attributes:
        log_start: (states,) float64, log p(s), normalised.
        switch_rate: ρ, from 0 to 1.
        temperature: T > 0. States are weighted by emissions to the power 1/T. Predictions use the emissions themselves.

    Raises:
        InputError: if the rate or the temperature is out of range.
    """

    log_start: Tensor
    switch_rate: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.switch_rate <= 1:
            raise InputError(f"switch_rate is {self.switch_rate}; give the probability of a switch before a token, from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give a finite number above 0")

    @property
    def _log_rates(self) -> tuple[float, float]:
        """log (1 − ρ) and log ρ."""
        stay = math.log1p(-self.switch_rate) if self.switch_rate < 1 else -math.inf
        return stay, math.log(self.switch_rate) if self.switch_rate else -math.inf

    def filter(self, emissions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the state of each token from the tokens before it.

        Args:
            emissions: (texts, tokens, draws, states) log p(token | the tokens before it, draw, state).

        Returns:
            log p(draw, state of token t | tokens before t), (texts, tokens, draws, states), and log p(token t | tokens before t),
            (texts, tokens).
        """
        texts, tokens, draws, _ = emissions.shape
        stay, switch = self._log_rates
        state = (self.log_start - math.log(draws)).expand(texts, draws, -1)
        predicted, log_prob = torch.empty_like(emissions), emissions.new_zeros(texts, tokens)
        for t in range(tokens):
            predicted[:, t] = state
            log_prob[:, t] = (state + emissions[:, t]).logsumexp((1, 2))
            state = _normalised(state + emissions[:, t] / self.temperature)
            of_draw = state.logsumexp(-1, keepdim=True)
            state = torch.logaddexp(state + stay, of_draw + switch + self.log_start)
        return predicted, log_prob

    def smooth(self, emissions: Tensor, predicted: Tensor) -> Tensor:
        """log p(draw, state of token t | whole text), (texts, tokens, draws, states), by the backward recursion.

        Args:
            emissions: as for :meth:`filter`.
            predicted: the first result of :meth:`filter`.
        """
        stay, switch = self._log_rates
        later, smoothed = torch.zeros_like(emissions[:, 0]), torch.empty_like(emissions)
        for t in reversed(range(emissions.shape[1])):
            own = emissions[:, t] / self.temperature + later
            smoothed[:, t] = _normalised(predicted[:, t] + own)
            drawn_anew = (own + self.log_start).logsumexp(-1, keepdim=True)
            later = torch.logaddexp(own + stay, drawn_anew + switch)
            later = later - later.flatten(1).max(1).values[:, None, None]  # a constant: the posterior does not change
        return smoothed

    def path(self, emissions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable states of all tokens together, with the most probable draw, by the Viterbi recursion.

        Where staying and a switch are equally probable, the path stays.

        Args:
            emissions: as for :meth:`filter`.
            lengths: (texts,) number of tokens of each text, 1 or more.

        Returns:
            (texts, tokens) int64 states, −1 behind the end of a text, and (texts,) int64 draws.
        """
        texts, tokens, _, states = emissions.shape
        stay, switch = self._log_rates
        to_itself = torch.logaddexp(torch.tensor(stay, dtype=emissions.dtype), switch + self.log_start)
        own = torch.arange(states, dtype=torch.int32).expand_as(emissions[:, 0])
        came: list[Tensor] = []
        best = self.log_start + emissions[:, 0] / self.temperature
        for t in range(1, tokens):
            highest, where = best.max(-1, keepdim=True)
            same, jump = best + to_itself, highest + switch + self.log_start
            inside = (t < lengths)[:, None, None]
            came.append(torch.where((jump > same) & inside, where.to(torch.int32), own))
            best = torch.where(inside, torch.maximum(same, jump) + emissions[:, t] / self.temperature, best)
        at_end = best.flatten(1).argmax(1)
        draw, state, text = at_end // states, at_end % states, torch.arange(texts)
        path = torch.full((texts, tokens), -1)
        for t in reversed(range(tokens)):
            path[:, t] = torch.where(t < lengths, state, -1)
            if t:
                state = came[t - 1][text, draw, state].long()
        return path, draw


def _normalised(log_weights: Tensor) -> Tensor:
    """Log-probabilities over draws and states: (texts, draws, states)."""
    return log_weights - log_weights.logsumexp((1, 2), keepdim=True)
