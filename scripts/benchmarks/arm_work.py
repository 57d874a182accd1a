"""What all arms of the benchmark share: the work that they are given, and their interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import BUILTIN_BASES, Backbone
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.exchange.peft_model import peft_model


def nano_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of builtin:nano. The vocabulary of every random base is at least as large."""
    return AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])


@dataclass(frozen=True)
class Work:
    """The base model, data and settings that all arms share.

    Attributes:
        backbone: the frozen base; all arms share its weights.
        split: the training documents.
        tokenizer: the tokenizer whose padding token and end mark PEFT's arms and the released code use.
        rows: documents of a batch.
        max_tokens: tokens of the longest document. A batch of ours has up to rows x max_tokens tokens, padding included.
        rank: rank of the adapters.
        tau: precision of the prior.
        seed: seed of the order of documents and of the start.
    """

    backbone: Backbone
    split: TokenSplit
    tokenizer: PreTrainedTokenizerBase
    rows: int
    max_tokens: int
    rank: int
    tau: float
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the base model."""
        return self.backbone.device

    def features(self) -> list[dict[str, Any]]:
        """The documents in the form of PEFT's examples: one mapping each, without padding."""
        numbers = range(len(self.split))
        documents = [(n, self.split.document(n).tolist(), self.split.labels(n).tolist()) for n in numbers]
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "document": n} for n, ids, labels in documents
        ]

    def predicted(self, documents: Tensor) -> int:
        """Number of predicted tokens in some documents.

        Args:
            documents: indices of the documents.
        """
        return int(self.split.predicted[documents].sum())

    def peft_model(self, *adapters: str) -> Any:
        """A PEFT model on the base with adapters of these names."""
        return peft_model(self.backbone, rank=self.rank, seed=self.seed, adapters=adapters or ("default",))


class Arm:
    """One way to train."""

    #: The trained tensors.
    parameters: list[torch.nn.Parameter]

    def step(self) -> int:
        """Build the next batch, and do a forward pass, a backward pass and an update.

        Returns:
            The number of predicted tokens, without padding.
        """
        raise NotImplementedError  # PeftTrainer has none: the Trainer runs a loop of its own
