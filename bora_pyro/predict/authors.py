"""Who can continue a text: the tasks of a fit, their mean Θ, and the base alone, each by its name.

>>> writers = Writers(["Ada", "base", "東京"])
>>> [writers.named(name) for name in ("Ada", "ada", "task", "Θ")]  # a folder's name does as well as its task's
['Ada', 'Ada', '東京', 'global-mean']
>>> writers.named("base"), writers.base  # a task of such a name is the task
('base', 'plain base')
"""

from __future__ import annotations

from collections.abc import Sequence

from bora_pyro.errors import InputError, nearest
from bora_pyro.files.slugs import GLOBAL_MEAN, adapter_folders

#: Who writes beside the tasks and Θ: the base without an adapter.
BASE = "base"
#: Another name of Θ.
THETA = "Θ"


class Writers:
    """The names under which the tasks of a fit, Θ and the base write, no two alike.

    Args:
        tasks: names of the tasks.

    Attributes:
        tasks: the same.
        base: ``base``, or ``plain base`` where a task is called so.
        mean: ``global-mean``, or ``plain global-mean`` where a task is called so.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = {task: d for d, task in enumerate(tasks)}
        self.base, self.mean = self._plain(BASE), self._plain(GLOBAL_MEAN)

    def named(self, name: str) -> str:
        """Whose name this is: a task's, that of its folder, the base's or Θ's.

        Raises:
            InputError: nobody's.
        """
        if name in self.tasks or name in (self.base, self.mean):
            return name
        if name == THETA:
            return self.mean
        of_folder = {folder: task for task, folder in adapter_folders(self.tasks).items()}
        if name not in of_folder:
            known = (*of_folder, *self.tasks, self.mean, self.base)
            raise InputError(f"task {name!r} is not in this fit, which has {len(self.tasks)}{nearest(name, known)}")
        return of_folder[name]

    def _plain(self, name: str) -> str:
        while name in self.tasks:
            name = f"plain {name}"
        return name
