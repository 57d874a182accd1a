"""Multiple-choice questions: the probability of each option under a mixture of draws of the tasks' adapters.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> question = Question("import numpy as", (" pandas", " np"), correct=1, task="python")
>>> choices = choose(model, [question], [None], ["python", "networkx"])  # None: the base alone
>>> choices.answer.tolist(), choices.correct.tolist(), choices.confidence.item() > 0.9, choices.epistemic.tolist()
([1], [True], True, [0.0])
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import check_token_ids
from bora_pyro.data.encode import encoder
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import CausalLM
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.answers import ChoicePredictions

__all__ = ["ChoicePredictions", "Question", "check_questions", "choose"]

NORMALISE = ("tokens", "none")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question with one correct option.

        >>> Question("The sky is", (" blue.", " green."), correct=2, task="colours")
        Traceback (most recent call last):
        ...
        bora_pyro.errors.InputError: correct is 2 in the question 'The sky is'; its 2 options are numbered 0 to 1

    The model reads prompt + option, with nothing between them. Put a space between words at the beginning of the option, not at
    the end of the prompt, because most tokenizers join a space to the word after it.

    Attributes:
        prompt: the text before the answer.
        options: the possible answers, at least two and all different.
        correct: index of the correct option.
        task: name of the task whose adapter answers.

    Raises:
        InputError: if the prompt, the task or an option is empty, there are fewer than two options, two options are equal, or
            ``correct`` is not the index of an option.
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

    The probability of an option o is the mean over draws of softmax_o(log p(o | prompt, task, draw) / tokens of o). The text
    prompt + option is tokenised like a document, without the end token. The tokens of the option are those after the tokens of
    the prompt. If the tokens of the whole text do not begin with those of the prompt, both are tokenised separately.

    Args:
        model: the BoRA model; its backbone needs a tokenizer.
        questions: the questions, at least one.
        draws: the draws, or a function that returns them. A draw is θ of all tasks, (D, layers, *shape) by name of the latent, or
            None for the base alone. The draws are iterated over once.
        tasks: names of the model's tasks, in order.
        normalise: "tokens" divides the log-likelihood of an option by its number of tokens, so that long options have no
            disadvantage. "none" does not.
        token_budget: tokens of a batch, padding included. Each row is a prompt with one option.

    Raises:
        InputError: if there are no questions or no draws, the task of a question is unknown, an option has no token, or prompt
            and option are longer than the context of the base.
    """
    if normalise not in NORMALISE:
        raise InputError(f"normalise is {normalise!r}; it can be {' or '.join(NORMALISE)}{nearest(str(normalise), NORMALISE)}")
    task = _task_indices(model, questions, tasks)
    tokenizer = _tokenizer(model.backbone)
    rows, prompts = _tokens(tokenizer, model.backbone.context, questions)
    options = torch.tensor([len(question.options) for question in questions])
    row_task = task.repeat_interleave(options).tolist()
    pad = tokenizer.pad_token_id or 0
    split = TokenSplit.from_documents(rows, task=row_task, num_tasks=len(tasks), pad_token_id=pad, read=prompts)
    check_token_ids(model.backbone, split)
    drawn = draws() if callable(draws) else draws
    of_tokens = copy.copy(model)
    of_tokens.likelihood = CausalLM()
    scores = [evaluate(of_tokens, split, weights, token_budget=token_budget)[0].log_likelihood for weights in drawn]
    if not scores:
        raise InputError("0 draws given; an answer needs 1 or more")
    present = torch.arange(int(options.max())) < options[:, None]  # (questions, options)
    log_likelihood = torch.full((len(scores), *present.shape), -math.inf, dtype=torch.float64)
    log_likelihood[:, present] = torch.stack(scores)
    option_tokens = torch.ones(present.shape, dtype=torch.float64)
    option_tokens[present] = split.predicted.double()
    logits = log_likelihood / option_tokens if normalise == "tokens" else log_likelihood
    label = torch.tensor([question.correct for question in questions])
    return ChoicePredictions.mixture(logits.log_softmax(-1), log_likelihood, task, label)


def check_questions(backbone: Backbone, questions: Sequence[Question]) -> None:
    """Check that a base can read questions, so that nobody learns it after a fit.

    Raises:
        InputError: the backbone has no tokenizer, an option has no token, or prompt and option are longer than the context.
    """
    _tokens(_tokenizer(backbone), backbone.context, questions)


def _tokenizer(backbone: Backbone) -> PreTrainedTokenizerBase:
    if backbone.tokenizer is None:
        raise InputError("the backbone has no tokenizer to read the questions with; give it one: Backbone(model, tokenizer)")
    return backbone.tokenizer


def _task_indices(model: BoRA, questions: Sequence[Question], tasks: Sequence[str]) -> Tensor:
    """(questions,) index of each question's task."""
    if not len(questions):
        raise InputError("0 questions given; give 1 or more")
    if len(tasks) != model.num_tasks:
        raise InputError(f"{len(tasks)} names of tasks given; the model has {model.num_tasks} tasks, give a name for each")
    index = {name: d for d, name in enumerate(tasks)}
    for number, question in enumerate(questions):
        if question.task not in index:
            raise InputError(
                f"question {number} ({_short(question.prompt)!r}) is of the task {question.task!r}; the model's are "
                f"{_short(', '.join(tasks))}{nearest(question.task, tasks)}"
            )
    return torch.tensor([index[question.task] for question in questions])


def _tokens(
    tokenizer: PreTrainedTokenizerBase, context: int | None, questions: Sequence[Question]
) -> tuple[list[list[int]], list[int]]:
    """The tokens of prompt and option for every option of every question, and the number of tokens of each prompt."""
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
    """Tokenise each text like a document, with the start token and without the end token."""
    columns = encoder(tokenizer, sys.maxsize)({"text": texts, "task": [str(n) for n in range(len(texts))]})
    encoded = dict(zip(map(int, columns["task"]), columns["input_ids"], strict=True))
    for n, text in enumerate(texts):  # the encoder leaves out texts without tokens
        if n not in encoded:
            raise InputError(f"{name}: the tokenizer has no token for {_short(text)!r}; give another prompt or option")
    end = tokenizer.eos_token_id
    return [ids[:-1] if ids[-1] == end else ids for ids in (encoded[n] for n in range(len(texts)))]


def _short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
