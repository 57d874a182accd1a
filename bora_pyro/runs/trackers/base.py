"""What a tracker is: something that takes named numbers at a step.

A new tracker is one file with a subclass of :class:`Tracker`, and one line in ``bora_pyro/trackers/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class Tracker(ABC):
    """A place where the numbers of a fit go.

    Args:
        folder: the run's folder; a tracker keeps its files in a folder of its own there, which
            ``bora_pyro.runs.folder.TRACKED`` names.
        config: the run's configuration.
        resume: whether the fit goes on from a checkpoint.
        quiet: say nothing.

    Raises:
        InputError: the tracker cannot begin.
    """

    #: The package that it needs, by the name that it is imported by.
    package: ClassVar[str]
    #: The extra of this project that brings the package.
    extra: ClassVar[str]

    @abstractmethod
    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool, quiet: bool) -> None: ...

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers, by names such as ``train/loss``, of a step from 1 up; steps never go down."""

    @abstractmethod
    def conclude(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of the whole fit, once, at its last step."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Write what is not written yet; ``failed`` says that the fit has not come to its end."""
