"""The number by which held-out documents judge a fit: it chooses the epoch that is kept. Lower is better.

>>> round(PERPLEXITY.of(-4.0, 2) / math.e**2, 6), QUESTION_NLL.of(-4.0, 2)
(1.0, 2.0)
>>> measure_of({"test_nll": 0.7}).title
'NLL'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.token_split import TokenSplit


@dataclass(frozen=True)
class Measure:
    """The mean negative log-likelihood of an observation, or its exponential.

    Attributes:
        name: its name in ``metrics.json``, behind that of a split, as in ``test_perplexity``.
        title: its name for people.
        observation: what the mean is taken over: ``token`` or ``question``.
        exponential: whether the measure is the exponential of the mean, a perplexity.
        digits: decimals that are shown.
    """

    name: str
    title: str
    observation: str
    exponential: bool
    digits: int

    def of(self, log_likelihood: float, observations: float) -> float | None:
        """The measure of observations with a total log-likelihood in nats; None without observations."""
        if not observations:
            return None
        # cut at exp(700): a float overflows a little beyond it
        nll = -log_likelihood / observations
        return math.exp(min(nll, 700.0)) if self.exponential else nll

    def nll(self, value: float) -> float:
        """The mean negative log-likelihood in nats that a value of the measure stands for: `of` undone."""
        return math.log(value) if self.exponential else value

    def observations(self, split: TokenSplit) -> int:
        """Number of observations in a split."""
        return split.num_tokens if self.observation == "token" else split.num_documents

    @property
    def unit(self) -> str:
        """The title and, if it has one, the unit."""
        return self.title if self.exponential else f"{self.title}, nats a {self.observation}"


#: exp(total negative log-likelihood / predicted tokens).
PERPLEXITY = Measure("perplexity", "perplexity", "token", exponential=True, digits=2)
#: −log p(right answer | prompt), the mean over questions with options.
QUESTION_NLL = Measure("nll", "NLL", "question", exponential=False, digits=3)
#: All measures.
MEASURES = (PERPLEXITY, QUESTION_NLL)


def measure_of(found: Mapping[str, Any], split: str = "test") -> Measure:
    """The measure that ``metrics.json``, or the report of an epoch, has of a split; perplexity if it has none."""
    return next((measure for measure in MEASURES if f"{split}_{measure.name}" in found), PERPLEXITY)
