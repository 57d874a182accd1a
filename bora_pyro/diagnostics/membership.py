"""Membership inference: can one see from the adapters whether a document was trained on?

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}  # adapters that change nothing
>>> trained = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
>>> others = TokenSplit.from_documents([[0, 9, 8]], task=[1], num_tasks=2)
>>> membership_auroc(membership_scores(model, trained, theta), membership_scores(model, others, theta))
0.5
"""

from __future__ import annotations

from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.diagnostics.calibration import foreign_auroc
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA, Weights


def membership_scores(model: BoRA, split: TokenSplit, theta: Weights) -> Tensor:
    """How much better each document is predicted by the adapter of its task than by the base: (documents,) nats a token.

    The score is (log p(w_n | θ_d) − log p(w_n)) / tokens of w_n. A document that was trained on has a higher one, the more so
    the more the adapter has learned it by heart (Yeom et al., 2018, arXiv 1709.01604; with the base as the reference model,
    Carlini et al., 2021, arXiv 2012.07805). The pieces of a long document are one document.

    Args:
        model: the BoRA model.
        split: the documents.
        theta: θ of all tasks, (D, layers, *shape) by latent.

    Raises:
        InputError: the documents are questions with options.
    """
    if split.correct is not None:
        raise InputError("the documents are questions with options, whose membership is not scored; give documents of text")
    base, adapted = (split.sum_by_document(scores.log_likelihood) for scores in evaluate(model, split, None, theta))
    return (adapted - base) / split.sum_by_document(split.predicted)


def membership_auroc(trained: Tensor, others: Tensor) -> float:
    """The area under the ROC curve of the attack: 0.5 means that it only guesses, 1 that it is always right.

        >>> import torch
        >>> membership_auroc(torch.tensor([0.3, 0.5]), torch.tensor([0.1, 0.4]))
        0.75

    It is the probability that a document that was trained on has a higher score than one that was not; a tie counts a half.

    Args:
        trained: `membership_scores` of training documents.
        others: those of documents that were held out.

    Raises:
        InputError: one of them is empty, or a score is NaN.
    """
    return foreign_auroc(own=others, foreign=trained)
