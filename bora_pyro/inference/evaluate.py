"""How well the language model predicts held-out documents, with and without the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch, loaded_tasks
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.likelihoods import Scores
from bora_pyro.model import BoRA, Weights

__all__ = ["Scores", "evaluate"]


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
        One :class:`Scores` for each of ``adapters``, of the kind that the likelihood gives.

    Raises:
        InputError: the documents are not what the model's likelihood observes.
    """
    model.likelihood.check(split)
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
    return [model.likelihood.scores(split, result, tokens) for result in log_likelihood]
