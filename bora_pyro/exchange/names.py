"""Which task's adapter a folder holds: names of tasks beside the folders that are named after them.

>>> names = AdapterNames(("ada", "task", "task-2"), {"ada": "Ada", "task": "大阪", "task-2": "東京"})
>>> names.folder_of("東京"), names.folder_of("ada"), names.folder_of("Zoe")
('task-2', 'ada', None)
>>> AdapterNames(("ada", "task", "task-2")).folder_of("東京")
Traceback (most recent call last):
bora_pyro.errors.InputError: the folder of the task '東京' is not known: it may be any of task, task-2; name the folder instead

A folder's name is made of the task's (:func:`~bora_pyro.files.slugs.task_slugs`), and many names may make one. A run
therefore writes ``tasks.json`` beside its adapters, and an export has the names in ``export.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError, nearest
from bora_pyro.files.atomic import replace_file
from bora_pyro.files.slugs import GLOBAL_MEAN, NAMELESS, task_slugs

#: The file beside the folders of a run's adapters: a mapping of a folder's name to its task's.
TASKS = "tasks.json"
#: The file of an export that says what its folders are.
EXPORT = "export.json"
# Larger ones are not read: a name takes a hundred bytes, and there are some ten thousand tasks.
_BYTES = 2**24


@dataclass(frozen=True)
class AdapterNames:
    """The folders of one folder, and the tasks whose adapters they hold.

    Attributes:
        folders: names of all folders with an adapter of a task.
        tasks: the task's name by folder, where it is known.
    """

    folders: tuple[str, ...]
    tasks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, folders: Iterable[str]) -> AdapterNames:
        """What ``tasks.json`` or ``export.json`` in ``folder`` says of these folders in it; nothing where there is neither.

        Raises:
            InputError: a file that is damaged, too large, or that gives two folders to one task.
        """
        folders = tuple(folders)
        found = {name: task for name, task in _stored(Path(folder)).items() if name in folders}
        twice = {task: name for name, task in found.items()}
        for name, task in found.items():
            if twice[task] != name:
                raise InputError(f"{folder} has two folders of the task {task!r}, {name} and {twice[task]}; leave one of them")
        return cls(folders, found)

    def folder_of(self, name: str, *, among: Collection[str] | None = None) -> str | None:
        """The folder of a task, by the task's name or, where no task is called so, by its own; None where there is none.

        Args:
            name: of the task, or of the folder.
            among: folders that are wanted; of others nothing need be known.

        Raises:
            InputError: the names of tasks are not known, and several folders could be this one's.
        """
        if (known := self._known(name)) is not None:
            return known
        slug = task_slugs([name], reserved=(GLOBAL_MEAN,))[name]
        if slug not in self._stems:
            return None
        alike = [folder for folder, stem in self._stems.items() if stem == self._stems[slug]]
        if among is not None and not set(alike) & set(among):
            return None
        if len(alike) > 1 or slug == NAMELESS:
            others = f"any of {', '.join(alike[:3])}{', ...' if len(alike) > 3 else ''}" if len(alike) > 1 else f"{slug}, or none"
            raise InputError(f"the folder of the task {name!r} is not known: it may be {others}; name the folder instead")
        return slug

    def folders_of(self, names: Iterable[str], *, among: Collection[str] | None = None) -> dict[str, str | None]:
        """The folder of each of several tasks.

        Raises:
            InputError: as for :meth:`folder_of`; or two names that are not known would lead to one folder.
        """
        found = {name: self.folder_of(name, among=among) for name in names}
        first: dict[str, str] = {}
        for name, folder in found.items():
            other = name if folder is None else first.setdefault(folder, name)
            if other != name and None in (self._known(name), self._known(other)):
                raise InputError(f"{other!r} and {name!r} may each be the task of folder {folder}; name the folder instead")
        return found

    def nearest(self, name: str) -> str:
        """The clause that suggests a folder or a task of nearly that name."""
        return nearest(name, [*self.tasks.values(), *self.folders])

    def _known(self, name: str) -> str | None:
        return self._by_task.get(name, name if name in self._own else None)

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset(self.folders)

    @cached_property
    def _by_task(self) -> dict[str, str]:
        return {task: folder for folder, task in self.tasks.items()}

    @cached_property
    def _stems(self) -> dict[str, str]:
        """Of each folder whose task is not known: its name without a number, where the folder of that name is there too."""
        unnamed = {folder for folder in self.folders if folder not in self.tasks}
        matches = {folder: re.fullmatch(r"(.+)-\d+", folder) for folder in sorted(unnamed)}
        return {folder: match[1] if match and match[1] in unnamed else folder for folder, match in matches.items()}


def write_task_names(folder: Path, tasks: Mapping[str, str]) -> None:
    """Write ``tasks.json``: the name of the task by folder."""
    text = json.dumps(dict(tasks), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / TASKS, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _stored(folder: Path) -> dict[str, str]:
    for name in (TASKS, EXPORT):
        file = folder / name
        if not file.is_file() or file.is_symlink():
            continue
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= _BYTES else None
            if name == EXPORT:  # draws are no tasks, and Θ is none
                described = content["adapters"]
                content = {key: of["task"] for key, of in described.items() if "draw" not in of and of["task"] is not None}
        except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError):
            content = None
        if not isinstance(content, dict) or not all(isinstance(task, str) for task in content.values()):
            raise InputError(f"{file} does not say which task is in which folder; make it again, or delete it")
        return content
    return {}
