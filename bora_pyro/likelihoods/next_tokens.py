"""Every token of every document is observed: the BoRA paper's likelihood.

>>> CausalLM()
CausalLM(unit='tokens')
"""

from __future__ import annotations

import pyro
from pyro import poutine
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.errors import check_one_of
from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.distribution import NextTokens

UNITS = ("tokens", "documents")


class CausalLM(Likelihood):
    """Every token of every document is observed: Π_d Π_n Π_i LLM(w_{i+1} | w_{1:i}; θ_d) (the BoRA paper's equation 5).

        >>> import torch
        >>> from pyro import poutine
        >>> from bora_pyro.data import TokenSplit
        >>> batch = TokenSplit.from_documents([[0, 1, 1], [0, 1]], task=[0, 1], num_tasks=2).batches()[0]
        >>> class Coin:  # two tokens, equally probable: three predictions in all
        ...     def lazy_logits(self, batch, weights):
        ...         return torch.zeros(2, 3, 2)
        >>> trace = poutine.trace(CausalLM()).get_trace(Coin(), None, batch)
        >>> round(float(trace.log_prob_sum() / torch.tensor(0.5).log()), 4)
        3.0

    Args:
        unit: ``tokens`` is the paper's likelihood. ``documents`` takes each document's mean log-likelihood per token, so that
            every document counts once, whatever its length; the released code does this. The pieces of a document that was split
            count once together.
        task_weights: (D,) float32 above 0: the factor w_d of each task's log-likelihood, Π_d p(documents of d | θ_d)^w_d. It has
            the effect of w_d copies of each document of the task. None: 1 for all. Perplexities are not weighted.

    Raises:
        InputError: the unit is unknown, or a weight is not a finite number above 0.
    """

    def __init__(self, unit: str = "tokens", *, task_weights: Tensor | None = None) -> None:
        check_one_of("likelihood unit", unit, UNITS)
        self.unit = unit
        self.task_weights = self.with_task_weights(task_weights).task_weights

    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        self.check(batch)
        logits = model.lazy_logits(batch, weights)
        observed = NextTokens(logits, per_token=self.unit == "documents", piece_share=batch.piece_share)
        # the sum over the batch times batch.scale is an unbiased estimate of the sum over all documents
        scale = batch.scale if self.task_weights is None else batch.scale * self.task_weight(batch.task)
        with pyro.plate("documents", len(batch.labels), dim=-1), poutine.scale(scale=scale):
            pyro.sample("tokens", observed, obs=batch.labels)

    def observations(self, documents: float, tokens: float) -> float:
        return tokens if self.unit == "tokens" else documents

    def __repr__(self) -> str:
        return f"CausalLM(unit={self.unit!r}{self._weights_text()})"
