"""Answers to questions with options: the probability of each option under a mixture of draws of the tasks' adapters.

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> from bora_pyro.likelihoods import Choice
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2), likelihood=Choice())
>>> rows, right = [[0, 5, 6], [0, 5, 7]], [True, False]
>>> more = {"read": [2, 2], "document_index": [0, 0], "correct": right}
>>> split = TokenSplit.from_documents(rows, task=[1, 1], num_tasks=2, **more)
>>> predictions = answers(model, split, lambda: [None])  # the base alone
>>> predictions.probabilities.shape, predictions.task.tolist(), predictions.epistemic.tolist()
(torch.Size([1, 2]), [1], [0.0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import AnswerScores, Scores
from bora_pyro.model import BoRA
from bora_pyro.predict.mixture import Draws, TokenPredictions, predictive


@dataclass(frozen=True)
class ChoicePredictions:
    """Predictions of a mixture of K draws for several questions. They can be given to `bora_pyro.diagnostics.calibration`.

    Attributes:
        task: (questions,) int64, index of the question's task.
        label: (questions,) int64, index of the correct option.
        probabilities: (questions, options) float64, probability of each option under the mixture. Questions with fewer options
            than the others are padded with 0.
        answer: (questions,) int64, index of the most probable option.
        log_prob: (questions,) log-probability of the correct option, in nats.
        confidence: (questions,) the highest probability.
        correct: (questions,) bool, whether the most probable option is the correct one.
        brier: (questions,) Σ_o (p_o − 1[o = label])² over the options (Brier, 1950).
        total: (questions,) entropy of the mixture, in nats.
        aleatoric: (questions,) mean entropy of the draws, in nats.
        log_likelihood: (draws, questions, options) log p(option | prompt, task, draw), in nats, not divided by the option's
            number of tokens. Questions with fewer options than the others are padded with −∞.
    """

    task: Tensor
    label: Tensor
    probabilities: Tensor
    answer: Tensor
    log_prob: Tensor
    confidence: Tensor
    correct: Tensor
    brier: Tensor
    total: Tensor
    aleatoric: Tensor
    log_likelihood: Tensor

    @property
    def epistemic(self) -> Tensor:
        """(questions,) total − aleatoric: the mutual information of answer and weights (Depeweg et al., 2018)."""
        return self.total - self.aleatoric

    @classmethod
    def mixture(cls, log_p: Tensor, log_likelihood: Tensor, task: Tensor, label: Tensor) -> ChoicePredictions:
        """Predictions of the mixture of draws with the log-probabilities ``log_p``: (draws, questions, options)."""
        p = log_p.exp().mean(0)
        confidence, answer = p.max(-1)
        label_log_p = log_p[:, torch.arange(len(label)), label]  # (draws, questions)
        return cls(
            task=task,
            label=label,
            probabilities=p,
            answer=answer,
            log_prob=label_log_p.logsumexp(0) - math.log(len(log_p)),
            confidence=confidence,
            correct=answer == label,
            brier=1 - 2 * p.gather(1, label[:, None])[:, 0] + p.square().sum(-1),
            total=torch.special.entr(p).sum(-1),
            aleatoric=torch.special.entr(log_p.exp()).sum(-1).mean(0),
            log_likelihood=log_likelihood,
        )

    def numbers(self, task: int | None = None) -> dict[str, float | None]:
        """The NLL a question in nats and the accuracy, over all questions or over those of one task; None if there are none."""
        chosen = torch.ones_like(self.correct) if task is None else self.task == task
        if not bool(chosen.any()):
            return {"nll": None, "accuracy": None}
        return {"nll": -float(self.log_prob[chosen].mean()), "accuracy": float(self.correct[chosen].double().mean())}


@torch.inference_mode()
def answers(model: BoRA, split: TokenSplit, draws: Draws, *, token_budget: int = 4096) -> ChoicePredictions:
    """Predict the answers of a split under a mixture of draws, in the order of its questions.

    The probability of an option is the mean over the draws of its probability under the model's likelihood.

    Args:
        model: the BoRA model, whose likelihood observes answers among options.
        split: the questions.
        draws: returns the draws.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: the likelihood or the split has no options, or there is no question or no draw.
    """
    if split.correct is None or not model.likelihood.reads_options:
        raise InputError(f"{model.likelihood} and {split!r} are given; answers need questions with options and Choice()")
    found = [evaluate(model, split, weights, token_budget=token_budget)[0] for weights in draws()]
    if not found:
        raise InputError("0 draws given; an answer needs 1 or more")
    if not len(split):
        raise InputError("there are no questions to answer; give a split that has some")
    return of_scores(found)


def predictions(
    model: BoRA, split: TokenSplit, draws: Draws, *, token_budget: int = 4096
) -> TokenPredictions | ChoicePredictions:
    """Predict what the model's likelihood observes of a split: every answer, or every token."""
    predict = answers if model.likelihood.reads_options else predictive
    return predict(model, split, draws, token_budget=token_budget)


def of_scores(draws: Sequence[Scores]) -> ChoicePredictions:
    """Predictions of the mixture of draws, from the scores of each draw on the same questions."""
    scores = [of_draw for of_draw in draws if isinstance(of_draw, AnswerScores)]
    log_p, options = (torch.stack([getattr(of_draw, name) for of_draw in scores]) for name in ("log_p", "options"))
    return ChoicePredictions.mixture(log_p, options, scores[0].question_task, scores[0].label)
