"""What a mixture of draws says of every token: probabilities, and how unsure it is of them.

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

#: Makes the draws anew each time it is called, so that no more than one need be held: θ of all tasks by name, or None for the
#: base alone.
Draws = Callable[[], Iterable[Weights | None]]


@dataclass(frozen=True)
class TokenPredictions:
    """What one model, or a mixture of K draws, says of every predicted token of a split, in the order of its documents.

    The probability of a token is the mean over the draws of theirs, given the observed tokens before it.

    Attributes:
        document: (tokens,) int64, index of the token's document in the split.
        task: (tokens,) int64, index of its task.
        label: (tokens,) int64, the token.
        log_prob: (tokens,) log of the mixture's probability of the label, in nats.
        confidence: (tokens,) the mixture's highest probability.
        correct: (tokens,) bool, whether the most probable token is the label.
        brier: (tokens,) Σ_v (p_v − 1[v = label])² over the vocabulary (Brier, 1950).
        total: (tokens,) entropy of the mixture, in nats.
        aleatoric: (tokens,) mean entropy of the draws, in nats: what remains unsure when the weights are known.
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
        """exp of the mean −log_prob, over all tokens or those of one task; None where there is none."""
        chosen = self.log_prob if task is None else self.log_prob[self.task == task]
        return math.exp(min(-float(chosen.double().mean()), 700.0)) if len(chosen) else None

    def log_predictive(self) -> Tensor:
        """(documents,) log of the mean over draws of p(document | draw): the predictive density of whole documents.

        It is at most what ``log_prob`` sums to where the draws differ little; the draws that a document's beginning speaks for
        count more for its end.
        """
        return self.log_likelihood.logsumexp(0) - math.log(len(self.log_likelihood))


@torch.inference_mode()
def predictive(model: BoRA, split: TokenSplit, draws: Draws, *, token_budget: int = 4096) -> TokenPredictions:
    """Predict a split under a mixture of draws, holding one draw and one batch's probabilities at a time.

    Args:
        model: the BoRA model.
        split: the documents.
        draws: gives the draws, the same ones each time; it is called for each batch.
        token_budget: tokens of a batch, padding included; probabilities take token_budget x vocabulary numbers.

    Raises:
        InputError: there is no draw.
    """
    parts, order, likelihoods = [], [], []
    for batch in split.batches(token_budget=token_budget):
        tokens, log_likelihood = _of_batch(model, batch.to(model.backbone.device), draws)
        tokens["document"] = batch.index[tokens["document"]]
        parts.append(tokens)
        order.append(batch.index)
        likelihoods.append(log_likelihood)
    if not parts:
        raise InputError("there are no documents to predict; give a split that has some")
    merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # the batches hold documents of like length: back into the order of the split
    sort = torch.argsort(merged["document"], stable=True)
    by_document = torch.argsort(torch.cat(order))
    merged = {name: value[sort] for name, value in merged.items()}
    return TokenPredictions(
        **merged, task=split.task[merged["document"]], log_likelihood=torch.cat(likelihoods, 1)[:, by_document]
    )


def _of_batch(model: BoRA, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], Tensor]:
    """The fields of `TokenPredictions` for one batch, documents numbered within it, and log p(document | draw)."""
    predicted = batch.labels[:, 1:] != IGNORED
    row, label = predicted.nonzero()[:, 0], batch.labels[:, 1:][predicted]
    mean: Tensor | None = None
    aleatoric, log_likelihood = torch.zeros(len(label), device=label.device), []
    for weights in draws():
        log_p = model.logits(batch, weights)[:, :-1][predicted].float().log_softmax(-1)
        of_label = log_p.gather(1, label[:, None])[:, 0].double()
        log_likelihood.append(torch.zeros(len(batch.task), dtype=torch.float64, device=label.device).index_add_(0, row, of_label))
        p = log_p.exp()
        aleatoric += _entropy(p, log_p)
        mean = p if mean is None else mean.add_(p)
    if mean is None:
        raise InputError("0 draws given; a prediction needs 1 or more")
    k = len(log_likelihood)
    mean, aleatoric = mean / k, aleatoric / k
    confidence, best = mean.max(1)
    of_label = mean.gather(1, label[:, None])[:, 0]
    # of one draw the two entropies are the same number, not two roundings of it
    total = aleatoric if k == 1 else _entropy(mean, mean.log())
    tokens = {
        "document": row,
        "label": label,
        "log_prob": of_label.log() if k > 1 else log_p.gather(1, label[:, None])[:, 0],
        "confidence": confidence,
        "correct": best == label,
        "brier": 1 - 2 * of_label + mean.square().sum(1),
        "total": total,
        "aleatoric": aleatoric,
    }
    return {name: value.cpu() for name, value in tokens.items()}, torch.stack(log_likelihood).cpu()


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    # a probability that has become 0 adds nothing, though its logarithm is −∞
    return -torch.where(p > 0, p * log_p, 0.0).sum(1)
