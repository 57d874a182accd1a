"""How well held-out documents are predicted, by document and in means.

Perplexity is exp(total negative log-likelihood / total predicted tokens); padding and the first token are not counted. Bits per
character is the same total in bits, divided by the characters of the documents. It can compare bases with different tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bora_pyro.likelihoods.measure import PERPLEXITY, Measure


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of the documents of one split, in nats.

        >>> import torch
        >>> scores = Scores(torch.tensor([-2.0, -4.0]), torch.tensor([1, 2]), torch.tensor([4, 8]), torch.tensor([0, 1]))
        >>> round(scores.perplexity() / math.e**2, 6), round(scores.perplexity(task=1) / math.e**2, 6)
        (1.0, 1.0)

    Attributes:
        log_likelihood: (documents,), float64.
        tokens: predicted tokens of each document.
        characters: characters of each document's predicted tokens.
        task: index of each document's task.
    """

    log_likelihood: Tensor
    tokens: Tensor
    characters: Tensor
    task: Tensor

    #: The number that chooses the epoch of a fit.
    measure: ClassVar[Measure] = PERPLEXITY

    def perplexity(self, task: int | None = None) -> float | None:
        """Perplexity over all documents, or over those of one task; None if there is no document."""
        chosen = self._of(task)
        return PERPLEXITY.of(float(self.log_likelihood[chosen].sum()), int(self.tokens[chosen].sum()))

    def bits_per_character(self, task: int | None = None) -> float | None:
        """Bits per character over all documents, or over those of one task; None if there is no document."""
        chosen = self._of(task)
        characters = int(self.characters[chosen].sum())
        return -float(self.log_likelihood[chosen].sum()) / math.log(2) / characters if characters else None

    def value(self, task: int | None = None) -> float | None:
        """The ``measure`` over all documents, or over those of one task; None if there is no document."""
        return self.perplexity(task)

    def sums(self) -> Tensor:
        """(2,) float64: the total log-likelihood, and the number of observations that ``measure`` divides it by."""
        return torch.stack([self.log_likelihood.sum(), self.tokens.sum().double()])

    def numbers(self, task: int | None = None) -> dict[str, float | None]:
        """The numbers of ``metrics.json``, over all documents or over those of one task."""
        return {"perplexity": self.perplexity(task), "bits_per_character": self.bits_per_character(task)}

    def _of(self, task: int | None) -> Tensor:
        return torch.ones_like(self.task, dtype=torch.bool) if task is None else self.task == task
