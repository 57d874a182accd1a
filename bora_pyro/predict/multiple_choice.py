"""Questions with a choice among answers: how probable each answer is under a mixture of draws of the tasks' adapters.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> question = Question("import numpy as", (" pandas", " np"), correct=1, task="python")
>>> choices = choose(model, [question], [None], ["python", "networkx"])  # None: the base alone
>>> choices.answer.tolist(), choices.correct.tolist(), choices.confidence.item() > 0.9, choices.epistemic.tolist()
([1], [True], True, [0.0])
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.encode import encoder
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.model import BoRA, Weights

NORMALISE = ("tokens", "none")


@dataclass(frozen=True)
class Question:
    """A question with a choice among answers, one of them right.

        >>> Question("The sky is", (" blue.", " green."), correct=2, task="colours")
        Traceback (most recent call last):
        ...
        bora_pyro.errors.InputError: correct is 2 in the question 'The sky is'; its 2 options are numbered 0 to 1

    The text that the model reads is prompt + option, with nothing put between them. Let the space between two words begin the
    option, as most tokenizers have it, and not end the prompt.

    Attributes:
        prompt: what stands before the answer.
        options: two different answers or more.
        correct: position of the right one.
        task: name of the task whose adapter answers.

    Raises:
        InputError: prompt, task or an option is empty, there are fewer than two options, two are the same, or ``correct`` is
            none of their positions.
    """

    prompt: str
    options: tuple[str, ...]
    correct: int
    task: str

    def __post_init__(self) -> None:
        for name in ("prompt", "task"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise InputError(f"{name} of a question is {value!r}; give a text with one character or more")
        where = f"in the question {_short(self.prompt)!r}"
        if isinstance(self.options, str) or not all(isinstance(option, str) and option for option in self.options):
            raise InputError(f"options is {self.options!r} {where}; give a tuple of texts with one character or more each")
        object.__setattr__(self, "options", tuple(self.options))
        number = len(self.options)
        if number < 2 or len(set(self.options)) < number:
            raise InputError(
                f"{number} options, {len(set(self.options))} of them different, {where}; give 2 or more different ones"
            )
        if isinstance(self.correct, bool) or not isinstance(self.correct, int) or not 0 <= self.correct < number:
            raise InputError(f"correct is {self.correct!r} {where}; its {number} options are numbered 0 to {number - 1}")


@dataclass(frozen=True)
class ChoicePredictions:
    """What a mixture of K draws answers to each of some questions, for `bora_pyro.diagnostics.calibration` too.

    Attributes:
        task: (questions,) int64, index of the question's task.
        label: (questions,) int64, position of the right option.
        probabilities: (questions, options) float64, of each option under the mixture; 0 beyond a question's options.
        answer: (questions,) int64, position of the most probable option.
        log_prob: (questions,) log of the probability of the right option, in nats.
        confidence: (questions,) the highest probability.
        correct: (questions,) bool, the most probable option is the right one.
        brier: (questions,) Σ_o (p_o − 1[o = label])² over the options (Brier, 1950).
        total: (questions,) entropy of the mixture, in nats.
        aleatoric: (questions,) mean entropy of the draws, in nats.
        log_likelihood: (draws, questions, options) log p(option | prompt, task, draw), in nats, not divided by the option's
            number of tokens; −∞ beyond a question's options.
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


@torch.inference_mode()
def choose(
    model: BoRA,
    questions: Sequence[Question],
    draws: Iterable[Weights | None] | Callable[[], Iterable[Weights | None]],
    tasks: Sequence[str],
    *,
    normalise: str = "tokens",
    token_budget: int = 4096,
) -> ChoicePredictions:
    """Answer questions under a mixture of draws.

    The probability of an option is the mean over draws of softmax_o(log p(o | prompt, task, draw) / tokens of o). The text
    prompt + option is tokenised as documents are, without their end; the option's tokens are those behind the prompt's. Where
    the prompt's tokens do not begin those of the whole text, prompt and option are tokenised apart.

    Args:
        model: the BoRA model; its backbone has a tokenizer.
        questions: one or more.
        draws: weights of all tasks, (D, layers, *shape) by name, for each draw, or a function that gives them; None is the base
            alone. They are gone through once.
        tasks: names of the model's tasks, in their order.
        normalise: "tokens" divides an option's log-likelihood by its number of tokens, so that long options do not lose by
            their length; "none" takes it as it is.
        token_budget: tokens of a batch, padding included; each option is a row with its prompt.

    Raises:
        InputError: there are no questions or no draws, a question's task is none of ``tasks``, an option has no token, or prompt
            and option are longer than the backbone's context.
    """
    if normalise not in NORMALISE:
        raise InputError(f"normalise is {normalise!r}; it can be {' or '.join(NORMALISE)}{nearest(str(normalise), NORMALISE)}")
    task = _task_indices(model, questions, tasks)
    tokenizer = model.backbone.tokenizer
    if tokenizer is None:
        raise InputError("the backbone has no tokenizer to read the questions with; give it one: Backbone(model, tokenizer)")
    rows, prompts = _tokens(tokenizer, model.backbone.context, questions)
    options = torch.tensor([len(question.options) for question in questions])
    of_row = task.repeat_interleave(options).tolist()
    pad = tokenizer.pad_token_id or 0
    split = TokenSplit.from_documents(rows, task=of_row, num_tasks=len(tasks), pad_token_id=pad, read=prompts)
    drawn = draws() if callable(draws) else draws
    scores = [evaluate(model, split, weights, token_budget=token_budget)[0].log_likelihood for weights in drawn]
    if not scores:
        raise InputError("0 draws given; an answer needs 1 or more")
    present = torch.arange(int(options.max())) < options[:, None]  # (questions, options)
    log_likelihood = torch.full((len(scores), *present.shape), -math.inf, dtype=torch.float64)
    log_likelihood[:, present] = torch.stack(scores)
    option_tokens = torch.ones(present.shape, dtype=torch.float64)
    option_tokens[present] = split.predicted.double()
    logits = log_likelihood / option_tokens if normalise == "tokens" else log_likelihood
    label = torch.tensor([question.correct for question in questions])
    return _mixture(logits.log_softmax(-1), log_likelihood, task, label)


