"""Calibration of predictions, risk against coverage, and the detection of texts that belong to no task.

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

_ROUNDING = 1e-4  # a sum of float32 probabilities may lie outside 0 to 1 by this much


class Predictions(Protocol):
    """The tensors that `calibration` reads. A prediction is a token, or a question with a choice of answers."""

    @property
    def task(self) -> Tensor:
        """(predictions,) index of the task."""

    @property
    def log_prob(self) -> Tensor:
        """(predictions,) log-probability of the observed outcome, in nats."""

    @property
    def confidence(self) -> Tensor:
        """(predictions,) the highest probability."""

    @property
    def correct(self) -> Tensor:
        """(predictions,) bool, whether the most probable outcome is the observed one."""

    @property
    def brier(self) -> Tensor:
        """(predictions,) Brier score: Σ_v (p_v − 1[v = observed])² over the possible outcomes v."""


@dataclass(frozen=True)
class Calibration:
    """Means over predictions. Every mean is NaN if there are no predictions.

    Attributes:
        tokens: number of predictions: tokens, or questions with a choice of answers.
        nll: negative log-likelihood, in nats per prediction.
        brier: Brier score, Σ_v (p_v − 1[v = observed])², from 0 to 2 (Brier, 1950).
        ece: expected calibration error of the most probable outcome, from 0 to 1 (Naeini et al., 2015; Guo et al., 2017).
        accuracy: share of predictions whose most probable outcome is the observed one.
        confidence: mean of the highest probability. A model whose confidence is above its accuracy is overconfident.
    """

    tokens: int
    nll: float
    brier: float
    ece: float
    accuracy: float
    confidence: float


def calibration(predictions: Predictions, *, bins: int = 15, where: Tensor | None = None) -> Calibration:
    """Measure how well predictions are calibrated.

        >>> from types import SimpleNamespace
        >>> p = torch.tensor([0.5, 0.5, 0.5, 0.5])
        >>> predictions = SimpleNamespace(log_prob=p.log(), confidence=p, correct=p > torch.tensor([0, 0, 1, 1]), brier=p)
        >>> calibration(predictions).ece, calibration(predictions, where=predictions.correct).ece
        (0.0, 0.5)

    Args:
        predictions: `bora_pyro.predict.mixture.TokenPredictions`, `bora_pyro.predict.answers.ChoicePredictions`, or
            anything with the tensors log_prob, confidence, correct and brier, (predictions,) each.
        bins: number of bins of equal width between 0 and 1 for the calibration error. The last bin includes 1.
        where: (predictions,) bool, the predictions to use; default all.

    Raises:
        InputError: if `bins` is below 1, `where` is not a boolean mask over the predictions, or a confidence is not a
            probability.
    """
    from torchmetrics.functional.classification import binary_calibration_error  # takes a second to import

    bins = _checked_bins(bins)
    columns = [predictions.log_prob, predictions.confidence, predictions.correct, predictions.brier]
    if where is not None:
        if where.dtype != torch.bool or where.shape != predictions.log_prob.shape:
            raise InputError(
                f"where is {where.dtype} of shape {tuple(where.shape)}; give a torch.bool mask of shape "
                f"{tuple(predictions.log_prob.shape)}, one entry per prediction"
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
    """Measure the calibration of each task.

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

    Returns:
        One row per task with the fields of `Calibration`. The means of a task without predictions are NaN.

    Raises:
        InputError: if a prediction belongs to a task without a name, or as for `calibration`.
    """
    task = predictions.task.detach().cpu()
    if len(task) and not 0 <= int(task.min()) <= int(task.max()) < len(names):
        raise InputError(
            f"task indices run from {int(task.min())} to {int(task.max())}, {len(names)} names are given; give "
            f"{int(task.max()) + 1} names, one per task"
        )
    mask = predictions.task.new_tensor(range(len(names)))[:, None] == predictions.task  # (tasks, predictions)
    rows = [asdict(calibration(predictions, bins=bins, where=of_task)) for of_task in mask]
    return pd.DataFrame(rows, index=pd.Index(names, name="task"), columns=[*Calibration.__dataclass_fields__])


def reliability(confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor, *, bins: int = 15) -> pd.DataFrame:
    """Compute the table behind a reliability diagram: accuracy and confidence per bin (DeGroot & Fienberg, 1983).

        >>> reliability([0.3, 0.95], [False, True], bins=10)["count"].tolist()
        [1, 1]

    The mean of ``|accuracy - confidence|`` weighted by ``count`` is the expected calibration error of `calibration`.

    Args:
        confidence: (predictions,) the highest probability of each prediction.
        correct: (predictions,) whether the most probable outcome is the observed one.
        bins: number of bins of equal width between 0 and 1. A bin includes its lower edge; the last bin includes both edges.

    Returns:
        One row per bin that has predictions: lower, upper (its edges), confidence (the mean), accuracy, count,
        standard_error. The standard error is that of the accuracy of independent predictions, after two correct and two
        wrong ones are added (Agresti & Coull, 1998). It is therefore above 0 even if all predictions of a bin are correct.
        It is too small for tokens of the same document, because these are not independent.

    Raises:
        InputError: if the sizes differ, there are no predictions, a confidence is not a probability, or `bins` is below 1.
    """
    bins = _checked_bins(bins)
    confidence = _probabilities(_vector(confidence, "confidence"))
    is_correct = _vector(correct, "correct")
    _check_same_size(confidence, is_correct, "confidence", "correct")
    if not bool(((is_correct == 0) | (is_correct == 1)).all()):
        raise InputError("correct has values other than False and True; give whether each prediction was right")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin_index = torch.bucketize(_below_one(confidence), edges, right=True) - 1
    count = torch.bincount(bin_index, minlength=bins)
    filled = count > 0
    n = count[filled].double()
    hits = torch.bincount(bin_index, is_correct, bins)[filled]
    mean = torch.bincount(bin_index, confidence, bins)[filled] / n
    adjusted = (hits + 2) / (n + 4)
    return pd.DataFrame(
        {
            "lower": edges[:-1][filled].numpy(),
            "upper": edges[1:][filled].numpy(),
            "confidence": mean.numpy(),
            "accuracy": (hits / n).numpy(),
            "count": count[filled].numpy(),
            "standard_error": (adjusted * (1 - adjusted) / (n + 4)).sqrt().numpy(),
        }
    )


def risk_coverage(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> pd.DataFrame:
    """Compute the mean loss of the predictions that remain when the most uncertain ones are rejected.

    This is the risk-coverage curve of Geifman & El-Yaniv (2017).

        >>> risk_coverage([1, 2, 3, 4], [0, 0, 0, 1])["risk"].tolist()
        [0.0, 0.0, 0.0, 0.25]

    Args:
        uncertainty: (predictions,) in any unit; only the order matters.
        loss: (predictions,) the loss of each prediction: for instance 1 if it is wrong, or its negative log-likelihood.

    Returns:
        One row per threshold on the uncertainty, lowest first: coverage (share of the predictions at or below the threshold),
        risk (their mean loss) and threshold. Predictions with the same uncertainty are kept or rejected together.

    Raises:
        InputError: if the sizes differ, there are no predictions, or a value is NaN.
    """
    levels, count, total = _by_uncertainty(uncertainty, loss)
    kept = count.cumsum(0).double()
    return pd.DataFrame(
        {"coverage": (kept / kept[-1]).numpy(), "risk": (total.cumsum(0) / kept).numpy(), "threshold": levels.numpy()}
    )


def area_under_risk_coverage(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> float:
    """Compute the area under the risk-coverage curve, in the unit of the loss; lower is better (Geifman et al., 2019).

        >>> area_under_risk_coverage([1, 2, 3, 4], [0, 0, 0, 1]), area_under_risk_coverage([1, 1, 1, 1], [0, 0, 0, 1])
        (0.0625, 0.25)

    The area is the mean over k of the mean loss of the k least uncertain predictions. Tied predictions are averaged over all
    their orders. An uncertainty that is the same for all predictions therefore has an area equal to the mean loss.

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
    """Compute the area under the ROC curve of a score that separates foreign texts from the tasks' own texts.

        >>> foreign_auroc(own=[1.0, 2.0], foreign=[3.0, 4.0]), foreign_auroc(own=[1.0], foreign=[1.0])
        (1.0, 0.5)

    A foreign text belongs to no task: it is out of distribution. The area is the probability that a foreign text has a higher
    score than an own text; a tie counts one half (Hanley & McNeil, 1982).

    Args:
        own: (texts,) scores of the tasks' own texts.
        foreign: (texts,) scores of foreign texts, expected to be higher.

    Raises:
        InputError: if one of them is empty, or a score is NaN.
    """
    from torchmetrics.functional.classification import binary_auroc  # takes a second to import

    scores = [_vector(own, "own"), _vector(foreign, "foreign")]
    is_foreign = torch.cat([torch.full_like(part, k, dtype=torch.int64) for k, part in enumerate(scores)])
    # torchmetrics applies a sigmoid to scores outside 0 to 1, which makes large scores equal: give it ranks, which keep the order
    levels, rank = torch.cat(scores).unique(return_inverse=True)
    return binary_auroc(rank.double() / len(levels), is_foreign).item()


