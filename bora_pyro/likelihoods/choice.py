"""Of each question the answer is observed: one of its options.

>>> Choice()
Choice(option_score='mean')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical
from torch import Tensor

from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import Batch
from bora_pyro.data.shared_prompts import SharedPrompts
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_one_of
from bora_pyro.likelihoods.base import LanguageModel, Likelihood
from bora_pyro.likelihoods.distribution import NextTokens
from bora_pyro.likelihoods.measure import QUESTION_NLL, Measure
from bora_pyro.likelihoods.scores import Scores

#: The scores of an option.
OPTION_SCORES = ("mean", "sum")


class Choice(Likelihood):
    """The answer of each question is observed among its options: Π_d Π_n p(answer_{d,n} | prompt_{d,n}; θ_d), with

        log p(answer | prompt) = s(answer) − log Σ_options exp s(option).

    This is the conditional logit model (McFadden, 1974). The score s of an option is made of the log-probabilities of its tokens,
    given the prompt and the option's tokens before them; the end token is one of them, if the tokenizer has one.

        >>> import torch
        >>> from pyro import poutine
        >>> rows, right = [[0, 1, 1], [0, 1, 0, 1]], [True, False]  # a prompt of one token, options of one and of two tokens
        >>> more = {"read": [2, 2], "document_index": [0, 0], "correct": right}
        >>> batch = TokenSplit.from_documents(rows, task=[0, 0], num_tasks=2, **more).batches()[0]
        >>> class Coin:  # two tokens, equally probable
        ...     def lazy_logits(self, batch, weights):
        ...         return torch.zeros(2, 4, 2)
        >>> for score in OPTION_SCORES:
        ...     trace = poutine.trace(Choice(score)).get_trace(Coin(), None, batch)
        ...     print(score, round(float(trace.log_prob_sum().exp()), 4))
        mean 0.5
        sum 0.6667

    Args:
        option_score: ``mean`` is the mean of the log-probabilities, so that long options have no disadvantage (Brown et al.,
            2020). ``sum`` adds them up. Then p(answer | prompt) is the language model's own probability of the answer, given
            that it is one of the options.
        task_weights: (D,) float32 above 0: the factor of each task's log-likelihood; None: 1 for all.

    Raises:
        InputError: the score is unknown, or a weight is not a finite number above 0.
    """

    measure: ClassVar[Measure] = QUESTION_NLL
    reads_options: ClassVar[bool] = True

    def __init__(self, option_score: str = "mean", *, task_weights: Tensor | None = None) -> None:
        check_one_of("option_score", option_score, OPTION_SCORES)
        self.option_score = option_score
        self.task_weights = self.with_task_weights(task_weights).task_weights

    def __call__(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> None:
        self.check(batch)
        assert batch.question is not None
        assert batch.correct is not None
        first = batch.first_rows
        scores = by_question(self.score(model, weights, batch), batch.question)
        scale = batch.scale if self.task_weights is None else batch.scale * self.task_weight(batch.task[first])
        with pyro.plate("questions", len(first), dim=-1), poutine.scale(scale=scale):
            # NaN scores are allowed: they give a NaN loss, and the loop reports that in one line
            observed = Categorical(logits=scores, validate_args=False)
            pyro.sample("answer", observed, obs=batch.correct.nonzero()[:, 0] - first)

    def observations(self, documents: float, tokens: float) -> float:
        return documents

    def observations_of(self, rows: Batch | TokenSplit) -> float:
        self.check(rows)
        return float(self.task_weight(rows.task).double()[rows.correct].sum()) if len(rows.task) else 0.0

    def score(self, model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor:
        """The score of each option, (rows,)."""
        return NextTokens(_logits(model, weights, batch), per_token=self.option_score == "mean").log_prob(batch.labels)

    def scores(self, split: TokenSplit, log_likelihood: Tensor, tokens: Tensor) -> Scores:
        scored = tokens > 0
        log_p = options = log_likelihood.new_zeros((0, 0))
        task, label, result = split.task[:0], split.task[:0], torch.zeros_like(log_likelihood)
        if bool(scored.any()):
            assert split.correct is not None
            question = split.document_of[scored].unique(return_inverse=True)[1]
            log_p = by_question(log_likelihood[scored], question).log_softmax(-1)
            whole = log_likelihood * tokens if self.option_score == "mean" else log_likelihood
            options = by_question(whole[scored], question)
            right = split.correct[scored]
            order = question[right].argsort()
            label = places(question)[right][order]
            rows = scored.nonzero()[:, 0][right][order]
            result[rows] = log_p.gather(1, label[:, None])[:, 0]
            task = split.task[rows]
        more = {"log_p": log_p, "options": options, "label": label, "question_task": task}
        return AnswerScores(result, tokens, split.characters, split.task, **more)

    def __repr__(self) -> str:
        return f"Choice(option_score={self.option_score!r}{self._weights_text()})"


def _logits(model: LanguageModel, weights: dict[str, Tensor] | None, batch: Batch) -> Tensor | LazyLogits:
    """The logits of each option; the model reads a prompt once for all its options, if it can."""
    # a model without the attribute, such as one of a test, reads each row by itself
    longest = getattr(model, "longest_shared", 0)
    shared = SharedPrompts.of(batch, longest=longest) if longest else None
    if shared is None:
        return model.lazy_logits(batch, weights)
    logits = model.lazy_logits(shared.batch, weights)
    if isinstance(logits, LazyLogits):
        return LazyLogits(shared.unpacked(logits.states), logits.head)
    return shared.unpacked(logits)


@dataclass(frozen=True)
class AnswerScores(Scores):
    """Probabilities of the options of the questions of one split.

        >>> import torch
        >>> rows, task = [[0, 4, 5], [0, 4, 6], [0, 7, 6], [0, 7, 8]], [0, 0, 1, 1]
        >>> more = {"read": [2] * 4, "document_index": [0, 0, 1, 1], "correct": [True, False, True, False]}
        >>> split = TokenSplit.from_documents(rows, task=task, num_tasks=2, **more)
        >>> option_scores = torch.tensor([0.75, 0.25, 0.1, 0.4], dtype=torch.float64).log()
        >>> found = Choice().scores(split, option_scores, split.predicted)
        >>> found.log_p.exp().round(decimals=4).tolist(), found.accuracy(), round(found.nll(task=0), 4)
        ([[0.75, 0.25], [0.2, 0.8]], 0.5, 0.2877)

    Attributes:
        log_likelihood: (rows,) float64: log p(answer | prompt) at the row of the right option, 0 at the others.
        tokens, characters, task: of each row, as for :class:`Scores`.
        log_p: (questions, options) float64: the log-probability of each option, −∞ where a question has fewer.
        options: (questions, options) float64: log p(option | prompt) in nats, the sum over its tokens, −∞ where there are fewer.
            Of :class:`~bora_pyro.likelihoods.dpo.DPO` it is the reward r.
        label: (questions,) index of the right option.
        question_task: (questions,) index of each question's task.
    """

    log_p: Tensor
    options: Tensor
    label: Tensor
    question_task: Tensor

    measure: ClassVar[Measure] = QUESTION_NLL

    def nll(self, task: int | None = None) -> float | None:
        """−log p(answer | prompt) in nats, the mean over all questions or over those of one task; None if there is none."""
        return QUESTION_NLL.of(float(self._right(task).sum()), len(self._right(task)))

    def accuracy(self, task: int | None = None) -> float | None:
        """The share of questions whose most probable option is the right one; None if there are no questions.

        If k options are equally probable, and the right one is among them, the question counts as 1/k.
        """
        if not len(self.label):
            return None
        first = self.log_p == self.log_p.max(-1, keepdim=True).values
        found = (first.gather(1, self.label[:, None])[:, 0] / first.sum(-1))[self._chosen(task)]
        return float(found.double().mean()) if len(found) else None

    def value(self, task: int | None = None) -> float | None:
        return self.nll(task)

    def sums(self) -> Tensor:
        right = self._right(None)
        return torch.stack([right.sum(), torch.tensor(float(len(right)), dtype=torch.float64)])

    def numbers(self, task: int | None = None) -> dict[str, float | None]:
        return {"nll": self.nll(task), "accuracy": self.accuracy(task)}

    def perplexity(self, task: int | None = None) -> float | None:
        """Not defined.

        Raises:
            InputError: always.
        """
        raise InputError("answers among options have no perplexity; their measure is the NLL a question (nll)")

    def bits_per_character(self, task: int | None = None) -> float | None:
        """Not defined.

        Raises:
            InputError: always.
        """
        raise InputError("answers among options have no bits per character; their measure is the NLL a question (nll)")

    def _chosen(self, task: int | None) -> Tensor:
        return torch.ones_like(self.label, dtype=torch.bool) if task is None else self.question_task == task

    def _right(self, task: int | None) -> Tensor:
        """The log-probability of each right option."""
        if not len(self.label):
            return self.log_p.new_zeros(0)
        return self.log_p.gather(1, self.label[:, None])[:, 0][self._chosen(task)]


def places(question: Tensor) -> Tensor:
    """(rows,) position of each row among the rows of its question.

    >>> places(torch.tensor([0, 1, 0, 1, 1])).tolist()
    [0, 0, 1, 1, 2]
    """
    order, counts = question.argsort(stable=True), torch.bincount(question)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(question), device=question.device) - first[question[order]]
    return torch.empty_like(place).index_copy_(0, order, place)


def by_question(values: Tensor, question: Tensor) -> Tensor:
    """(questions, options): the values of each question's rows, padded with −∞.

    >>> by_question(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1])).tolist()
    [[1.0, 2.0], [3.0, -inf]]

    Args:
        values: (rows,).
        question: (rows,) the number of each row's question, from 0, without gaps.
    """
    place = places(question)
    padding = values.new_full((int(question.max()) + 1, int(place.max()) + 1), -torch.inf)
    return padding.index_put((question, place), values)
