"""Convert the reports of a fit to numbers, and send them to all its trackers.

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

from bora_pyro.likelihoods import measure_of
from bora_pyro.runs.trackers.base import Tracker

#: Largest number of logged steps of a fit. The last step of each epoch is logged in addition.
POINTS = 1000
# Names of a step's numbers in the trackers, by their names in a report of `fit`.
_STEP_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "training_tokens_per_second": "train/tokens_per_second",
}


class Tracking:
    """The trackers of one fit, as a context manager.

    Each step has ``train/loss``, ``train/learning_rate`` and ``train/tokens_per_second``. The loss is the mean of the epoch so
    far in nats a training observation, as in ``metrics.jsonl``. Each epoch has ``validation/perplexity`` (for answers among
    options ``validation/nll``) and, if τ is learned, ``tau/<group>``. The whole fit has every number at the top level of
    ``metrics.json``, as ``final/<name>``.

    Args:
        trackers: the trackers that receive the numbers.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = list(trackers)
        self._last = 0  # the step whose numbers were logged last

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def step(self, report: Mapping[str, Any]) -> None:
        """Log the report of a step. Of a long fit only about :data:`POINTS` steps are logged."""
        if int(report["step"]) % -(-int(report["total"]) // POINTS) == 0:
            self._log(report)

    def epoch(self, report: Mapping[str, Any]) -> None:
        """Log the report of an epoch and of its last step."""
        self._log(report)
        numbers = epoch_numbers(report)
        for tracker in self.trackers if numbers else ():
            tracker.log(numbers, int(report["step"]))

    def conclude(self, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Log the final numbers of the fit.

        Args:
            metrics: content of ``metrics.json``.
            history: the reports of the epochs.
        """
        numbers = {f"final/{name}": float(value) for name, value in metrics.items() if _is_number(value)}
        for tracker in self.trackers:
            tracker.conclude(numbers, int(history[-1]["step"]) if history else 0)

    def close(self, *, failed: bool = False) -> None:
        """Close all trackers, even if closing one of them raises an error."""
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close, failed=failed)
        self.trackers = []

    def _log(self, report: Mapping[str, Any]) -> None:
        if int(report["step"]) == self._last:
            return
        self._last = int(report["step"])
        numbers = {name: float(report[key]) for key, name in _STEP_NAMES.items() if _is_number(report.get(key))}
        for tracker in self.trackers:
            tracker.log(numbers, self._last)


def epoch_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The measure of the validation documents, and τ by group at the end of an epoch.

    A group with a list of τ, one a layer or one a task, gives one number for each.
    """
    numbers = {}
    measure = measure_of(report, "validation").name
    if _is_number(report.get(f"validation_{measure}")):
        numbers[f"validation/{measure}"] = float(report[f"validation_{measure}"])
    for path in (report.get("tau_path") or [])[-1:]:
        for group, value in path["tau"].items():
            if isinstance(value, list):
                numbers |= {f"tau/{group}.{n}": float(item) for n, item in enumerate(value)}
            else:
                numbers[f"tau/{group}"] = float(value)
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
