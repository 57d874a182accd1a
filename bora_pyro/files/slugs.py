"""Folder names for adapters: one for each task, and one for Θ.

>>> adapter_folders(["Ada", "global mean"])
{'Ada': 'ada', 'global mean': 'global-mean-2'}
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

#: The folder that holds Θ.
GLOBAL_MEAN = "global-mean"
#: The slug of a name that has no letter or digit that a slug may contain.
NAMELESS = "task"
# Names that Windows reserves for devices in every folder.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
# Letters that Unicode does not decompose into an ASCII letter and an accent.
_FOLDS = str.maketrans({"ø": "o", "æ": "ae", "œ": "oe", "ß": "ss", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})


def adapter_folders(tasks: Iterable[str]) -> dict[str, str]:
    """The folder name of each task's adapter, by task name. None of them is ``GLOBAL_MEAN``."""
    return task_slugs(tasks, reserved=(GLOBAL_MEAN,))


def task_slugs(names: Iterable[str], *, reserved: Iterable[str] = ()) -> dict[str, str]:
    """Readable folder names for tasks, safe on every file system and different for different tasks.

    A slug has at most 80 characters of a-z, 0-9 and single hyphens. So it cannot lead to another folder, two slugs never differ
    only in case, and no slug is a device name of Windows.

        >>> task_slugs(["Abid Q. Raja", "Børge Brende", "abid q raja", "東京"])
        {'Abid Q. Raja': 'abid-q-raja', 'Børge Brende': 'borge-brende', 'abid q raja': 'abid-q-raja-2', '東京': 'task'}

    Args:
        names: the tasks' names. If two names have the same slug, the later one gets a number.
        reserved: slugs that no task may have.
    """
    slugs: dict[str, str] = {}
    used = {*reserved, *_DEVICES}
    last: dict[str, int] = {}  # the last number of each slug, so that thousands of equal slugs stay fast
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
