"""The interface of a tracker, which receives named numbers at a step.

A new tracker is one file with a subclass of :class:`Tracker`, and one line in ``bora_pyro/runs/trackers/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class Tracker(ABC):
    """A service or a file format that records the numbers of a fit.

    Args:
        folder: the run folder. A tracker keeps its files in a subfolder of it, whose name is in
            ``bora_pyro.runs.layout.TRACKED``.
        config: the run's configuration.
        resume: whether the fit resumes from a checkpoint.
        quiet: print nothing.

    Raises:
        InputError: the tracker cannot start.
    """

    #: Import name of the package that the tracker needs.
    package: ClassVar[str]
    #: The extra of this project that installs the package.
    extra: ClassVar[str]

    @abstractmethod
    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool, quiet: bool) -> None: ...

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Record numbers of a step.

        Args:
            numbers: numbers by name, such as ``train/loss``.
            step: the step, counted from 1. It is never smaller than in an earlier call.
        """

    @abstractmethod
    def conclude(self, numbers: Mapping[str, float], step: int) -> None:
        """Record the final numbers of the fit. This is called once.

        Args:
            numbers: numbers by name, such as ``final/test_perplexity``.
            step: the last step of the fit.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Write what is still buffered and close the tracker.

        Args:
            failed: whether the fit ended early.
        """