def _mixture(log_p: Tensor, log_likelihood: Tensor, task: Tensor, label: Tensor) -> ChoicePredictions:
    """Predictions of the mixture of log-probabilities ``log_p``: (draws, questions, options)."""
    p = log_p.exp().mean(0)
    confidence, answer = p.max(-1)
    of_label = log_p[:, torch.arange(len(label)), label]  # (draws, questions)
    return ChoicePredictions(
        task=task,
        label=label,
        probabilities=p,
        answer=answer,
        log_prob=of_label.logsumexp(0) - math.log(len(log_p)),
        confidence=confidence,
        correct=answer == label,
        brier=1 - 2 * p.gather(1, label[:, None])[:, 0] + p.square().sum(-1),
        total=torch.special.entr(p).sum(-1),
        aleatoric=torch.special.entr(log_p.exp()).sum(-1).mean(0),
        log_likelihood=log_likelihood,
    )


def _task_indices(model: BoRA, questions: Sequence[Question], tasks: Sequence[str]) -> Tensor:
    """(questions,) index of each question's task."""
    if not len(questions):
        raise InputError("0 questions given; give 1 or more")
    if len(tasks) != model.num_tasks:
        raise InputError(f"{len(tasks)} names of tasks given; the model has {model.num_tasks} tasks, give a name for each")
    place = {name: d for d, name in enumerate(tasks)}
    for number, question in enumerate(questions):
        if question.task not in place:
            raise InputError(
                f"question {number} ({_short(question.prompt)!r}) is of the task {question.task!r}; the model's are "
                f"{_short(', '.join(tasks))}{nearest(question.task, tasks)}"
            )
    return torch.tensor([place[question.task] for question in questions])


def _tokens(
    tokenizer: PreTrainedTokenizerBase, context: int | None, questions: Sequence[Question]
) -> tuple[list[list[int]], list[int]]:
    """Tokens of prompt and option, for every option of every question, and how many of them are the prompt's."""
    rows: list[list[int]] = []
    prompts: list[int] = []
    for number, question in enumerate(questions):
        name = f"question {number} ({_short(question.prompt)!r})"
        prompt, *whole = _encode(tokenizer, [question.prompt, *(question.prompt + option for option in question.options)], name)
        for option, row in zip(question.options, whole, strict=True):
            if row[: len(prompt)] != prompt or len(row) == len(prompt):
                row = prompt + _encode(tokenizer, [option], name)[0][1:]
            if context is not None and len(row) > context:
                raise InputError(
                    f"{name} has {len(row)} tokens with its start and an option; the base model reads {context} at most, "
                    f"shorten it by {len(row) - context}"
                )
            rows.append(row)
            prompts.append(len(prompt))
    return rows, prompts


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str) -> list[list[int]]:
    """Start and tokens of each text, as documents have them, without their end."""
    columns = encoder(tokenizer, sys.maxsize)({"text": texts, "task": [str(n) for n in range(len(texts))]})
    encoded = dict(zip(map(int, columns["task"]), columns["input_ids"], strict=True))
    for n, text in enumerate(texts):  # a text without tokens is left out
        if n not in encoded:
            raise InputError(f"{name}: the tokenizer has no token for {_short(text)!r}; give another prompt or option")
    end = tokenizer.eos_token_id
    return [ids[:-1] if ids[-1] == end else ids for ids in (encoded[n] for n in range(len(texts)))]


def _short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
