"""The mapping between the names of tasks and the names of their adapters' folders.

>>> names = AdapterNames(("ada", "task", "task-2"), {"ada": "Ada", "task": "大阪", "task-2": "東京"})
>>> names.folder_of("東京"), names.folder_of("ada"), names.folder_of("Zoe")
('task-2', 'ada', None)
>>> AdapterNames(("ada", "task", "task-2")).folder_of("東京")
Traceback (most recent call last):
bora_pyro.errors.InputError: the folder of the task '東京' is not known: it may be any of task, task-2; name the folder instead

The name of a folder is derived from the name of its task (:func:`~bora_pyro.files.slugs.task_slugs`), but different tasks can
give the same name. A run therefore writes the names of its tasks to ``tasks.json``, and an export writes them to ``export.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.atomic import replace_file
from bora_pyro.files.slugs import GLOBAL_MEAN, NAMELESS, task_slugs

#: The file beside the adapters of a run that maps the name of each folder to the name of its task.
TASKS = "tasks.json"
#: The file of an export that describes its folders.
EXPORT = "export.json"
# The largest file in bytes that is read. Ten thousand tasks with 100 bytes each take 1 MB.
_MAX_BYTES = 2**24


@dataclass(frozen=True)
class AdapterNames:
    """The adapter folders inside one folder, and the names of their tasks.

    Attributes:
        folders: names of all folders with the adapter of a task.
        tasks: name of the task by name of the folder, for the folders whose task is known.
    """

    folders: tuple[str, ...]
    tasks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, folders: Iterable[str]) -> AdapterNames:
        """Read the names of tasks from ``tasks.json`` or ``export.json``. Without these files no task is known.

        Args:
            folder: the folder that contains the adapter folders.
            folders: names of the adapter folders.

        Raises:
            InputError: if the file is damaged or too large, or has two folders for one task.
        """
        folders = tuple(folders)
        found = {name: task for name, task in _read_tasks(Path(folder)).items() if name in folders}
        twice = {task: name for name, task in found.items()}
        for name, task in found.items():
            if twice[task] != name:
                raise InputError(
                    f"{folder} has two folders of the task {shown(task)}, {name} and {twice[task]}; leave one of them"
                )
        return cls(folders, found)

    def folder_of(self, name: str, *, among: Collection[str] | None = None) -> str | None:
        """Find the folder of a task. The name of a task takes precedence over the name of a folder.

        Args:
            name: name of the task or of the folder.
            among: the folders of interest. If none of the candidates is among them, the result is None and never an error.

        Returns:
            The name of the folder, or None if there is none.

        Raises:
            InputError: if the names of tasks are unknown, and several folders could belong to this one.
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
            raise InputError(f"the folder of the task {shown(name)} is not known: it may be {others}; name the folder instead")
        return slug

    def folders_of(self, names: Iterable[str], *, among: Collection[str] | None = None) -> dict[str, str | None]:
        """Find the folder of each of several tasks.

        Args:
            names: names of tasks or of folders.
            among: as for :meth:`folder_of`.

        Raises:
            InputError: as for :meth:`folder_of`, or if two names lead to one folder and one of them is not known.
        """
        found = {name: self.folder_of(name, among=among) for name in names}
        first: dict[str, str] = {}
        for name, folder in found.items():
            other = name if folder is None else first.setdefault(folder, name)
            if other != name and None in (self._known(name), self._known(other)):
                raise InputError(
                    f"{shown(other)} and {shown(name)} may each be the task of folder {folder}; name the folder instead"
                )
        return found

    def nearest(self, name: str) -> str:
        """The end of an error message that suggests the folder or task with the most similar name."""
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
        """For each folder of unknown task: its name without the number at its end, if a folder with that name exists too."""
        unnamed = {folder for folder in self.folders if folder not in self.tasks}
        matches = {folder: re.fullmatch(r"(.+)-\d+", folder) for folder in sorted(unnamed)}
        return {folder: match[1] if match and match[1] in unnamed else folder for folder, match in matches.items()}


def write_task_names(folder: Path, tasks: Mapping[str, str]) -> None:
    """Write ``tasks.json``.

    Args:
        folder: the folder that contains the adapter folders.
        tasks: name of the task by name of the folder.
    """
    text = json.dumps(dict(tasks), indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / TASKS, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read_tasks(folder: Path) -> dict[str, str]:
    """The name of the task by folder, from ``tasks.json`` or else ``export.json``; empty if there is neither."""
    for name in (TASKS, EXPORT):
        file = folder / name
        if not file.is_file() or file.is_symlink():
            continue
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= _MAX_BYTES else None
            if name == EXPORT:  # without draws and Θ, which are not tasks
                described = content["adapters"]
                content = {key: of["task"] for key, of in described.items() if "draw" not in of and of["task"] is not None}
        except (OSError, ValueError, RecursionError, TypeError, LookupError, AttributeError):
            content = None
        if not isinstance(content, dict) or not all(isinstance(task, str) for task in content.values()):
            raise InputError(f"{file} does not say which task is in which folder; make it again, or delete it")
        return content
    return {}
