"""Checks of a state of a fit after each epoch: how well it predicts validation documents, and whether a draw is finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.processes import Processes
from bora_pyro.model import BoRA, Weights


def validation_score(
    model: BoRA,
    split: TokenSplit,
    adapters: Weights | Callable[[Tensor], Weights],
    documents: Sequence[Tensor | None],
    processes: Processes,
) -> float | None:
    """The likelihood's measure (perplexity) of the validation documents of all processes.

    Args:
        model: the BoRA model.
        split: the validation documents.
        adapters: the adapters of the tasks of this process, in the form that `evaluate` takes.
        documents: the documents that count, for each part of the tasks of this process; None: all.
        processes: the processes of the fit.

    Returns:
        The measure; None if there are no documents.
    """
    if not split.num_tokens:
        return None
    if processes.size == 1:
        rows = None if documents[0] is None else torch.cat([part for part in documents if part is not None])
        if rows is None or len(rows) == len(split):
            (scores,) = evaluate(model, split, adapters)
        else:
            (scores,) = evaluate(model, split, adapters, documents=rows)
        return scores.value()
    (scores,) = evaluate(model, split, adapters, documents=documents[0], lockstep=processes.lockstep)
    return scores.measure.of(*processes.all_reduce(scores.sums()).tolist())


@torch.no_grad()
def draw_is_finite(model: BoRA, guide: AutoGuide, document: Batch, processes: Processes, *, seed: int) -> bool:
    """Whether the logits of a short document are finite under a draw of the guide, in all processes.

    Args:
        model: the BoRA model.
        guide: the guide, with the rows of the document's task.
        document: the document.
        processes: the processes of the fit.
        seed: seed of the draw.
    """
    with poutine.seed(rng_seed=seed):
        theta, _ = model.weights_given(guide(document), document.tasks)
    finite = model.logits(document, theta).isfinite().all()
    return not processes.all_reduce((~finite).float().reshape(1).cpu()).any()
