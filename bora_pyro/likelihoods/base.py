"""The base class of likelihoods. A likelihood says what is observed of a batch; a fit maximises it together with the prior.

A new likelihood is one file with a subclass of :class:`Likelihood`, and one line in ``bora_pyro/likelihoods/__init__.py``. It
does not have to be the likelihood of given texts: a reward, for example, can be added with ``pyro.factor``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.likelihoods.distribution import NextTokens
from bora_pyro.likelihoods.measure import PERPLEXITY, Measure
from bora_pyro.likelihoods.scores import Scores

L = TypeVar("L", bound="Likelihood")


class LanguageModel(Protocol):
    """The part of the model that a likelihood uses: the logits of a batch under given adapters, or of the base without any.

    A model may also have an attribute ``longest_shared``: the longest row that it reads in batches with a ``layout``.
    """

    def logits(self, batch: Batch, weights: dict[str, Tensor] | None) -> Tensor:
        """Logits (rows, tokens, vocabulary) as a tensor."""

    def lazy_logits(self, batch: Batch, weights: dict[str, Tensor] | None) -> Tensor | LazyLogits:
        """Logits that are computed a chunk at a time when they are read, which saves memory; or a tensor, as ``logits``."""


class Likelihood(ABC):
    """Observes a batch under the language model.

    The likelihood alone contains the plate of documents, the scale of a mini-batch and the mask of the labels.

        >>> import pyro
        >>> class Reward(Likelihood):  # an objective that is not the likelihood of given texts
        ...     def __call__(self, model, weights, batch):
        ...         reward = model.lazy_logits(batch, weights)[:, -1].logsumexp(-1)
        ...         pyro.factor("reward", batch.scale * reward.sum())
        ...
        ...     def observations(self, documents, tokens):
        ...         return documents

    Attributes:
        measure: the number by which held-out documents judge a fit. It chooses the epoch that is kept.
        reads_options: whether it observes questions with options. Otherwise it observes documents that are no questions.
        task_weights: (D,) float32 above 0: the factor w_d of each task's log-likelihood. It has the effect of w_d copies of
            each document of the task. None: 1 for all.
    """

    measure: ClassVar[Measure] = PERPLEXITY
    reads_options: ClassVar[bool] = False
    task_weights: Tensor | None = None

    @abstractmethod
    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        """Add the observed sites of a batch to the Pyro model.

        Args:
            model: computes the logits.
            weights: θ by name, one row for each task of the plate.
            batch: the documents. Their log-likelihood times ``batch.scale`` is an unbiased estimate of that of all documents.
        """

    @abstractmethod
    def observations(self, documents: float, tokens: float) -> float:
        """Number of observations in ``documents`` documents with ``tokens`` predicted tokens.

        The reported loss is per observation. Both numbers may be weighted by the tasks' weights.
        """

    def observations_of(self, rows: Batch | TokenSplit) -> float:
        """Number of observations of a batch or split, weighted by task. The pieces of a long document count once together.

        Raises:
            InputError: as for `check`.
        """
        self.check(rows)
        weight = self.task_weight(rows.task).double()
        documents = weight if rows.piece_share is None else weight * rows.piece_share
        return self.observations(documents.sum().item(), (weight * rows.predicted).sum().item())

    def check(self, rows: Batch | TokenSplit) -> None:
        """Check that a batch or split has what the likelihood observes: questions with options, or other documents.

        Raises:
            InputError: it does not.
        """
        if not len(rows.task) or (rows.correct is not None) == self.reads_options:
            return
        if self.reads_options:
            raise InputError(f"{self} observes answers, and these documents have no options; name their column (options_column)")
        raise InputError(f"{self} observes no answers among options; give Choice() (--likelihood choice), or no options_column")

    def check_texts(self, what: str) -> None:
        """Check that the likelihood observes texts, so that its adapters say how likely a text is, which ``what`` needs.

        Raises:
            InputError: it observes answers among options.
        """
        if self.reads_options:
            raise InputError(f"{what} needs a fit to texts; this one, under {self}, knows the answers of questions alone")

    def score(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
        """Log-likelihood of each document in nats, (rows,), for evaluation; by default that of its next tokens.

        Task weights are not applied: perplexities are not weighted.
        """
        return NextTokens(model.lazy_logits(batch, weights)).log_prob(batch.labels)

    def scores(self, split: TokenSplit, log_likelihood: Tensor, tokens: Tensor) -> Scores:
        """How well a split is predicted.

        Args:
            split: the documents.
            log_likelihood: (rows,) float64, what ``score`` returned for each row; 0 for rows that were not scored.
            tokens: (rows,) int64, predicted tokens of each row; 0 for rows that were not scored.
        """
        return Scores(log_likelihood, tokens, split.characters, split.task)

    def task_weight(self, task: Tensor) -> Tensor:
        """The factor of each document's log-likelihood, (rows,) float32: the weight of its task. ``task`` is (rows,)."""
        return torch.ones(len(task), device=task.device) if self.task_weights is None else self.task_weights.to(task.device)[task]

    def with_task_weights(self: L, weights: Tensor | None) -> L:
        """A copy of the likelihood with other task weights, (D,); None: 1 for all.

        Raises:
            InputError: a weight is not a finite number above 0.
        """
        if weights is not None and not bool(((weights > 0) & weights.isfinite()).all()):
            raise InputError(f"task_weights are {weights.tolist()!r:.80}; give finite numbers above 0")
        other = copy.copy(self)
        other.task_weights = weights
        return other

    def _weights_text(self) -> str:
        """The range of the task weights, for ``repr``."""
        if self.task_weights is None:
            return ""
        return f", task_weights={self.task_weights.min().item():g} to {self.task_weights.max().item():g}"

    def callbacks(self) -> Sequence[Any]:
        """Callbacks that this likelihood needs during a fit (:class:`~bora_pyro.inference.callbacks.Callback`)."""
        return ()
