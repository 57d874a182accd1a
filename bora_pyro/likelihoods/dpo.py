"""Of each pair of answers the preferred one is observed: direct preference optimisation.

>>> DPO(), DPO(beta=1, reference="none")
(DPO(beta=0.1, reference='base'), DPO(beta=1, reference='none'))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError, check_one_of
from bora_pyro.likelihoods.base import LanguageModel
from bora_pyro.likelihoods.choice import Choice

#: What an adapted model is compared with.
REFERENCES = ("base", "none")


class DPO(Choice):
    """The preferred answer of each prompt is observed (Rafailov et al., 2023, arXiv 2305.18290, equation 7):

        log p(chosen ≻ rejected | prompt; θ_d) = log σ(r(chosen) − r(rejected)),
        r(y) = β log [p(y | prompt; θ_d) / p_0(y | prompt)]

    with p_0 the base without adapters. It is the model of Bradley and Terry with the implicit reward r. The probability of an
    answer is that of all its tokens. Prompts with more than two answers are read too: then the chosen one is the best of all,

        log p(chosen | answers, prompt) = r(chosen) − log Σ_answers exp r(answer).

        >>> from bora_pyro.data.token_split import TokenSplit
        >>> from pyro import poutine
        >>> rows, chosen = [[0, 1, 1], [0, 1, 0, 1]], [True, False]  # a prompt of one token, answers of one and of two tokens
        >>> more = {"read": [2, 2], "document_index": [0, 0], "correct": chosen}
        >>> batch = TokenSplit.from_documents(rows, task=[0, 0], num_tasks=2, **more).batches()[0]
        >>> class Coin:  # the base tosses a coin; the adapted model never has token 0
        ...     def lazy_logits(self, batch, weights):
        ...         return torch.zeros(2, 4, 2) if weights is None else torch.tensor([-100.0, 0.0]).expand(2, 4, 2)
        >>> trace = poutine.trace(DPO(beta=0.01)).get_trace(Coin(), {}, batch)
        >>> round(float(trace.log_prob_sum().exp()), 4)  # σ(0.01 (log 2 − (log 2 + log 2 − 100)))
        0.7297

    In DPO the reference keeps the policy near where it begins; β says how near. Here the prior does so too: it keeps θ_d near Θ,
    and τ says how near. ``reference="none"`` leaves this to the prior alone. Then r is β log p(y | prompt; θ_d), as in
    :class:`Choice` with sums, and long answers are at a disadvantage.

    Under the base, or at the adapters' start, both answers have the probability 1/2. An accuracy counts such a tie as half right.

    Args:
        beta: β, above 0. TRL's default is 0.1.
        reference: ``base`` or ``none``. The base's log-probabilities cost one more pass without gradients for each batch.
        task_weights: as for :class:`Choice`.

    Raises:
        InputError: β is not a finite number above 0, the reference is unknown, or a weight is not a finite number above 0.
    """

    def __init__(self, beta: float = 0.1, reference: str = "base", *, task_weights: Tensor | None = None) -> None:
        super().__init__("sum", task_weights=task_weights)
        check_one_of("reference", reference, REFERENCES)
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise InputError(f"beta is {beta!r}; give a finite number above 0, for example 0.1")
        self.beta, self.reference = beta, reference

    def score(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
        """The implicit reward r of each answer, (rows,)."""
        if self.reference == "none":
            return self.beta * super().score(model, weights, batch)
        if weights is None:  # the base against itself
            return torch.zeros(len(batch.labels), device=batch.labels.device)
        own = super().score(model, weights, batch)
        with torch.no_grad():
            reference = super().score(model, None, batch)
        return self.beta * (own - reference)

    def __repr__(self) -> str:
        return f"DPO(beta={self.beta:g}, reference={self.reference!r}{self._weights_text()})"
