"""How well the language model predicts held-out documents, with and without the adapters.

Perplexity is exp(total negative log-likelihood / total predicted tokens); padding and the first token are not counted. Bits per
character is the same total in bits, divided by the characters of the documents. It can compare bases with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch, loaded_tasks
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.model import BoRA, Weights


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

    def perplexity(self, task: int | None = None) -> float | None:
        """Perplexity over all documents, or over those of one task; None if there is no document."""
        chosen = self._of(task)
        tokens = int(self.tokens[chosen].sum())
        # cut at exp(700): a float overflows a little beyond it
        return math.exp(min(-float(self.log_likelihood[chosen].sum()) / tokens, 700.0)) if tokens else None

    def bits_per_character(self, task: int | None = None) -> float | None:
        """Bits per character over all documents, or over those of one task; None if there is no document."""
        chosen = self._of(task)
        characters = int(self.characters[chosen].sum())
        return -float(self.log_likelihood[chosen].sum()) / math.log(2) / characters if characters else None

    def _of(self, task: int | None) -> Tensor:
        return torch.ones_like(self.task, dtype=torch.bool) if task is None else self.task == task


@torch.inference_mode()
def evaluate(
    model: BoRA,
    split: TokenSplit,
    *adapters: Weights | Callable[[Tensor], Weights] | None,
    token_budget: int = 8192,
    documents: Tensor | None = None,
    lockstep: Callable[[Iterable[Batch]], Iterable[Batch | None]] = iter,
) -> list[Scores]:
    """Score a split under several sets of adapters in one pass over it.

        >>> import bora_pyro as bp
        >>> from bora_pyro.data import TokenSplit
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}  # adapters that change nothing
        >>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> base, adapted = evaluate(model, split, None, theta)
        >>> base.perplexity() == adapted.perplexity(), base.tokens.tolist()
        (True, [2, 1])

    Args:
        model: the BoRA model.
        split: the documents.
        adapters: one entry for each result: the weights of all tasks, (D, layers, *shape) by name; or a function that returns
            the weights of given tasks, (n,) in ascending order; or None for the base alone.
        token_budget: tokens of a batch, padding included.
        documents: positions of the documents to score; the others count as documents without tokens. Default: all.
        lockstep: ``Processes.lockstep``, if several processes hold parts of the base.

    Returns:
        One :class:`Scores` for each of ``adapters``.
    """
    log_likelihood = [torch.zeros(len(split), dtype=torch.float64) for _ in adapters]
    tokens = torch.zeros(len(split), dtype=torch.int64)
    for batch in lockstep(split.batches(token_budget=token_budget, documents=documents)):
        if batch is None:
            for _ in adapters:
                model.backbone.dummy_pass()
            continue
        on_device = batch.to(model.backbone.device)
        tokens[batch.index] = (batch.labels[:, 1:] != IGNORED).sum(-1)
        every = torch.arange(model.num_tasks, device=on_device.task.device) if model.router.reads_all_tasks else None
        drawn = replace(on_device, tasks=loaded_tasks(on_device.task.unique() if every is None else every))
        for result, weights in zip(log_likelihood, adapters, strict=True):
            if callable(weights):
                assert drawn.tasks is not None
                score = model.likelihood.score(model, weights(drawn.tasks.index), drawn)
            else:
                score = model.likelihood.score(model, weights, on_device)
            result[batch.index] = score.double().cpu()
    return [Scores(result, tokens, split.characters, split.task) for result in log_likelihood]
