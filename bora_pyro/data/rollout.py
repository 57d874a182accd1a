"""A batch of texts that a model has written, with what their rewards say of them.

>>> prompts, texts = [torch.tensor([0, 7]), torch.tensor([0])], [torch.tensor([5, 2]), torch.tensor([6, 6, 2])]
>>> rollout = Rollout.of(prompts, texts, task=torch.tensor([1, 0]), advantage=torch.tensor([1.0, -1.0]), samples=2, scale=3.0)
>>> rollout.labels
tensor([[-100, -100,    5,    2],
        [-100,    6,    6,    2]])
>>> rollout.predicted, rollout.piece_share
(tensor([2, 3]), tensor([0.5000, 0.5000]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bora_pyro.data.batch import IGNORED, Batch

#: The fields that a rollout has beside those of a batch.
_OWN = ("advantage", "sampled_log_prob", "base_log_prob")


@dataclass(frozen=True)
class Rollout(Batch):
    """Texts that a model has written behind prompts, right-padded. The labels are the written tokens.

    The G samples of a prompt count as one document: ``piece_share`` is 1/G.

    Attributes:
        advantage: (rows,) float32, how much better the reward of each text is than that of others, in standard deviations.
        sampled_log_prob: (rows, tokens) float32, log-probability of each written token under the model that wrote it, in nats.
            Entry i is that of the token at position i + 1; 0 where that token was not written. None before it is computed.
        base_log_prob: the same under the base without an adapter.
    """

    advantage: Tensor | None = None
    sampled_log_prob: Tensor | None = None
    base_log_prob: Tensor | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Tensor],
        texts: Sequence[Tensor],
        *,
        task: Tensor,
        advantage: Tensor,
        samples: int,
        scale: float,
        pad_token_id: int = 0,
    ) -> Rollout:
        """Join prompts and written texts.

        Args:
            prompts: token ids of the prompt of each row, (tokens,) int64.
            texts: token ids that were written behind it, with the end token if there is one.
            task: (rows,) int64, the task of each row.
            advantage: (rows,) the advantages.
            samples: G, the number of texts of each prompt.
            scale: the number of rollouts in an epoch, see `Batch`.
            pad_token_id: the padding token. The masks make its value irrelevant.
        """
        whole = [torch.cat([prompt, text]) for prompt, text in zip(prompts, texts, strict=True)]
        labels = [torch.cat([torch.full_like(prompt, IGNORED), text]) for prompt, text in zip(prompts, texts, strict=True)]
        return cls(
            input_ids=pad_sequence(whole, batch_first=True, padding_value=pad_token_id),
            attention_mask=pad_sequence([torch.ones_like(row) for row in whole], batch_first=True),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            task=task,
            index=torch.arange(len(whole)),
            scale=scale,
            piece_share=torch.full((len(whole),), 1 / samples),
            advantage=advantage.float(),
        )

    def parts(self, tokens: int) -> list[Self]:
        """As `Batch.parts`, with the part of the rows of each field."""
        found = []
        for part in super().parts(tokens):
            rows = part.index - self.index[0]
            own = {name: value[rows] for name in _OWN if (value := getattr(self, name)) is not None}
            own = {name: value if value.dim() == 1 else value[:, : part.input_ids.shape[1]] for name, value in own.items()}
            found.append(replace(self, **{**_fields(part), **own}))
        return found

    def to(self, device: torch.device | str) -> Rollout:
        own = {name: value.to(device) for name in _OWN if (value := getattr(self, name)) is not None}
        return replace(self, **{**_fields(super().to(device)), **own})


def _fields(batch: Batch) -> dict[str, object]:
    """The fields of a batch by name, without those of a rollout."""
    return {name: value for name, value in vars(batch).items() if name not in _OWN}
