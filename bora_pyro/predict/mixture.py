"""Predictions of a mixture of draws for every token of a split: probabilities and uncertainties.

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
>>> predictions = predictive(model, split, lambda: [None])  # the base alone
>>> predictions.label.tolist(), predictions.document.tolist(), predictions.epistemic.tolist()
([5, 6, 7], [0, 0, 1], [0.0, 0.0, 0.0])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights

#: A function that returns the same draws each time it is called, so that only one draw need be in memory at a time. A draw is θ
#: of all tasks, (D, layers, *shape) by name of the latent, or None for the base alone.
Draws = Callable[[], Iterable[Weights | None]]


@dataclass(frozen=True)
class TokenPredictions:
    """Predictions of one model, or of a mixture of K draws, for every predicted token of a split, in the order of its documents.

    The probability of a token under the mixture is the mean of its probabilities under the draws, given the tokens before it.

    Attributes:
        document: (tokens,) int64, index of the token's row in the split: a document, or a piece of a long one.
        task: (tokens,) int64, index of the document's task.
        label: (tokens,) int64, id of the observed token.
        log_prob: (tokens,) log-probability of the label under the mixture, in nats.
        confidence: (tokens,) the mixture's highest probability.
        correct: (tokens,) bool, whether the most probable token is the label.
        brier: (tokens,) Σ_v (p_v − 1[v = label])² over the vocabulary (Brier, 1950).
        total: (tokens,) entropy of the mixture, in nats.
        aleatoric: (tokens,) mean entropy of the draws, in nats: the uncertainty that remains if the weights are known.
        log_likelihood: (draws, documents) float64, log p(document | draw), in nats.
    """

    document: Tensor
    task: Tensor
    label: Tensor
    log_prob: Tensor
    confidence: Tensor
    correct: Tensor
    brier: Tensor
    total: Tensor
    aleatoric: Tensor
    log_likelihood: Tensor

    @property
    def epistemic(self) -> Tensor:
        """(tokens,) total − aleatoric: the mutual information of token and weights (Depeweg et al., 2018), 0 for one draw."""
        return self.total - self.aleatoric

    def perplexity(self, task: int | None = None) -> float | None:
        """exp of the mean of −log_prob over all tokens, or over those of one task; None if there are no tokens."""
        chosen = self.log_prob if task is None else self.log_prob[self.task == task]
        return math.exp(min(-float(chosen.double().mean()), 700.0)) if len(chosen) else None

    def numbers(self, task: int | None = None) -> dict[str, float | None]:
        """The perplexity, by name, over all tokens or over those of one task."""
        return {"perplexity": self.perplexity(task)}

    def log_predictive(self) -> Tensor:
        """(documents,) log of the mean over draws of p(document | draw): the predictive density of whole documents.

        It differs from the sum of ``log_prob`` over the document: here a draw that predicts the beginning of a document well
        has a larger weight for the rest of it.
        """
        return self.log_likelihood.logsumexp(0) - math.log(len(self.log_likelihood))


@torch.inference_mode()
def predictive(model: BoRA, split: TokenSplit, draws: Draws, *, token_budget: int = 4096) -> TokenPredictions:
    """Predict a split under a mixture of draws, with one draw and one batch in memory at a time.

    Args:
        model: the BoRA model.
        split: the documents.
        draws: returns the draws, the same ones each time. It is called once per batch.
        token_budget: tokens of a batch, padding included. The probabilities of a batch are token_budget x vocabulary numbers.

    Raises:
        InputError: if there is no document or no draw, or the documents are questions with options.
    """
    if split.correct is not None and len(split):
        raise InputError(f"{split!r} has answers among options, not documents to predict; use bora_pyro.predict.answers")
    parts, order, likelihoods = [], [], []
    for batch in split.batches(token_budget=token_budget):
        tokens, log_likelihood = _predict_batch(model, batch.to(model.backbone.device), draws)
        tokens["document"] = batch.index[tokens["document"]]
        parts.append(tokens)
        order.append(batch.index)
        likelihoods.append(log_likelihood)
    if not parts:
        raise InputError("there are no documents to predict; give a split that has some")
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # batches are sorted by length: restore the order of the split
    sort = torch.argsort(merged["document"], stable=True)
    by_document = torch.argsort(torch.cat(order))
    merged = {name: value[sort] for name, value in merged.items()}
    return TokenPredictions(
        **merged,
        task=split.task[merged["document"]],
        log_likelihood=split.sum_by_document(torch.cat(likelihoods, 1)[:, by_document].mT).mT,
    )


def _predict_batch(model: BoRA, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], Tensor]:
    """The fields of `TokenPredictions` for one batch, with documents numbered within the batch, and log p(document | draw)."""
    predicted = batch.labels[:, 1:] != IGNORED
    row, label = predicted.nonzero()[:, 0], batch.labels[:, 1:][predicted]
    mean: Tensor | None = None
    aleatoric, log_likelihood = torch.zeros(len(label), device=label.device), []
    for weights in draws():
        log_p = model.logits(batch, weights)[:, :-1][predicted].float().log_softmax(-1)
        label_log_p = log_p.gather(1, label[:, None])[:, 0].double()
        documents = torch.zeros(len(batch.task), dtype=torch.float64, device=label.device)
        log_likelihood.append(documents.index_add_(0, row, label_log_p))
        p = log_p.exp()
        aleatoric += _entropy(p, log_p)
        mean = p if mean is None else mean.add_(p)
    if mean is None:
        raise InputError("0 draws given; a prediction needs 1 or more")
    k = len(log_likelihood)
    mean, aleatoric = mean / k, aleatoric / k
    confidence, best = mean.max(1)
    label_p = mean.gather(1, label[:, None])[:, 0]
    # with one draw both entropies are equal; computing them separately would add rounding errors
    total = aleatoric if k == 1 else _entropy(mean, mean.log())
    tokens = {
        "document": row,
        "label": label,
        "log_prob": label_p.log() if k > 1 else log_p.gather(1, label[:, None])[:, 0],
        "confidence": confidence,
        "correct": best == label,
        "brier": 1 - 2 * label_p + mean.square().sum(1),
        "total": total,
        "aleatoric": aleatoric,
    }
    return {name: value.cpu() for name, value in tokens.items()}, torch.stack(log_likelihood).cpu()


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    # a probability of 0 contributes 0, although its logarithm is −∞
    return -torch.where(p > 0, p * log_p, 0.0).sum(1)
