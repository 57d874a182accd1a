"""Scores that tell texts of no task (out of distribution) from the tasks' own texts.

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 1], num_tasks=2)
>>> scores = text_scores(model, split, theta, lambda: [theta])
>>> scores["tokens"].tolist(), scores["perplexity_ratio"].round(4).tolist()  # adapters that change nothing
([2, 1], [1.0, 1.0])
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.diagnostics.calibration import foreign_auroc
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.mixture import Draws, predictive

#: The scores, by their column in `text_scores`. Each should be higher for a foreign text, which belongs to no task.
SCORES = {
    "epistemic": "mean epistemic uncertainty of a token (nats)",
    "total": "mean total uncertainty of a token (nats)",
    "perplexity": "perplexity under the adapters",
    "perplexity_ratio": "perplexity, adapters / base",
}


def sample_texts(split: TokenSplit, number: int, *, seed: int = 0) -> TokenSplit:
    """Draw at most ``number`` documents of a split at random; they keep the order of the split.

    Of a document that was split into pieces, the first piece is taken: the text as it is cut elsewhere.

        >>> split = TokenSplit.from_documents([[0, 5], [0, 6], [0, 7]], task=[0, 1, 1], num_tasks=2)
        >>> sample_texts(split, 2)
        TokenSplit(2 documents, 2 predicted tokens, 2 tasks)

    Args:
        split: the documents.
        number: the largest number of documents to draw.
        seed: seed of the draw.

    Raises:
        InputError: if `number` is below 1.
    """
    if number < 1:
        raise InputError(f"number of texts is {number}; give a whole number from 1 up")
    chosen = np.sort(np.random.default_rng(seed).permutation(split.num_documents)[:number])
    return split.subset(split.first_pieces[torch.from_numpy(chosen)].sort().values)


def best_task(model: BoRA, split: TokenSplit, theta: Weights, *, token_budget: int = 8192) -> Tensor:
    """The task whose adapter gives each text the highest likelihood: (documents,).

    The cost is one pass over the texts per task.

    Args:
        model: the BoRA model.
        split: the texts; their tasks are ignored.
        theta: θ of all tasks, (D, layers, *shape) by name of the latent.
        token_budget: tokens of a batch, padding included.
    """
    best, task = torch.full((len(split),), -torch.inf, dtype=torch.float64), torch.zeros(len(split), dtype=torch.int64)
    for d in range(model.num_tasks):
        (scores,) = evaluate(model, split.replace(task=torch.full_like(task, d)), theta, token_budget=token_budget)
        better = scores.log_likelihood > best
        best, task = torch.where(better, scores.log_likelihood, best), torch.where(better, d, task)
    return task


def text_scores(model: BoRA, split: TokenSplit, centre: Weights, draws: Draws, *, token_budget: int = 4096) -> pd.DataFrame:
    """Score how foreign each text is to all tasks, by the measures of :data:`SCORES`.

    A foreign text has no task. Every text, foreign or not, is therefore scored under the task whose adapter, at the centre of the
    posterior, gives it the highest likelihood. If own texts were scored under their true task instead, the two kinds would be
    treated differently and could not be compared. Only that one task is scored with the draws: the cost is D + K + 1 passes over
    the texts for D tasks and K draws, not D x K. The scores do not say whether a text belongs to one particular task.

    Args:
        model: the BoRA model.
        split: the texts; their tasks are ignored.
        centre: θ of all tasks, by which the best task is chosen, (D, layers, *shape) by name of the latent.
        draws: as for `bora_pyro.predict.mixture.predictive`. For a point estimate, give the estimate as the only draw.
        token_budget: tokens of a batch, padding included.

    Returns:
        One row per text: task (the index of the best task), tokens (the number of predicted tokens), the columns of
        :data:`SCORES`, base_perplexity. The perplexity of the mixture of draws is exp of the mean of −log p over the tokens.

    Raises:
        InputError: if there are no texts or no draws.
    """
    task = best_task(model, split, centre, token_budget=token_budget)
    predictions = predictive(model, split.replace(task=task, document_index=None), draws, token_budget=token_budget)
    (base,) = evaluate(model, split, None, token_budget=token_budget)
    tokens = torch.bincount(predictions.document, minlength=len(split)).double()

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(len(split), dtype=torch.float64).index_add_(0, predictions.document, values.double()) / tokens

    mixture_nll, base_nll = -mean(predictions.log_prob), -base.log_likelihood / tokens
    columns = {
        "task": task,
        "tokens": tokens.long(),
        "epistemic": mean(predictions.epistemic),
        "total": mean(predictions.total),
        "perplexity": mixture_nll.exp(),
        "perplexity_ratio": (mixture_nll - base_nll).exp(),
        "base_perplexity": base_nll.exp(),
    }
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def auroc_by_score(own: pd.DataFrame, foreign: pd.DataFrame) -> pd.Series:
    """The area under the ROC curve of each score, `bora_pyro.diagnostics.calibration.foreign_auroc`, by name of the score.

        >>> own = pd.DataFrame({"total": [1.0, 2.0], "perplexity": [3.0, 5.0]})
        >>> auroc_by_score(own, pd.DataFrame({"total": [3.0, 4.0], "perplexity": [4.0, 4.0]})).to_dict()
        {'total': 1.0, 'perplexity': 0.5}

    Args:
        own: the scores of the tasks' own texts, from `text_scores`.
        foreign: the scores of texts that belong to no task, from `text_scores`.
    """
    names = [name for name in SCORES if name in own]
    return pd.Series({name: foreign_auroc(own[name].to_numpy(), foreign[name].to_numpy()) for name in names}, name="auroc")