def _by_uncertainty(uncertainty: ArrayLike | Tensor, loss: ArrayLike | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct uncertainties, lowest first, and for each the number of predictions and their total loss."""
    uncertainties, losses = _vector(uncertainty, "uncertainty"), _vector(loss, "loss")
    _check_same_size(uncertainties, losses, "uncertainty", "loss")
    levels, level_index, count = uncertainties.unique(return_inverse=True, return_counts=True)
    return levels, count, torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level_index, losses)


def _vector(values: ArrayLike | Tensor, name: str) -> Tensor:
    """``values`` as a vector of float64 on the CPU."""
    vector = values.detach().cpu().double() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=float))
    if vector.ndim != 1 or not len(vector):
        raise InputError(f"{name} has the shape {tuple(vector.shape)}; give a vector with one entry or more")
    if bool(vector.isnan().any()):
        raise InputError(f"{name} is NaN at index {int(vector.isnan().nonzero()[0])}; give numbers")
    return vector


def _check_same_size(one: Tensor, other: Tensor, name: str, other_name: str) -> None:
    if len(one) != len(other):
        raise InputError(f"{name} has {len(one)} entries and {other_name} {len(other)}; give as many of each")


def _checked_bins(bins: int) -> int:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"bins is {bins!r}; give a whole number of 1 or more, for instance 15")
    return bins


def _probabilities(values: Tensor) -> Tensor:
    # torchmetrics treats values above 1 as logits, also where only rounding put them there
    outside = ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))  # also True for NaN
    if bool(outside.any()):
        raise InputError(f"confidence has the value {values[outside][0].item():g}; give probabilities, from 0 to 1")
    return values.clamp(0, 1)


def _below_one(confidence: Tensor) -> Tensor:
    # so that 1 falls into the last bin and not into a bin of its own
    return confidence.clamp(max=float(np.nextafter(1, 0)))
