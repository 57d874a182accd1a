"""The Markdown table of ``compare_posteriors.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

# of tokens, and of answers among options
_TOKENS = "| arm | T | rate | of | NLL a token | perplexity | to MAP | ECE | NLL, few | ECE, few | AURC | seconds | state | ρ |"
_ANSWERS = (
    "| arm | T | rate | of | NLL a question | accuracy | NLL − MAP's | ECE | NLL, few | ECE, few | AURC | seconds | state | ρ |"
)
# areas under the ROC curve of foreign texts, by column
_FOREIGN = {
    "foreign_total": "foreign: total",
    "foreign_epistemic": "foreign: epistemic",
    "foreign_perplexity": "foreign: perplexity",
}


def markdown(table: pd.DataFrame, chosen: Mapping[str, pd.Series | None]) -> str:
    """Make a Markdown table with each arm at its chosen learning rate and temperature, as mean ± standard deviation over seeds.

    Args:
        table: the rows of the comparison.
        chosen: for each arm a row with the chosen ``temperature`` and ``learning_rate``; None: the arm has neither.
    """
    foreign = [name for name in _FOREIGN if name in table]
    header = [_TOKENS if _of_tokens(table) else _ANSWERS, *(f" {_FOREIGN[name]} |" for name in foreign)]
    lines = ["".join(header), "|" + "---|" * (14 + len(foreign))]
    reference = table[table.arm == "map"].set_index("seed").test_nll
    for arm, choice in chosen.items():
        for prediction in ("mean", "scaled", "mixture", "scaled mixture"):
            rows = table[(table.arm == arm) & (table.prediction == prediction)]
            if choice is not None:
                for name in ("temperature", "learning_rate"):
                    rows = rows[rows[name].isna()] if pd.isna(choice[name]) else rows[np.isclose(rows[name], choice[name])]
            if not rows.empty:
                cells = _cells(rows.set_index("seed"), prediction, reference)
                cells += [_mean_sd(rows[name].dropna(), 3) for name in foreign]
                lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(rows: pd.DataFrame, prediction: str, reference: pd.Series) -> list[str]:
    cells = [_text(rows.temperature.iloc[0]), _text(rows.learning_rate.iloc[0]), prediction]
    more = (rows.test_nll - reference).dropna()
    cells.append(_mean_sd(rows.test_nll, 3))
    if _of_tokens(rows):
        cells += [_mean_sd(rows.test_perplexity, 2), _mean_sd(more.map(np.exp), 3)]
    else:
        cells += [_mean_sd(rows.test_accuracy, 3), _mean_sd(more, 3)]
    cells += [_mean_sd(rows.test_ece, 4), _mean_sd(rows.test_few_nll, 3), _mean_sd(rows.test_few_ece, 4)]
    cells.append(_mean_sd(rows.test_aurc, 3) if "test_aurc" in rows else "–")
    cells += [f"{rows.seconds.mean():.0f}", f"{rows.state.mean():.1f}"]
    rho = rows["scale_correlation"] if "scale_correlation" in rows else pd.Series(dtype=float)
    return [*cells, _mean_sd(rho.dropna(), 2)]


def _of_tokens(rows: pd.DataFrame) -> bool:
    return "test_perplexity" in rows and bool(rows.test_perplexity.notna().all())


def _text(value: Any) -> str:
    return "–" if pd.isna(value) else f"{float(value):g}"


def _mean_sd(values: pd.Series, digits: int) -> str:
    if values.empty:
        return "–"
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")
