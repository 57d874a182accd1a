"""The distribution of documents under next-token logits (the BoRA paper's equation 2)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import IGNORED


class NextTokens(TorchDistribution):
    """The distribution of documents under next-token logits: log p(w) = Σ_i log LLM(w_{i+1} | w_{1:i}) (equation 2).

    Args:
        logits: (rows, tokens, vocabulary); position i holds the logits of token i + 1. A ``LazyLogits`` computes them in chunks,
            so that the logits of all tokens never exist at once.
        per_token: divide a document's log-density by the number of its observed tokens.
        piece_share: with ``per_token``, for pieces of long documents: (rows,) the share of each row in the observed tokens of its
            document. The log-densities of the pieces then add up to that of the document. None: each row is a document.

    Values are labels (rows, tokens). Entry i is the token at position i, or -100 if it is not observed. Position 0 is given and
    never predicted. The log-density is float32 for logits of any precision.
    """

    # NaN logits are allowed here: they give a NaN loss, and the loop reports that in one line
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.integer_interval(IGNORED, 2**31 - 1), 1)
    has_rsample = False

    def __init__(
        self,
        logits: Tensor | LazyLogits,
        *,
        per_token: bool = False,
        piece_share: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.per_token, self.piece_share = logits, per_token, piece_share
        super().__init__(logits.shape[:1], logits.shape[1:2], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: TorchDistribution | None = None) -> NextTokens:
        logits = self.logits.expand(*batch_shape, *self.logits.shape[1:])
        return NextTokens(logits, per_token=self.per_token, piece_share=self.piece_share)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw each next token given the *observed* prefix; position 0 has no distribution and is -100."""
        logits = self.logits() if isinstance(self.logits, LazyLogits) else self.logits
        drawn = torch.distributions.Categorical(logits=logits[:, :-1].float()).sample(sample_shape)
        return F.pad(drawn, (1, 0), value=IGNORED)

    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p of each observed token given the tokens before it, in nats.

            >>> NextTokens(torch.zeros(1, 3, 4)).token_log_probs(torch.tensor([[IGNORED, 2, IGNORED]])).exp()
            tensor([[0.2500, 1.0000, 1.0000]])

        Args:
            value: labels (rows, tokens).

        Returns:
            (rows, tokens) float32. Entry i is that of the token at position i + 1. It is 0 where that token is not observed.
        """
        rows, tokens, vocabulary = self.logits.shape
        # shift the labels, not the logits: a slice of the logits would be copied, and its gradient too
        targets = F.pad(value[:, 1:], (0, 1), value=IGNORED)
        if isinstance(self.logits, LazyLogits):
            loss = self.logits.token_losses(targets)
        else:
            flat = self.logits.reshape(-1, vocabulary).float()
            loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
        return -loss.view(rows, tokens)

    def log_prob(self, value: Tensor) -> Tensor:
        log_likelihood = self.token_log_probs(value).sum(-1)
        if self.per_token:
            log_likelihood = log_likelihood / (value[:, 1:] != IGNORED).sum(-1).clamp(min=1)
            if self.piece_share is not None:
                log_likelihood = log_likelihood * self.piece_share
        return log_likelihood
