"""The loss of each token, computed without holding the logits of all tokens at once.

    >>> head = torch.nn.Linear(4, 10, bias=False).requires_grad_(False)
    >>> states = torch.randn(2, 3, 4)
    >>> targets = torch.tensor([[5, 6, -100], [7, -100, -100]])
    >>> logits = LazyLogits(states, head)
    >>> loss = logits.token_losses(targets)
    >>> expected = torch.nn.functional.cross_entropy(logits().flatten(0, 1), targets.flatten(), reduction="none")
    >>> torch.allclose(loss.flatten(), expected, atol=1e-6)
    True

With a vocabulary of 50,000, the float32 logits of a batch and their gradient are larger than everything else in a step. The
head is frozen, so only the hidden states need a gradient. It is computed chunk by chunk, together with the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bora_pyro.data.batch import IGNORED

#: The number of logits in one chunk. On CPUs a chunk should fit into the cache, on GPUs it should fill the device.
CHUNK_ENTRIES = {"cpu": 2**21, "cuda": 2**27}


def chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """The number of tokens in one chunk."""
    return max(64, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["cuda"]) // vocabulary)


@dataclass(frozen=True)
class LazyLogits:
    """Next-token logits that are not computed yet. Calling the object gives all of them; a loss computes them in chunks.

    Attributes:
        states: the last hidden states (rows, tokens, hidden).
        head: the frozen linear map to the vocabulary.
    """

    states: Tensor
    head: nn.Linear

    def __call__(self) -> Tensor:
        """All logits, (rows, tokens, vocabulary)."""
        return self.head(self.states)

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, (rows, tokens, vocabulary)."""
        return torch.Size([*self.states.shape[:-1], len(self.head.weight)])

    def expand(self, *shape: int) -> LazyLogits:
        """As ``Tensor.expand``, for more rows. The last size, the vocabulary, cannot change."""
        return LazyLogits(self.states.expand(*shape[:-1], self.states.shape[-1]), self.head)

    def token_losses(self, targets: Tensor) -> Tensor:
        """The loss of each token, −log p(target) in nats.

        Args:
            targets: (rows, tokens) int64, -100 at tokens without a target.

        Returns:
            (rows, tokens) float32, 0 at tokens without a target.
        """
        return TokenLosses.apply(self.states, self.head.weight, self.head.bias, targets)


def divergences(logits: Tensor | LazyLogits, others: Sequence[Tensor | LazyLogits], observed: Tensor) -> Tensor:
    """KL(p̄ ‖ p) of each token in nats, where p̄ is the mean of several models' probabilities of the next token.

        >>> logits, others = torch.randn(2, 3, 10), [torch.randn(2, 3, 10) for _ in range(4)]
        >>> observed = torch.tensor([[True, True, False], [True, False, False]])
        >>> mixture = sum(other.softmax(-1) for other in others) / 4
        >>> expected = (mixture * (mixture.log() - logits.log_softmax(-1))).sum(-1) * observed
        >>> torch.allclose(divergences(logits, others, observed), expected, atol=1e-5)
        True

    Args:
        logits: the logits of p, (rows, tokens, vocabulary). Only they have a gradient.
        others: those of the models in the mixture.
        observed: the tokens that count, (rows, tokens) bool.

    Returns:
        (rows, tokens) float32, 0 at tokens that do not count.
    """
    states, weight, bias = _chosen(logits, observed)
    mixture = [_chosen(other, observed) for other in others]
    found = Divergences.apply(states, weight, bias, mixture)
    return torch.zeros(observed.shape, device=found.device).masked_scatter(observed, found)


def _chosen(logits: Tensor | LazyLogits, observed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The hidden states of the tokens that count, and the head; or their logits, and no head."""
    if isinstance(logits, LazyLogits):
        return logits.states[observed], logits.head.weight, logits.head.bias
    return logits[observed], None, None


def _log_softmax(states: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.log_softmax(states if weight is None else F.linear(states, weight, bias), -1, dtype=torch.float32)


class Divergences(torch.autograd.Function):
    """KL(p̄ ‖ softmax(h Wᵀ + b)) and its gradient in h, in chunks of tokens; p̄ is a mean of softmax(h_k Wᵀ + b)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        others: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    ) -> Tensor:
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        found = torch.zeros(len(states), dtype=torch.float32, device=states.device)
        chunk = chunk_tokens(states.device, states.shape[-1] if weight is None else len(weight))
        for start in range(0, len(states), chunk):
            part = slice(start, start + chunk)
            mixture = torch.stack([_log_softmax(other[part], *head) for other, *head in others]).exp_().mean(0)
            log_p = _log_softmax(states[part], weight, bias)
            found[part] = (torch.special.xlogy(mixture, mixture) - mixture * log_p).sum(-1)
            if gradient is not None:
                change = log_p.exp_().sub_(mixture).to(states.dtype)
                gradient[part] = change if weight is None else change @ weight.to(states.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None


class TokenLosses(torch.autograd.Function):
    """−log softmax(h Wᵀ + b)[target] and its gradient in h, in chunks of the tokens that have a target."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        width = states.shape[-1]
        flat, observed = targets.flatten(), (targets.flatten() != IGNORED).nonzero()[:, 0]
        hidden, target = states.reshape(-1, width)[observed], flat[observed]
        losses = torch.zeros(flat.shape, dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = chunk_tokens(states.device, len(weight))
        for start in range(0, len(target), chunk):
            part, label = slice(start, start + chunk), target[start : start + chunk, None]
            # one call each, so that nothing is rounded in between and the logits are freed at once
            log_p = torch.log_softmax(F.linear(hidden[part], weight, bias), -1, dtype=torch.float32)
            losses[observed[part]] = -log_p.gather(1, label)[:, 0]
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, label, p.new_full((), -1.0).expand_as(label))
                torch.mm(p.to(weight.dtype), weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient, observed)
            ctx.shape = states.shape
        return losses.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, observed = ctx.saved_tensors
        scaled = gradient * outputs[0].flatten()[observed, None].to(gradient.dtype)
        whole = gradient.new_zeros(ctx.shape).view(-1, ctx.shape[-1]).index_copy_(0, observed, scaled)
        return whole.view(ctx.shape), None, None, None
