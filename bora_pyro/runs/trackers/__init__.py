"""Trackers: send the numbers of a fit to TensorBoard or Weights & Biases while it runs.

    >>> sorted(TRACKERS)
    ['tensorboard', 'wandb']
    >>> check_trackers(["tensorbord"])
    Traceback (most recent call last):
    bora_pyro.errors.InputError: tracker 'tensorbord' is not known; it is one of tensorboard, wandb; did you mean 'tensorboard'?

A new tracker is one file with a subclass of :class:`Tracker`, and one line in :data:`TRACKERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError, nearest
from bora_pyro.runs.trackers.base import Tracker
from bora_pyro.runs.trackers.tensorboard import TensorBoardTracker
from bora_pyro.runs.trackers.tracking import Tracking
from bora_pyro.runs.trackers.wandb import WandbTracker

#: Trackers by their name in a configuration.
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def check_trackers(names: Sequence[str] | None) -> None:
    """Check the names of trackers, but not their packages: a configuration can be read without them.

    Raises:
        InputError: a name is not that of a tracker, or is given twice.
    """
    for n, name in enumerate(names or ()):
        if name not in TRACKERS:
            raise InputError(f"tracker {name!r} is not known; it is one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if name in (names or ())[:n]:
            raise InputError(f"tracker {name!r} is given twice; give it once")


def check_packages(names: Sequence[str] | None) -> None:
    """Import the packages that the trackers need, before the fit starts.

    Raises:
        InputError: a package is not installed; the message names the extra that installs it.
    """
    check_trackers(names)
    for name in names or ():
        tracker = TRACKERS[name]
        try:
            import_module(tracker.package)
        except ImportError as error:
            raise InputError(
                f"tracker {name!r} needs {tracker.package}, which is not installed ({error}); "
                f"pip install 'bora_pyro[{tracker.extra}]', or leave {name} out of --trackers"
            ) from None


def track(
    names: Sequence[str] | None, folder: Path, config: Mapping[str, Any], *, resume: bool = False, quiet: bool = False
) -> Tracking:
    """Start the trackers of a fit. The result is a context manager that closes them at its end.

        >>> with track(None, Path("runs/demo"), {"tau": 100.0}) as tracking:
        ...     tracking.step({"step": 1, "total": 8, "loss": 3.2})

    Args:
        names: names of the trackers; None: no tracker.
        folder: the run folder, where trackers write their local files.
        config: the run's configuration, which trackers show next to the numbers.
        resume: whether the fit resumes from a checkpoint; the trackers then continue their earlier record.
        quiet: trackers print nothing.

    Raises:
        InputError: a tracker cannot start.
    """
    tracking = Tracking()
    try:
        for name in names or ():
            tracking.trackers.append(TRACKERS[name](folder, config, resume=resume, quiet=quiet))
    except BaseException:
        tracking.close(failed=True)
        raise
    return tracking


__all__ = [
    "TRACKERS", "TensorBoardTracker", "Tracker", "Tracking", "WandbTracker", "check_packages", "check_trackers", "track",
]  # fmt: skip
