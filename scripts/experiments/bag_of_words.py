"""Baseline of task inference: scikit-learn's logistic regression on TF-IDF of words and pairs of words."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.fitted import Fitted

#: Grid of inverse strengths of the penalty.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def beginnings(split: TokenSplit, tokens: int) -> TokenSplit:
    """Cut each document to its first tokens. All tokens count as observed, also those of a prompt.

    Args:
        split: the documents.
        tokens: largest number of tokens of a document.
    """
    lengths = split.lengths.clamp(max=tokens)
    return split.replace(lengths=lengths, characters=lengths - 1, observed=None)


class BagOfWords:
    """Classifier that is trained on the training documents and on their beginnings.

    Beginnings of the validation documents choose the strength of the penalty.

    Args:
        fitted: the fit whose tokenizer decodes the documents.
        data: the documents.
        tokens: number of tokens at the beginning of a held-out document that the classifier sees.
        prior: (D,) log p(d), which replaces the frequencies of the tasks in the training documents.

    Attributes:
        strength: the chosen inverse strength of the penalty.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, fitted: Fitted, data: TaskData, tokens: int, prior: Tensor) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError:
            raise InputError("this needs scikit-learn, which is not installed; pip install 'bora_pyro[routing]'") from None
        self._decode, self._tokens = tokenizer_of(fitted.model.backbone).batch_decode, tokens
        of_train = data.train.task.repeat(2).numpy()
        frequency = torch.from_numpy(np.bincount(of_train, minlength=len(data.tasks)) / len(of_train)).log()
        self._shift = prior - frequency
        self._words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        x = self._words.fit_transform(self._texts(data.train, sys.maxsize) + self._texts(data.train, tokens))
        validation, task = self._words.transform(self._texts(data.validation, tokens)), data.validation.task[:, None]

        def score(model: Any) -> float:
            """Mean log-probability of the right task over the validation documents."""
            return float(self._log_prob(model, validation).gather(1, task).mean())

        fits = {strength: LogisticRegression(C=strength, max_iter=2000).fit(x, of_train) for strength in STRENGTHS}
        self.strength = max(STRENGTHS, key=lambda strength: score(fits[strength]))
        self._model = fits[self.strength]

    def log_prob(self, split: TokenSplit) -> Tensor:
        """log p(d | beginning of the document): (documents, D), float64."""
        return self._log_prob(self._model, self._words.transform(self._texts(split, self._tokens)))

    def _log_prob(self, model: Any, rows: Any) -> Tensor:
        found = torch.full((rows.shape[0], len(self._shift)), -torch.inf, dtype=torch.float64)
        found[:, model.classes_] = torch.from_numpy(model.predict_log_proba(rows))
        return (found + self._shift).nan_to_num(nan=-torch.inf).log_softmax(1).clamp(min=-50).log_softmax(1)

    def _texts(self, split: TokenSplit, most: int) -> list[str]:
        documents = [split.document(n)[:most].tolist() for n in range(len(split))]
        return list(self._decode(documents, skip_special_tokens=True))
