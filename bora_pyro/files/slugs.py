"""The names of the folders that adapters go to: one a task, and one for Θ.

>>> adapter_folders(["Ada", "global mean"])
{'Ada': 'ada', 'global mean': 'global-mean-2'}
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

#: The folder that holds Θ.
GLOBAL_MEAN = "global-mean"
#: The slug of a name without a letter or a digit that could stand in one.
NAMELESS = "task"
# What Windows takes for a device and no folder, in every folder.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
# Letters that Unicode does not decompose into an ASCII letter and an accent.
_FOLDS = str.maketrans({"ø": "o", "æ": "ae", "œ": "oe", "ß": "ss", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})


def adapter_folders(tasks: Iterable[str]) -> dict[str, str]:
    """The folder of each task's adapter, by the task's name; none of them is that of Θ."""
    return task_slugs(tasks, reserved=(GLOBAL_MEAN,))


def task_slugs(names: Iterable[str], *, reserved: Iterable[str] = ()) -> dict[str, str]:
    """Folder names for tasks: safe on every file system, different for different tasks, readable.

    Only a-z, 0-9 and single hyphens, at most 80 of them: nothing that leads to another folder, that differs from another name by
    case alone, or that Windows keeps for a device.

        >>> task_slugs(["Abid Q. Raja", "Børge Brende", "abid q raja", "東京"])
        {'Abid Q. Raja': 'abid-q-raja', 'Børge Brende': 'borge-brende', 'abid q raja': 'abid-q-raja-2', '東京': 'task'}

    Args:
        names: the tasks' names; the order decides which of two equal slugs gets a number.
        reserved: slugs that no task may get.
    """
    slugs: dict[str, str] = {}
    used = {*reserved, *_DEVICES}
    last: dict[str, int] = {}  # the number that a slug was given last: thousands of names may share one
    for name in names:
        if name in slugs:
            continue
        folded = unicodedata.normalize("NFKD", name.casefold().translate(_FOLDS))
        letters = "".join(letter for letter in folded if not unicodedata.combining(letter))
        base = re.sub(r"[^a-z0-9]+", "-", letters.lower()).strip("-")[:80].strip("-") or NAMELESS
        slug, number = base, last.get(base, 1)
        while slug in used:
            number += 1
            slug = f"{base[: 80 - len(f'-{number}')].rstrip('-')}-{number}"
        last[base] = number
        used.add(slug)
        slugs[name] = slug
    return slugs
