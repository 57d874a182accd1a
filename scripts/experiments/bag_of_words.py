"""The baseline of task inference: scikit-learn's logistic regression on TF-IDF of words and pairs of words."""

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

#: Inverse strengths of the penalty to choose from.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def beginnings(split: TokenSplit, tokens: int) -> TokenSplit:
    """The first so many tokens of each document; a prompt is part of the text, whose task is asked of all its tokens."""
    lengths = split.lengths.clamp(max=tokens)
    return split.replace(lengths=lengths, characters=lengths - 1, observed=None)


class BagOfWords:
    """Trained on the training documents and on their beginnings, its penalty chosen by beginnings of the validation documents.

    Args:
        fitted: whose tokenizer turns the documents back into texts, as the model reads them.
        data: the documents.
        tokens: of each held-out document it sees the first so many.
        prior: (D,) log p(d) that replaces the training frequencies, as the model's does.

    Attributes:
        strength: the inverse strength of the penalty that was chosen.

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

        def right(model: Any) -> float:
            """Mean log-probability of the validation documents' own tasks."""
            return float(self._of(model, validation).gather(1, task).mean())

        fits = {strength: LogisticRegression(C=strength, max_iter=2000).fit(x, of_train) for strength in STRENGTHS}
        self.strength = max(STRENGTHS, key=lambda strength: right(fits[strength]))
        self._model = fits[self.strength]

    def log_prob(self, split: TokenSplit) -> Tensor:
        """(documents, D) log p(d | the document's beginning), float64."""
        return self._of(self._model, self._words.transform(self._texts(split, self._tokens)))

    def _of(self, model: Any, rows: Any) -> Tensor:
        found = torch.full((rows.shape[0], len(self._shift)), -torch.inf, dtype=torch.float64)
        found[:, model.classes_] = torch.from_numpy(model.predict_log_proba(rows))
        return (found + self._shift).nan_to_num(nan=-torch.inf).log_softmax(1).clamp(min=-50).log_softmax(1)

    def _texts(self, split: TokenSplit, most: int) -> list[str]:
        documents = [split.document(n)[:most].tolist() for n in range(len(split))]
        return list(self._decode(documents, skip_special_tokens=True))
