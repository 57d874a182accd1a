"""Type checks of ``metrics.json`` and ``metrics.jsonl``: every value that the library reads must have the right type.

>>> strange_metric({"test_perplexity": 20.2, "tau": "inf", "tasks": {"ada": {"name": "Ada", "test_perplexity": None}}})
>>> strange_metric({"tasks": {"ada": {"name": "Ada", "test_perplexity": "low"}}})
"has 'low' for 'test_perplexity' of task 'Ada'"
>>> strange_record({"epoch": 1, "loss": "x"})
"has 'x' for 'loss'"

A run folder may come from anybody. After these checks, a page or a table can use the values without checking each one again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from bora_pyro.errors import shown

# The numbers of answers among options, behind the name of a split.
_OF_ANSWERS = ("nll", "accuracy", "ece", "brier")
_ANSWERS = tuple(
    f"{of}{split}_{name}" for of in ("", "base_", "mixture_", "map_") for split in ("test", "validation") for name in _OF_ANSWERS
)
#: Names in ``metrics.json`` whose values are numbers or None.
NUMBERS = (
    "test_perplexity", "base_test_perplexity", "validation_perplexity", "mixture_test_perplexity", "map_test_perplexity",
    "map_validation_perplexity", "test_bits_per_character", "base_test_bits_per_character", "epochs", "best_epoch", "draws",
    "fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes", "train_documents",
    "test_documents", "validation_perplexity_global_mean", "validation_nll_global_mean", *_ANSWERS,
)  # fmt: skip
#: The same for the entry of a task.
NUMBERS_OF_TASK = (
    "test_perplexity", "base_test_perplexity", "mixture_test_perplexity", "test_bits_per_character", "epistemic",
    "deviation_norm", "train_documents", "test_documents", *_ANSWERS,
)  # fmt: skip
#: The same for a line of ``metrics.jsonl``.
NUMBERS_OF_RECORD = (
    "loss", "validation_perplexity", "validation_perplexity_last", "validation_perplexity_averaged", "learning_rate",
    "training_tokens_per_second", "seconds", "validation_nll", "validation_nll_last", "validation_nll_averaged",
    "validation_perplexity_global_mean", "validation_nll_global_mean",
)  # fmt: skip
COUNTS_OF_RECORD = ("epoch", "step")
_LARGEST = 1e300  # metrics of a fit that diverged can be almost as large
_PRECISIONS = (1e-45, 1e39)  # range of float32, the type of learned precisions
_GROUP = re.compile(r"[\w.-]{1,200}")  # name of a group of τ: a kind of layer and a factor


def strange_metric(metrics: Mapping[str, Any]) -> str | None:
    """Find the first wrong value of a ``metrics.json``.

    Returns:
        The end of an error message, which follows the name of the file; None if all values are right.
    """
    kinds: dict[str, Callable[[Any], bool]] = dict.fromkeys(NUMBERS, _is_number)
    kinds |= {
        "tau": _is_tau,
        "tau_group": _is_tau,
        "task_groups": _is_texts_by_name,
        "tau_by_group": _is_tau_by_group,
        "notes": _is_list_of_texts,
        "versions": _is_texts_by_name,
        "federated": _is_federated,
    }
    kinds |= {"gradient_norm": _is_numbers_by_name}
    kinds |= {"mean": _is_calibration, "mixture": _is_calibration, "tasks": lambda tasks: isinstance(tasks, Mapping)}
    if problem := _strange(metrics, kinds):
        return problem
    for slug, task in metrics.get("tasks", {}).items():
        if not isinstance(task, Mapping) or not isinstance(task.get("name"), str):
            return f"has no name of task {slug!r}"
        if problem := _strange(task, dict.fromkeys(NUMBERS_OF_TASK, _is_number)):
            return f"{problem} of task {shown(task['name'])}"
    return None


def strange_record(record: Any) -> str | None:
    """Find the first wrong value of a line of ``metrics.jsonl``.

    Returns:
        The end of an error message, which follows the name of the file; None if all values are right.
    """
    if not isinstance(record, Mapping):
        return "holds no mapping"
    kinds = dict.fromkeys(NUMBERS_OF_RECORD, _is_number) | dict.fromkeys(COUNTS_OF_RECORD, _is_count)
    return _strange(record, kinds | {"tau_path": _is_tau_path})


def _strange(found: Mapping[str, Any], kinds: Mapping[str, Callable[[Any], bool]]) -> str | None:
    for name, is_right in kinds.items():
        if name in found and not is_right(found[name]):
            return f"has {shown(found[name])} for {name!r}"
    return None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST)


def _is_numbers_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and _is_number(number) for key, number in value.items())


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53)


def _is_precision(value: Any) -> bool:
    return value is not None and _is_number(value) and _PRECISIONS[0] < value < _PRECISIONS[1]


def _is_tau(value: Any) -> bool:
    return value in (None, "inf") or (_is_number(value) and value >= 0)


def _is_tau_by_group(value: Any) -> bool:
    return value is None or _are_by_group(value, lambda tau: tau is None or tau == 0 or _is_precision(tau))


def _are_by_group(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(
        _GROUP.fullmatch(group) and all(map(is_right, of_group if isinstance(of_group, list) else [of_group]))
        for group, of_group in value.items()
    )


def _is_tau_path(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(point, Mapping)
            and point.get("step") is not None
            and _is_count(point["step"])
            and _are_by_group(point.get("tau"), lambda tau: tau is None or _is_precision(tau))
            and [] not in point["tau"].values()
            for point in value
        )
    )


def _is_calibration(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and _is_number(value.get("ece")))


def _is_list_of_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_texts_by_name(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values()))


def _is_federated(value: Any) -> bool:
    private = value.get("privacy", {"statement": ""}) if isinstance(value, Mapping) else None
    return isinstance(private, Mapping) and isinstance(private.get("statement"), str)
