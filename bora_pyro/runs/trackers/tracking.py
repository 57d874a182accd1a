"""From the reports of a fit to the numbers that trackers take.

>>> report = {"step": 8, "total": 8, "loss": 3.1, "validation_perplexity": 20.5}
>>> report |= {"tau_path": [{"step": 8, "tau": {"q_proj.lora_A": 90.0, "q_proj.lora_B": [80.0, 120.0]}}]}
>>> list(epoch_numbers(report))
['validation/perplexity', 'tau/q_proj.lora_A', 'tau/q_proj.lora_B.0', 'tau/q_proj.lora_B.1']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from bora_pyro.runs.trackers.base import Tracker

#: Steps of a fit that are logged, at most; the last step of an epoch is one in any case.
POINTS = 1000
# Names of the numbers of a step, by what a report of `fit` calls them.
_OF_STEP = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "training_tokens_per_second": "train/tokens_per_second",
}


class Tracking:
    """The trackers of one fit, as a context manager.

    A step has ``train/loss`` (nats a training observation, the mean of the epoch so far, as ``metrics.jsonl`` has it),
    ``train/learning_rate`` and ``train/tokens_per_second``; an epoch ``validation/perplexity`` and, where τ is learned,
    ``tau/<group>``; the whole fit every number at the top of ``metrics.json``, as ``final/<name>``.

    Args:
        trackers: those that take the numbers.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = list(trackers)
        self._last = 0  # the step whose numbers were logged last

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def step(self, report: Mapping[str, Any]) -> None:
        """Log what a step reports, of at most some :data:`POINTS` steps of a fit."""
        if int(report["step"]) % -(-int(report["total"]) // POINTS) == 0:
            self._log(report)

    def epoch(self, report: Mapping[str, Any]) -> None:
        """Log what an epoch reports, its last step included."""
        self._log(report)
        numbers = epoch_numbers(report)
        for tracker in self.trackers if numbers else ():
            tracker.log(numbers, int(report["step"]))

    def conclude(self, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Log the numbers of the whole fit.

        Args:
            metrics: what ``metrics.json`` holds.
            history: the reports of the epochs.
        """
        numbers = {f"final/{name}": float(value) for name, value in metrics.items() if _is_number(value)}
        for tracker in self.trackers:
            tracker.conclude(numbers, int(history[-1]["step"]) if history else 0)

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers, each of them whatever becomes of the others."""
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close, failed=failed)
        self.trackers = []

    def _log(self, report: Mapping[str, Any]) -> None:
        if int(report["step"]) == self._last:
            return
        self._last = int(report["step"])
        numbers = {name: float(report[key]) for key, name in _OF_STEP.items() if _is_number(report.get(key))}
        for tracker in self.trackers:
            tracker.log(numbers, self._last)


def epoch_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Validation perplexity, and τ by group at the epoch's end; a group with a τ a layer or task has a number for each."""
    numbers = {}
    if _is_number(report.get("validation_perplexity")):
        numbers["validation/perplexity"] = float(report["validation_perplexity"])
    for path in (report.get("tau_path") or [])[-1:]:
        for group, value in path["tau"].items():
            if isinstance(value, list):
                numbers |= {f"tau/{group}.{n}": float(item) for n, item in enumerate(value)}
            else:
                numbers[f"tau/{group}"] = float(value)
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
