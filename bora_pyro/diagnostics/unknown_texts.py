"""Texts that may belong to no task: each is read by the task that knows it best, and scored by how foreign it still is.

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

#: What is higher for a foreign text, if all is well, by the name of its column in `text_scores`.
SCORES = {
    "epistemic": "mean epistemic uncertainty of a token (nats)",
    "total": "mean total uncertainty of a token (nats)",
    "perplexity": "perplexity under the adapters",
    "perplexity_ratio": "perplexity, adapters / base",
}


def sample_texts(split: TokenSplit, number: int, *, seed: int = 0) -> TokenSplit:
    """At most so many documents of a split, drawn by the seed, in the order of the split.

        >>> split = TokenSplit.from_documents([[0, 5], [0, 6], [0, 7]], task=[0, 1, 1], num_tasks=2)
        >>> sample_texts(split, 2)
        TokenSplit(2 documents, 2 predicted tokens, 2 tasks)

    Raises:
        InputError: `number` is below 1.
    """
    if number < 1:
        raise InputError(f"number of texts is {number}; give a whole number from 1 up")
    return split.subset(torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(split))[:number])))


def best_task(model: BoRA, split: TokenSplit, theta: Weights, *, token_budget: int = 8192) -> Tensor:
    """The task under whose adapter each text has the highest likelihood, whatever task it is said to be of: (documents,).

    It costs one pass over the texts for each task.

    Args:
        model: the BoRA model.
        split: the texts.
        theta: θ of all tasks, (D, layers, *shape) by name.
        token_budget: tokens of a batch, padding included.
    """
    best, task = torch.full((len(split),), -torch.inf, dtype=torch.float64), torch.zeros(len(split), dtype=torch.int64)
    for d in range(model.num_tasks):
        (scores,) = evaluate(model, split.replace(task=torch.full_like(task, d)), theta, token_budget=token_budget)
        better = scores.log_likelihood > best
        best, task = torch.where(better, scores.log_likelihood, best), torch.where(better, d, task)
    return task


def text_scores(model: BoRA, split: TokenSplit, centre: Weights, draws: Draws, *, token_budget: int = 4096) -> pd.DataFrame:
    """How foreign each text is to the tasks, by the measures of :data:`SCORES`.

    A foreign text has no task, so none is asked of any text: foreign ones and the tasks' own alike are read by the task whose
    adapter, at the centre of the posterior, gives them the highest likelihood. To tell own texts by their own task and foreign
    ones by the best of all would favour the foreign. The draws are then taken of that one task, so that the cost is D + K + 1
    passes over the texts and not D x K. Against the question "is it of this very task?" the scores say nothing.

    Args:
        model: the BoRA model.
        split: the texts; their tasks are not looked at.
        centre: θ of all tasks by which the task is chosen, (D, layers, *shape) by name.
        draws: as for `bora_pyro.predict.mixture.predictive`; those of a point estimate are the estimate itself.
        token_budget: tokens of a batch, padding included.

    Returns:
        A row a text: task (the index of the best), tokens (predicted ones), the columns of :data:`SCORES`, base_perplexity.
        Perplexities are of the mixture of draws, exp of the mean of −log p over the tokens.

    Raises:
        InputError: there are no texts or no draws.
    """
    task = best_task(model, split, centre, token_budget=token_budget)
    predictions = predictive(model, split.replace(task=task), draws, token_budget=token_budget)
    (base,) = evaluate(model, split, None, token_budget=token_budget)
    tokens = torch.bincount(predictions.document, minlength=len(split)).double()

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(len(split), dtype=torch.float64).index_add_(0, predictions.document, values.double()) / tokens

    of_mixture, of_base = -mean(predictions.log_prob), -base.log_likelihood / tokens
    columns = {
        "task": task,
        "tokens": tokens.long(),
        "epistemic": mean(predictions.epistemic),
        "total": mean(predictions.total),
        "perplexity": of_mixture.exp(),
        "perplexity_ratio": (of_mixture - of_base).exp(),
        "base_perplexity": of_base.exp(),
    }
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def auroc_by_score(own: pd.DataFrame, foreign: pd.DataFrame) -> pd.Series:
    """How well each measure tells foreign texts from own ones: `bora_pyro.diagnostics.calibration.foreign_auroc` by the name of
    the score.

        >>> own = pd.DataFrame({"total": [1.0, 2.0], "perplexity": [3.0, 5.0]})
        >>> auroc_by_score(own, pd.DataFrame({"total": [3.0, 4.0], "perplexity": [4.0, 4.0]})).to_dict()
        {'total': 1.0, 'perplexity': 0.5}

    Args:
        own: the tasks' own texts, as of `text_scores`.
        foreign: texts of none.
    """
    names = [name for name in SCORES if name in own]
    return pd.Series({name: foreign_auroc(own[name].to_numpy(), foreign[name].to_numpy()) for name in names}, name="auroc")
