"""Rewards of texts. A reward is any callable ``(prompt, text, task) -> number``; these are examples.

>>> RegexCount(r"\\d+")("How many?", "2 or 13", "ada")
2.0
>>> Length(target=3)("Say it", "one two three four", "ada")
-1.0
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_at_least, nearest, shown
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.mixture_text import prompt_tokens


class Length:
    """The number of words of a text; with a target, minus the distance from it.

        >>> Length()("", "one two", "ada"), Length(target=5)("", "one two", "ada")
        (2.0, -3.0)

    Args:
        target: the number of words that is best; None: the more the better.

    Raises:
        InputError: the target is below 0.
    """

    def __init__(self, target: int | None = None) -> None:
        if target is not None:
            check_at_least("target", target, 0)
        self.target = target

    def __call__(self, prompt: str, text: str, task: str) -> float:
        words = len(text.split())
        return float(words) if self.target is None else -float(abs(words - self.target))


class RegexCount:
    """How often a regular expression matches in a text.

        >>> RegexCount("[aeiou]", per_character=True)("", "banana", "ada")
        0.5

    Args:
        pattern: the expression, in Python's syntax. Matches do not overlap.
        per_character: divide by the number of characters of the text; an empty text has 0.

    Raises:
        InputError: the expression cannot be read.
    """

    def __init__(self, pattern: str, per_character: bool = False) -> None:
        try:
            self.pattern = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"pattern {shown(pattern)} is no regular expression ({error})") from None
        self.per_character = per_character

    def __call__(self, prompt: str, text: str, task: str) -> float:
        count = sum(1 for _ in self.pattern.finditer(text))
        return count / max(len(text), 1) if self.per_character else float(count)


class LogLikelihood:
    """The mean log-probability of the tokens of a text behind its prompt under another fit, in nats; its end mark counts too.

    A text longer than the context of the base is cut.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> fitted = bp.Fitted(model, bp.map_guide(model), ["ada", "bob"])
        >>> from bora_pyro.guides import make_parameters
        >>> make_parameters(fitted.guide, model)
        >>> reward = LogLikelihood(fitted)
        >>> reward("Returns", " the graph.", "ada") > reward("Returns", "xq zzv", "ada")
        True

    Args:
        fitted: the other fit. A text is judged under the adapter of its task.

    Raises:
        InputError: raised by a call, if the fit has no such task.
    """

    def __init__(self, fitted: Fitted) -> None:
        fitted.model.likelihood.check_texts("LogLikelihood")
        self._fitted, self._weights = fitted, fitted.weights()[0]

    def __call__(self, prompt: str, text: str, task: str) -> float:
        backbone, tasks = self._fitted.model.backbone, self._fitted.tasks
        if task not in tasks:
            raise InputError(f"the run that judges texts has no task {shown(task)}{nearest(task, tasks)}")
        tokenizer: Any = backbone.tokenizer
        head = prompt_tokens(backbone, tokenizer, prompt, self._fitted.chat_template).tolist()
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        body += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = (head + body)[: backbone.context]
        if len(ids) == len(head):
            raise InputError(f"the text {shown(text)} behind the prompt {shown(prompt)} has no token for the run that judges it")
        split = TokenSplit.from_documents([ids], task=[tasks.index(task)], num_tasks=len(tasks), read=[len(head)])
        (scores,) = evaluate(self._fitted.model, split, self._weights)
        return float(scores.log_likelihood[0]) / split.num_tokens


class ClassProbability:
    """The probability that a classifier of texts gives a class, as those of scikit-learn do.

        >>> class Classifier:
        ...     classes_ = ["dull", "lively"]
        ...
        ...     def predict_proba(self, texts):
        ...         return [[0.0, 1.0] if "!" in text else [1.0, 0.0] for text in texts]
        >>> ClassProbability(Classifier(), "lively")("", "Well!", "ada")
        1.0

    Args:
        classifier: an object with ``classes_`` and ``predict_proba(texts)``, such as a fitted pipeline of ``TfidfVectorizer`` and
            ``LogisticRegression``.
        label: the class; None: the class with the name of the task.
        log: the logarithm of the probability, and −100 instead of less.

    Raises:
        InputError: the classifier has no such class, or is no classifier.
    """

    def __init__(self, classifier: Any, label: Any = None, *, log: bool = False) -> None:
        if not callable(getattr(classifier, "predict_proba", None)) or not hasattr(classifier, "classes_"):
            raise InputError(f"{shown(classifier)} is no fitted classifier; give one with predict_proba and classes_")
        self._classifier, self._label, self._log = classifier, label, log
        self._classes: Sequence[Any] = list(classifier.classes_)
        if label is not None:
            self._column(label)

    def _column(self, label: Any) -> int:
        if label not in self._classes:
            raise InputError(f"the classifier has no class {shown(label)}; it has {', '.join(map(str, self._classes))}")
        return self._classes.index(label)

    def __call__(self, prompt: str, text: str, task: str) -> float:
        column = self._column(task if self._label is None else self._label)
        probability = float(torch.as_tensor(self._classifier.predict_proba([text]))[0, column])
        return max(math.log(probability), -100.0) if self._log and probability > 0 else -100.0 if self._log else probability


#: Rewards that a configuration can name, ``builtin:length``. Their arguments are options.
REWARDS: dict[str, type] = {"length": Length, "regex": RegexCount}
