"""What a likelihood is: it says what is observed of a batch, and so what a fit maximises beside the prior.

A new one is one file with a subclass of :class:`Likelihood`, and one line in ``bora_pyro/likelihoods/__init__.py``. It need not
be the likelihood of given texts: an objective as a reward is a ``pyro.factor``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.likelihoods.distribution import NextTokens

L = TypeVar("L", bound="Likelihood")


class LanguageModel(Protocol):
    """What a likelihood needs of the model: the logits of a batch under given adapters."""

    def lazy_logits(self, batch: Batch, weights: dict[str, Tensor] | None) -> Tensor | LazyLogits:
        """Logits (rows, tokens, vocabulary), computed or not yet; without weights those of the base."""


class Likelihood(ABC):
    """Observes a batch under the language model.

    It owns the plate of documents, the scale of a mini-batch and the mask of the labels.

        >>> import pyro
        >>> class Reward(Likelihood):  # an objective that is no likelihood of given texts
        ...     def __call__(self, model, weights, batch):
        ...         reward = model.lazy_logits(batch, weights)[:, -1].logsumexp(-1)
        ...         pyro.factor("reward", batch.scale * reward.sum())
        ...
        ...     def observations(self, documents, tokens):
        ...         return documents

    Attributes:
        task_weights: (D,) float32 above 0, the factor w_d of each task's log-likelihood, as if a task's documents were there w_d
            times; None: 1 for all.
    """

    task_weights: Tensor | None = None

    @abstractmethod
    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        """Add the observed sites of a batch to the Pyro model.

        Args:
            model: gives the logits.
            weights: θ by name, a row for each task that the batch speaks of.
            batch: the documents; ``batch.scale`` makes their log-likelihood an unbiased estimate of that of all documents.
        """

    @abstractmethod
    def observations(self, documents: float, tokens: float) -> float:
        """How many observations so many documents with so many predicted tokens are: the unit of the reported loss."""

    def score(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
        """(rows,) the log-likelihood of each document in nats, by which a split is scored; by default that of its next tokens.

        Task weights do not count: perplexities are not weighted.
        """
        return NextTokens(model.lazy_logits(batch, weights)).log_prob(batch.labels)

    def task_weight(self, task: Tensor) -> Tensor:
        """(rows,) float32, the factor of each document's log-likelihood, by its task ``task`` (rows,)."""
        return torch.ones(len(task), device=task.device) if self.task_weights is None else self.task_weights.to(task.device)[task]

    def with_task_weights(self: L, weights: Tensor | None) -> L:
        """The same likelihood for other tasks, with a weight (D,) of each; None: all count alike.

        Raises:
            InputError: a weight that is no finite number above 0.
        """
        if weights is not None and not bool(((weights > 0) & weights.isfinite()).all()):
            raise InputError(f"task_weights are {weights.tolist()!r:.80}; give finite numbers above 0")
        other = copy.copy(self)
        other.task_weights = weights
        return other

    def callbacks(self) -> Sequence[Any]:
        """What acts between the steps of a fit for this likelihood: see :class:`~bora_pyro.inference.callbacks.Callback`."""
        return ()
