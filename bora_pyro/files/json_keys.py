"""Refuse JSON objects that have a key twice. Python's reader would silently take the last value.

>>> import json
>>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=without_repeats)
Traceback (most recent call last):
bora_pyro.files.json_keys.RepeatedKeyError: 'a' is given twice
"""

from __future__ import annotations

from typing import Any

from bora_pyro.errors import shown


class RepeatedKeyError(ValueError):
    """A key stands twice in one JSON object. ``key`` is the key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{shown(key)} is given twice")
        self.key = key


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of an object, for ``object_pairs_hook``.

    Raises:
        RepeatedKeyError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found
