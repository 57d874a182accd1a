"""Whether a model's probabilities are as often right as they say, and whether its doubt tells where it is wrong.

>>> table = reliability([0.9, 0.9, 0.8, 0.4], [True, True, False, False], bins=2)
>>> table[["lower", "upper", "confidence", "accuracy", "count"]].round(3).to_numpy().tolist()
[[0.0, 0.5, 0.4, 0.0, 1.0], [0.5, 1.0, 0.867, 0.667, 3.0]]
>>> risk_coverage([0.1, 0.7, 0.7, 0.9], [0, 0, 1, 1]).to_numpy().tolist()  # coverage, risk, threshold
[[0.25, 0.0, 0.1], [0.75, 0.333..., 0.7], [1.0, 0.5, 0.9]]
>>> foreign_auroc(own=[0.2, 0.3, 0.5], foreign=[0.4, 0.8])
0.833...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bora_pyro.errors import InputError

_ROUNDING = 1e-4  # by how much a sum of float32 probabilities may lie outside 0 to 1


class Predictions(Protocol):
    """What `calibration` reads of predictions, one entry a prediction: a token, or a question with a choice of answers."""

    @property
    def task(self) -> Tensor:
        """(predictions,) index of the task."""

    @property
    def log_prob(self) -> Tensor:
        """(predictions,) log of the probability of what was observed, in nats."""

    @property
    def confidence(self) -> Tensor:
        """(predictions,) the highest probability."""

    @property
    def correct(self) -> Tensor:
        """(predictions,) bool, whether the most probable outcome is the one observed."""

    @property
    def brier(self) -> Tensor:
        """(predictions,) squared distance of the probabilities to the outcome, summed over the outcomes."""


@dataclass(frozen=True)
class Calibration:
    """Means over predictions; NaN where there are none.

    Attributes:
        tokens: number of predictions: tokens, or questions with a choice of answers.
        nll: negative log-likelihood, in nats a prediction.
        brier: Brier score, Σ_v (p_v − 1[v = label])², from 0 to 2 (Brier, 1950).
        ece: expected calibration error of the most probable outcome, from 0 to 1 (Naeini et al., 2015; Guo et al., 2017).
        accuracy: share of predictions whose most probable outcome is the one observed.
        confidence: mean of the highest probability; above the accuracy the model is overconfident.
    """

    tokens: int
    nll: float
    brier: float
    ece: float
    accuracy: float
    confidence: float


def calibration(predictions: Predictions, *, bins: int = 15, where: Tensor | None = None) -> Calibration:
    """How well the probabilities of predictions are calibrated.

        >>> from types import SimpleNamespace
        >>> p = torch.tensor([0.5, 0.5, 0.5, 0.5])
        >>> predictions = SimpleNamespace(log_prob=p.log(), confidence=p, correct=p > torch.tensor([0, 0, 1, 1]), brier=p)
        >>> calibration(predictions).ece, calibration(predictions, where=predictions.correct).ece
        (0.0, 0.5)

    Args:
        predictions: `bora_pyro.predict.mixture.TokenPredictions`, `bora_pyro.predict.multiple_choice.ChoicePredictions`, or
            anything with the tensors log_prob, confidence, correct and brier, (predictions,) each.
        bins: bins of equal width between 0 and 1 for the calibration error; the last one holds 1.
        where: (predictions,) bool, which of them count; default all.

    Raises:
        InputError: `bins` is below 1, `where` is no boolean mask over the predictions, or a confidence is no probability.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # takes a second to import

    bins = _checked_bins(bins)
    columns = [predictions.log_prob, predictions.confidence, predictions.correct, predictions.brier]
    if where is not None:
        if where.dtype != torch.bool or where.shape != predictions.log_prob.shape:
            raise InputError(
                f"where is {where.dtype} of shape {tuple(where.shape)}; give a torch.bool mask of shape "
                f"{tuple(predictions.log_prob.shape)}, an entry a prediction"
            )
        columns = [column[where] for column in columns]
    log_prob, confidence, correct, brier = (column.detach().cpu().double() for column in columns)
    tokens = len(log_prob)
    if not tokens:
        return Calibration(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    confidence = _probabilities(confidence)
    return Calibration(
        tokens=tokens,
        nll=-log_prob.mean().item(),
        brier=brier.mean().item(),
        ece=binary_calibration_error(_below_one(confidence), correct.long(), n_bins=bins).item(),
        accuracy=correct.mean().item(),
        confidence=confidence.mean().item(),
    )


def by_task(predictions: Predictions, names: Sequence[str], *, bins: int = 15) -> pd.DataFrame:
    """The calibration of each task: a row a task with the fields of `Calibration`, NaN for a task without predictions.

        >>> from types import SimpleNamespace
        >>> p = torch.tensor([0.5, 0.5, 0.5])
        >>> predictions = SimpleNamespace(
        ...     task=torch.tensor([0, 2, 2]), log_prob=p.log(), confidence=p, correct=torch.tensor([True, True, False]), brier=p)
        >>> by_task(predictions, ["ada", "bo", "cleo"])[["tokens", "accuracy"]].to_numpy().tolist()
        [[1.0, 1.0], [0.0, nan], [2.0, 0.5]]

    Args:
        predictions: as for `calibration`, with the tensor task, (predictions,).
        names: the tasks' names, in the order of their indices; they become the index of the table.
        bins: as for `calibration`.

    Raises:
        InputError: a prediction is of a task that has no name, or as for `calibration`.
    """
    task = predictions.task.detach().cpu()
    if len(task) and not 0 <= int(task.min()) <= int(task.max()) < len(names):
        raise InputError(
            f"task indices run from {int(task.min())} to {int(task.max())}, {len(names)} names are given; give "
            f"{int(task.max()) + 1} names, one a task"
        )
    mask = predictions.task.new_tensor(range(len(names)))[:, None] == predictions.task  # (tasks, predictions)
    rows = [asdict(calibration(predictions, bins=bins, where=of_task)) for of_task in mask]
    return pd.DataFrame(rows, index=pd.Index(names, name="task"), columns=[*Calibration.__dataclass_fields__])


def reliability(confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor, *, bins: int = 15) -> pd.DataFrame:
    """The table behind a reliability diagram: accuracy against confidence, bin by bin (DeGroot & Fienberg, 1983).

        >>> reliability([0.3, 0.95], [False, True], bins=10)["count"].tolist()
        [1, 1]

    The mean of ``|accuracy - confidence|`` weighted by ``count`` is the expected calibration error of `calibration`.

    Args:
        confidence: (predictions,) the highest probability of each.
        correct: (predictions,) whether the most probable outcome is the one observed.
        bins: bins of equal width between 0 and 1; a bin holds its lower edge, the last one both.

    Returns:
        A row a bin that holds predictions: lower, upper (its edges), confidence (the mean), accuracy, count, standard_error.
        The standard error is that of a share of independent trials, with two right and two wrong ones added (Agresti & Coull,
        1998), so that it is not 0 where all are right; tokens of one document depend on one another, and vary more.

    Raises:
        InputError: sizes disagree, there are no predictions, a confidence is no probability, or `bins` is below 1.
    """
    bins = _checked_bins(bins)
    confidence = _probabilities(_vector(confidence, "confidence"))
    right = _vector(correct, "correct")
    _same_size(confidence, right, "confidence", "correct")
    if not bool(((right == 0) | (right == 1)).all()):
        raise InputError("correct has values other than False and True; give whether each prediction was right")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(_below_one(confidence), edges, right=True) - 1
    count = torch.bincount(place, minlength=bins)
    kept = count > 0
    n = count[kept].double()
    hits = torch.bincount(place, right, bins)[kept]
    mean = torch.bincount(place, confidence, bins)[kept] / n
    adjusted = (hits + 2) / (n + 4)
    return pd.DataFrame(
        {
            "lower": edges[:-1][kept].numpy(),
            "upper": edges[1:][kept].numpy(),
            "confidence": mean.numpy(),
            "accuracy": (hits / n).numpy(),
            "count": count[kept].numpy(),
            "standard_error": (adjusted * (1 - adjusted) / (n + 4)).sqrt().numpy(),
        }
    )


def risk_coverage(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> pd.DataFrame:
    """Mean loss of the predictions kept, when the most uncertain are refused (Geifman & El-Yaniv, 2017).

        >>> risk_coverage([1, 2, 3, 4], [0, 0, 0, 1])["risk"].tolist()
        [0.0, 0.0, 0.0, 0.25]

    Args:
        uncertainty: (predictions,) in any unit; only its order counts.
        loss: (predictions,) what a kept prediction costs: 1 where it is wrong, or its negative log-likelihood.

    Returns:
        A row a threshold, from the least uncertain on: coverage (share of the predictions at or below the threshold), risk
        (their mean loss) and threshold. Predictions with one uncertainty are kept or refused together.

    Raises:
        InputError: sizes disagree, there are no predictions, or a value is NaN.
    """
    levels, count, total = _by_uncertainty(uncertainty, loss)
    kept = count.cumsum(0).double()
    return pd.DataFrame(
        {"coverage": (kept / kept[-1]).numpy(), "risk": (total.cumsum(0) / kept).numpy(), "threshold": levels.numpy()}
    )


def area_under_risk_coverage(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> float:
    """Area under the risk-coverage curve, in the unit of the loss; lower is better (Geifman et al., 2019).

        >>> area_under_risk_coverage([1, 2, 3, 4], [0, 0, 0, 1]), area_under_risk_coverage([1, 1, 1, 1], [0, 0, 0, 1])
        (0.0625, 0.25)

    The mean over k of the mean loss of the k least uncertain predictions. Where predictions are tied it is the mean over all
    their orders, so an uncertainty that tells nothing has the mean loss.

    Args:
        uncertainty: as for `risk_coverage`.
        loss: as for `risk_coverage`.

    Raises:
        InputError: as for `risk_coverage`.
    """
    _, count, total = _by_uncertainty(uncertainty, loss)
    expected = (total / count).repeat_interleave(count)
    return (expected.cumsum(0) / torch.arange(1, len(expected) + 1)).mean().item()


def foreign_auroc(own: ArrayLike | Tensor, foreign: ArrayLike | Tensor) -> float:
    """Area under the ROC curve with which a score tells texts foreign to every task from the tasks' own.

        >>> foreign_auroc(own=[1.0, 2.0], foreign=[3.0, 4.0]), foreign_auroc(own=[1.0], foreign=[1.0])
        (1.0, 0.5)

    The probability that a foreign text has the higher score than an own one, ties counting half (Hanley & McNeil, 1982).

    Args:
        own: (texts,) scores of texts of the tasks.
        foreign: (texts,) scores of texts of none; the higher, the more foreign.

    Raises:
        InputError: one of them is empty, or a score is NaN.
    """
    from torchmetrics.functional.classification import binary_auroc  # takes a second to import

    scores = [_vector(own, "own"), _vector(foreign, "foreign")]
    is_foreign = torch.cat([torch.full_like(part, k, dtype=torch.int64) for k, part in enumerate(scores)])
    # ranks: only the order counts, and torchmetrics would put scores beyond 0 to 1 through a sigmoid, which ties large ones
    levels, rank = torch.cat(scores).unique(return_inverse=True)
    return binary_auroc(rank.double() / len(levels), is_foreign).item()


def _by_uncertainty(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different uncertainties, from the lowest; how many predictions have each, and their total loss."""
    doubt, cost = _vector(uncertainty, "uncertainty"), _vector(loss, "loss")
    _same_size(doubt, cost, "uncertainty", "loss")
    levels, place, count = doubt.unique(return_inverse=True, return_counts=True)
    return levels, count, torch.zeros(len(levels), dtype=torch.float64).index_add_(0, place, cost)


def _vector(values: ArrayLike | Tensor, name: str) -> Tensor:
    """``values`` as a vector of float64 on the CPU."""
    vector = values.detach().cpu().double() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=float))
    if vector.ndim != 1 or not len(vector):
        raise InputError(f"{name} has the shape {tuple(vector.shape)}; give a vector with one entry or more")
    if bool(vector.isnan().any()):
        raise InputError(f"{name} is NaN at index {int(vector.isnan().nonzero()[0])}; give numbers")
    return vector


def _same_size(one: Tensor, other: Tensor, name: str, other_name: str) -> None:
    if len(one) != len(other):
        raise InputError(f"{name} has {len(one)} entries and {other_name} {len(other)}; give as many of each")


def _checked_bins(bins: int) -> int:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"bins is {bins!r}; give a whole number of 1 or more, for instance 15")
    return bins


def _probabilities(values: Tensor) -> Tensor:
    # the calibration error of torchmetrics would take values that rounding has put above 1 for logits
    outside = ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))  # NaN too
    if bool(outside.any()):
        raise InputError(f"confidence has the value {values[outside][0].item():g}; give probabilities, from 0 to 1")
    return values.clamp(0, 1)


def _below_one(confidence: Tensor) -> Tensor:
    # 1 belongs to the last bin, not to a bin of its own
    return confidence.clamp(max=float(np.nextafter(1, 0)))
