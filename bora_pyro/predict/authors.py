"""The names of all authors that can continue a text: the tasks of a fit, their mean Θ, and the base without an adapter.

>>> authors = Authors(["Ada", "base", "東京"])
>>> [authors.resolve(name) for name in ("Ada", "ada", "task", "Θ")]  # the name of a task or of its folder
['Ada', 'Ada', '東京', 'global-mean']
>>> authors.resolve("base"), authors.base  # here "base" is a task, so the base has another name
('base', 'plain base')
"""

from __future__ import annotations

from collections.abc import Sequence

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders

#: The name of the base without an adapter.
BASE = "base"
#: A short name of Θ.
THETA = "Θ"
#: The name of a routed model, whose gates choose the adapters of each token.
ROUTED = "routed"


class Authors:
    """Unique names for the tasks of a fit, Θ and the base.

    Args:
        tasks: names of the tasks.
        routed: whether the model is a routed one. Then its only authors are itself and the base.

    Attributes:
        tasks: the index of each task, by name.
        base: the name of the base: ``base``, or ``plain base`` if a task has the name ``base``.
        mean: the name of Θ: ``global-mean``, or ``plain global-mean`` if a task has the name ``global-mean``.
        routed: the name of the routed model: ``routed``, or ``plain routed`` if a task has the name ``routed``; None if the model
            is not a routed one.
    """

    def __init__(self, tasks: Sequence[str], *, routed: bool = False) -> None:
        self.tasks = {task: d for d, task in enumerate(tasks)}
        self.base, self.mean = self._plain(BASE), self._plain(GLOBAL_MEAN)
        self.routed = self._plain(ROUTED) if routed else None

    def resolve(self, name: str) -> str:
        """Find the author that a name stands for.

        Args:
            name: the name of a task, of a task's folder, of the base or of Θ.

        Returns:
            The author's unique name.

        Raises:
            InputError: if there is no such author.
        """
        if self.routed is not None:
            if name in (self.routed, self.base):
                return name
            raise InputError(
                f"task {shown(name)} cannot be named: gates choose the adapters of each token; give {self.routed} or {self.base}"
            )
        if name in self.tasks or name in (self.base, self.mean):
            return name
        if name == THETA:
            return self.mean
        of_folder = {folder: task for task, folder in adapter_folders(self.tasks).items()}
        if name not in of_folder:
            known = (*of_folder, *self.tasks, self.mean, self.base)
            raise InputError(f"task {shown(name)} is not in this fit, which has {len(self.tasks)}{nearest(name, known)}")
        return of_folder[name]

    def _plain(self, name: str) -> str:
        while name in self.tasks:
            name = f"plain {name}"
        return name
