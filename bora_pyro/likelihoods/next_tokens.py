"""What is observed: the likelihood owns the document plate, the scale of a mini-batch and the label mask.

>>> CausalLM()
CausalLM(unit='tokens')
"""

from __future__ import annotations

import copy
from typing import ClassVar, Protocol

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.errors import InputError, nearest

UNITS = ("tokens", "documents")


class Likelihood(Protocol):
    """Scores a batch under the language model's logits."""

    def __call__(self, logits: Tensor | LazyLogits, batch: Batch) -> None:
        """Add the observed sites of ``batch`` to the model; logits: (rows, tokens, vocabulary), computed or not yet."""

    def observations(self, documents: float, tokens: float) -> float:
        """How many observations so many documents with so many predicted tokens are: the unit of the reported loss."""


def task_weight(likelihood: Likelihood, task: Tensor) -> Tensor:
    """(rows,) float32, the factor of each document's log-likelihood, by its task; 1 where the likelihood weighs all alike."""
    weights = getattr(likelihood, "task_weights", None)
    return torch.ones(len(task), device=task.device) if weights is None else weights.to(task.device)[task]


def with_task_weights(likelihood: Likelihood, weights: Tensor | None) -> Likelihood:
    """The same likelihood for other tasks, with a weight (D,) of each; None: all count alike.

    Raises:
        InputError: weights, and a likelihood that has none.
    """
    likelihood = copy.copy(likelihood)
    if hasattr(likelihood, "task_weights"):
        likelihood.task_weights = weights
    elif weights is not None:
        raise InputError(f"the data has task weights, which {type(likelihood).__name__} does not know; leave task_weights out")
    return likelihood


class NextTokens(TorchDistribution):
    """The distribution of documents under next-token logits: log p(w) = Σ_i log LLM(w_{i+1} | w_{1:i}) (equation 2).

    Args:
        logits: (rows, tokens, vocabulary), position i holding the logits of token i + 1; or what they are computed from, chunk
            by chunk, so that those of all tokens never exist at once.
        per_token: divide a document's log-density by the number of its observed tokens.

    Values are labels (rows, tokens): entry i is the token at position i, -100 where nothing is observed. Position 0 is
    given, never predicted. The log-density is float32 whatever the precision of the logits.
    """

    # NaN logits are no wrong argument: they give a NaN loss, of which the loop tells in one line
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.integer_interval(IGNORED, 2**31 - 1), 1)
    has_rsample = False

    def __init__(self, logits: Tensor | LazyLogits, *, per_token: bool = False, validate_args: bool | None = None) -> None:
        self.logits, self.per_token = logits, per_token
        super().__init__(logits.shape[:1], logits.shape[1:2], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: TorchDistribution | None = None) -> NextTokens:
        return NextTokens(self.logits.expand(*batch_shape, *self.logits.shape[1:]), per_token=self.per_token)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Each next token drawn given the *observed* prefix; position 0 has no distribution and is -100."""
        logits = self.logits() if isinstance(self.logits, LazyLogits) else self.logits
        drawn = torch.distributions.Categorical(logits=logits[:, :-1].float()).sample(sample_shape)
        return F.pad(drawn, (1, 0), value=IGNORED)

    def log_prob(self, value: Tensor) -> Tensor:
        rows, tokens, vocabulary = self.logits.shape
        # the labels are shifted and not the logits: a slice of the logits would be copied, and so would its gradient
        targets = F.pad(value[:, 1:], (0, 1), value=IGNORED)
        if isinstance(self.logits, LazyLogits):
            loss = self.logits.token_losses(targets)
        else:
            flat = self.logits.reshape(-1, vocabulary).float()
            loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
        log_likelihood = -loss.view(rows, tokens).sum(-1)
        if self.per_token:
            log_likelihood = log_likelihood / (value[:, 1:] != IGNORED).sum(-1).clamp(min=1)
        return log_likelihood


class CausalLM:
    """Every token of every document is observed: Π_d Π_n Π_i LLM(w_{i+1} | w_{1:i}; θ_d) (the BoRA paper's equation 5).

        >>> import bora_pyro as bp
        >>> from pyro import poutine
        >>> from bora_pyro.data import TokenSplit
        >>> batch = TokenSplit.from_documents([[0, 1, 1], [0, 1]], task=[0, 1], num_tasks=2).batches()[0]
        >>> logits = torch.zeros(2, 3, 2)  # two tokens, equally probable: three predictions in all
        >>> trace = poutine.trace(CausalLM()).get_trace(logits, batch)
        >>> round(float(trace.log_prob_sum() / torch.tensor(0.5).log()), 4)
        3.0

    Args:
        unit: ``tokens``, the paper's likelihood; ``documents`` counts each document once whatever its length (its mean
            log-likelihood a token), as the released code does.
        task_weights: (D,) float32, above 0, the factor w_d of each task's log-likelihood, Π_d p(documents of d | θ_d)^w_d: as if
            a task's documents were there w_d times; None: 1 for all. Perplexities are not weighted.

    Raises:
        InputError: an unknown unit, or a weight that is no finite number above 0.
    """

    def __init__(self, unit: str = "tokens", *, task_weights: Tensor | None = None) -> None:
        if unit not in UNITS:
            raise InputError(f"likelihood unit {unit!r} is not known; it is one of {', '.join(UNITS)}{nearest(unit, UNITS)}")
        if task_weights is not None and not bool(((task_weights > 0) & task_weights.isfinite()).all()):
            raise InputError(f"task_weights are {task_weights.tolist()!r:.80}; give finite numbers above 0")
        self.unit, self.task_weights = unit, task_weights

    def __call__(self, logits: Tensor | LazyLogits, batch: Batch) -> None:
        # batch.scale makes the sum over the batch an unbiased estimate of the sum over all documents
        scale = batch.scale if self.task_weights is None else batch.scale * task_weight(self, batch.task)
        with pyro.plate("documents", len(batch.labels), dim=-1), poutine.scale(scale=scale):
            pyro.sample("tokens", NextTokens(logits, per_token=self.unit == "documents"), obs=batch.labels)

    def observations(self, documents: float, tokens: float) -> float:
        return tokens if self.unit == "tokens" else documents

    def __repr__(self) -> str:
        weights = ""
        if self.task_weights is not None:
            weights = f", task_weights={self.task_weights.min().item():g} to {self.task_weights.max().item():g}"
        return f"CausalLM(unit={self.unit!r}{weights})"
