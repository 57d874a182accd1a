"""Write the tables and pictures of ``bora calibrate`` to a folder, and print a summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.calibration import (
    Calibration,
    Predictions,
    area_under_risk_coverage,
    by_task,
    calibration,
    reliability,
    risk_coverage,
)
from bora_pyro.diagnostics.plots.style import plain_log_ticks
from bora_pyro.diagnostics.unknown_texts import SCORES, auroc_by_score
from bora_pyro.predict.answers import ChoicePredictions
from bora_pyro.predict.mixture import TokenPredictions
from bora_pyro.predict.multiple_choice import Question

POINTS = 200  # points of a risk-coverage curve
LOSSES = {"nll": "mean negative log-likelihood\nof the {unit} kept (nats)", "wrong": "share of wrong {unit}\namong those kept"}


def calibration_table(predictions: Mapping[str, Predictions], tasks: list[str], *, unit: str = "tokens") -> pd.DataFrame:
    """One row per task and one for all tasks: the number of predictions, and the columns ``<prediction>_<measure>``."""
    parts: list[pd.DataFrame] = []
    for name, each in predictions.items():
        whole = pd.DataFrame([asdict(calibration(each))], index=pd.Index(["all"], name="task"))
        parts.append(pd.concat([by_task(each, tasks), whole]).drop(columns="tokens" if parts else []).add_prefix(f"{name}_"))
    table = pd.concat(parts, axis=1)
    return table.rename(columns={table.columns[0]: unit}).astype({unit: int})


def write_calibration(
    folder: Path, predictions: Mapping[str, TokenPredictions | ChoicePredictions], tasks: list[str], *, unit: str = "tokens"
) -> None:
    """Write the calibration of the predictions, and the risk that remains when the most uncertain ones are left out.

    Args:
        folder: the folder for the files.
        predictions: the predictions of the test documents by name; the mixture is last.
        tasks: the names of the tasks.
        unit: what is predicted: tokens or questions.
    """
    table = calibration_table(predictions, tasks, unit=unit)
    table.to_csv(folder / "calibration.csv", float_format="%.6g")
    tables = {name: reliability(each.confidence, each.correct) for name, each in predictions.items()}
    figure = Figure(figsize=(6, 6))
    plots.reliability_diagram(tables, figure.subplots())
    figure.savefig(folder / "reliability.png")
    curves = risk_coverage_table([*predictions.values()][-1])
    curves.to_csv(folder / "risk_coverage.csv", index=False, float_format="%.6g")
    figure = Figure(figsize=(10, 4.5))
    for (loss, label), ax in zip(LOSSES.items(), figure.subplots(1, 2), strict=True):
        of_loss = curves[curves["loss"] == loss]
        series = {str(name): rows.reset_index() for name, rows in of_loss.groupby("uncertainty", sort=False)}
        plots.risk_coverage_curves(series, ax, risk=label.format(unit=unit))
    figure.savefig(folder / "risk_coverage.png")
    _show(f"{table[unit].iloc[-1]} {unit} of the test documents:", _by_prediction(table, predictions))
    _show("area under risk-coverage (lower is better):", curves.pivot_table("area", "uncertainty", "loss", sort=False))


def risk_coverage_table(predictions: TokenPredictions | ChoicePredictions) -> pd.DataFrame:
    """The risk-coverage curve of each loss and each measure of uncertainty, as one table.

    Its columns: loss, uncertainty, coverage, risk, threshold, and area (the area under the whole curve).
    """
    measures = {
        "total": predictions.total, "aleatoric": predictions.aleatoric, "epistemic": predictions.epistemic,
        "1 − confidence": 1 - predictions.confidence,
    }  # fmt: skip
    if len(predictions.log_likelihood) == 1:  # a point has no epistemic uncertainty: total and aleatoric are equal
        measures = {name: measures[name] for name in ("total", "1 − confidence")}
    losses = {"nll": -predictions.log_prob, "wrong": (~predictions.correct).double()}
    tables = []
    for loss, cost in losses.items():
        for uncertainty, values in measures.items():
            curve, area = risk_coverage(values, cost), area_under_risk_coverage(values, cost)
            places = np.searchsorted(curve["coverage"], np.linspace(1 / POINTS, 1, POINTS) - 1e-12)
            curve = curve.iloc[np.unique(places)]
            tables.append(curve.assign(loss=loss, uncertainty=uncertainty, area=area))
    return pd.concat(tables)[["loss", "uncertainty", "coverage", "risk", "threshold", "area"]]


def write_foreign(folder: Path, own: pd.DataFrame, foreign: pd.DataFrame, tasks: list[str]) -> None:
    """Write the scores of own and foreign texts, and how well each score separates the two."""
    table = pd.concat({"own": own, "foreign": foreign}, names=["origin", None]).reset_index(level=0)
    table.assign(task=[tasks[d] for d in table["task"]]).to_csv(folder / "foreign.csv", index=False, float_format="%.6g")
    auroc = auroc_by_score(own, foreign)
    auroc.to_csv(folder / "foreign_auroc.csv", index_label="score", float_format="%.6g")
    figure = Figure(figsize=(10, 3.6 * -(-len(auroc) // 2)))
    axes = figure.subplots(-(-len(auroc) // 2), 2, squeeze=False).ravel()
    for ax, (name, value) in zip(axes, auroc.items(), strict=False):
        scores = {"own texts": own[name], "foreign texts": foreign[name]}
        plots.scores_by_origin(scores, ax, score=f"{SCORES[str(name)]}\nAUROC {value:.3f}")
        if str(name).startswith("perplexity"):
            ax.set_xscale("log")
            plain_log_ticks(ax)
    for ax in axes[len(auroc) :]:
        ax.set_axis_off()
    figure.savefig(folder / "foreign.png")
    _show(f"{len(foreign)} foreign texts against {len(own)} test documents:", auroc.to_frame())


def write_questions(folder: Path, questions: list[Question], answers: dict[str, ChoicePredictions], tasks: list[str]) -> None:
    """Write one row for each question with the answer of the mixture, and the calibration of the answers."""
    last = [*answers.values()][-1]
    columns: dict[str, Any] = {
        "prompt": [question.prompt for question in questions],
        "task": [question.task for question in questions],
        "correct_option": [question.options[question.correct] for question in questions],
        "answer": [question.options[n] for question, n in zip(questions, last.answer.tolist(), strict=True)],
        "correct": last.correct.tolist(),
        "probability": last.log_prob.exp().tolist(),  # of the correct option
        "confidence": last.confidence.tolist(),
        "total": last.total.tolist(),
    }
    if len(answers) > 1:
        columns["epistemic"] = last.epistemic.tolist()
    pd.DataFrame(columns).to_csv(folder / "questions.csv", index=False, float_format="%.6g")
    table = calibration_table(answers, tasks, unit="questions")
    table.to_csv(folder / "questions_calibration.csv", float_format="%.6g")
    _show(f"{len(questions)} questions:", _by_prediction(table, answers))


def _by_prediction(table: pd.DataFrame, names: Mapping[str, Any]) -> pd.DataFrame:
    """The last row of a calibration table (all tasks), as one row for each prediction."""
    measures = [name for name in Calibration.__dataclass_fields__ if name != "tokens"]
    return pd.DataFrame({name: {measure: table[f"{name}_{measure}"].iloc[-1] for measure in measures} for name in names}).T


def _show(title: str, table: pd.DataFrame) -> None:
    print(f"{title}\n{table.rename_axis(index=None, columns=None).to_string(float_format='{:.4f}'.format)}\n")
