"""The results of a run on its page: how well each task is predicted, without and with its adapter.

>>> from bora_pyro.likelihoods import PERPLEXITY
>>> row = {"base_test_perplexity": 40.0, "test_perplexity": 30.0}
>>> verdict({"ada": {"name": "Ada"} | row, "bo": {"name": "Bo"} | row | {"test_perplexity": 38.0}}, PERPLEXITY)
'The adapters predict the test documents better than the base in 2 of 2 tasks, from −25\xa0% perplexity (Ada) to −5\xa0% (Bo).'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bora_pyro.files.text import replaced
from bora_pyro.likelihoods import Measure, measure_of
from bora_pyro.report.blocks import Column, Table, number_text

#: The numbers of answers among options, beside their measure, and what they are called.
OF_ANSWERS = {"accuracy": "accuracy", "ece": "calibration error (ECE)", "brier": "Brier score"}


def change_of(measure: Measure, adapted: float, base: float) -> float:
    """The change of a measure: of a perplexity in percent, of an NLL in nats."""
    return 100 * (adapted / base - 1) if measure.exponential else adapted - base


def change_text(measure: Measure, adapted: float, base: float) -> str:
    """`change_of` with its unit."""
    unit, digits = ("%", 0) if measure.exponential else ("nats", 2)
    return f"{number_text(change_of(measure, adapted, base), digits, sign=True)}\u00a0{unit}"


def verdict(tasks: Mapping[str, Any], measure: Measure) -> str:
    """One sentence that says how the adapters change the measure of the tasks."""
    name = f"test_{measure.name}"
    pairs = [(t.get(f"base_{name}"), t.get(name), replaced(t["name"])) for t in tasks.values()]
    known = [(base, adapted, task) for base, adapted, task in pairs if base and adapted]
    changes = sorted((change_of(measure, adapted, base), task, adapted, base) for base, adapted, task in known)
    if not changes:
        return ""
    better = sum(change < 0 for change, *_ in changes)
    text = f"The adapters predict the test documents better than the base in {better} of {len(changes)} tasks"
    if len(changes) > 1:
        (_, first, *of_first), (_, last, *of_last) = changes[0], changes[-1]
        text += f", from {change_text(measure, *of_first)} {measure.title} ({first})"
        text += f" to {change_text(measure, *of_last)} ({last})"
    return f"{text}."


def results_table(tasks: Mapping[str, Any], metrics: Mapping[str, Any], effective: Mapping[str, float] | None) -> Table:
    """The table of the tasks.

    Args:
        tasks: ``tasks`` of ``metrics.json``.
        metrics: the content of ``metrics.json``.
        effective: effective parameters by task; None: they are not shown.
    """
    measure = measure_of(metrics)
    title, name, digits = measure.title, f"test_{measure.name}", measure.digits
    change = Column("change,\u00a0%", 1, sign=True) if measure.exponential else Column("change, nats", 2, sign=True)
    columns: list[tuple[Column, str]] = [
        (Column("training documents", 0), "train_documents"),
        (Column("test documents", 0), "test_documents"),
        (Column(f"base {title}", digits), f"base_{name}"),
        (Column(f"adapted {title}", digits), name),
        (change, "change"),
        (Column(f"mixture {title}", digits), f"mixture_{name}"),
        (Column("base accuracy", 3), "base_test_accuracy"),
        *((Column(label, 3), f"test_{key}") for key, label in OF_ANSWERS.items()),
        (Column("mixture accuracy", 3), "mixture_test_accuracy"),
        (Column("epistemic, nats", 4), "epistemic"),
        (Column("distance ‖θ_d\u00a0−\u00a0Θ‖", 2), "deviation_norm"),
        (Column("effective parameters\u00a0γ", 0 if max((effective or {"": 0.0}).values()) >= 100 else 1), "effective"),
    ]
    rows = []
    for task in tasks.values():
        own = {"change": _change(task, measure), "effective": None if effective is None else effective.get(task["name"])}
        rows.append({**task, **own})
    shown = [(column, key) for column, key in columns if any(row.get(key) is not None for row in rows)]
    total = {key: sum(row.get(key) or 0 for row in rows) for key in ("train_documents", "test_documents")}
    total |= {key: metrics.get(key) for _, key in columns if "test_" in key and key not in total}
    total["change"] = _change(metrics, measure)
    caption = "Test documents by task, without and with its adapter"
    caption += "; γ: how many of the adapter's parameters the task's own data determine" if effective else ""
    return Table(
        caption,
        [Column("task"), *(column for column, _ in shown)],
        [[replaced(row["name"]), *(row.get(key) for _, key in shown)] for row in rows],
        total=["all tasks", *(total.get(key) for _, key in shown)],
    )


def _change(scores: Mapping[str, Any], measure: Measure) -> float | None:
    adapted, base = scores.get(f"test_{measure.name}"), scores.get(f"base_test_{measure.name}")
    return change_of(measure, adapted, base) if adapted is not None and base else None
