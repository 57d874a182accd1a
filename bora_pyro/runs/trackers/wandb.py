"""Weights & Biases: a run in the project ``bora_pyro``, or in the project that ``WANDB_PROJECT`` names.

``WANDB_MODE=offline`` needs neither network nor account. ``wandb sync`` can later upload the folder ``wandb`` of the run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from bora_pyro.errors import InputError
from bora_pyro.runs.trackers.base import Tracker

# File with the id of the run at Weights & Biases, so that a resumed fit continues the same run there.
_ID = "run_id.txt"


class WandbTracker(Tracker):
    """Records numbers by step, the configuration, and the final numbers as the run's summary."""

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool, quiet: bool) -> None:
        wandb = import_module("wandb")
        file = folder / "wandb" / _ID
        file.parent.mkdir(exist_ok=True)
        if not (resume and file.is_file()):
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "bora_pyro"),
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                id=file.read_text(encoding="utf-8"),
                resume="allow",
                # the console output is a progress bar, which is no use as a log
                settings={"console": "off", "silent": quiet},
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb cannot start ({' '.join(str(error).split())}); WANDB_MODE=offline needs neither network nor account, "
                "or leave wandb out of --trackers"
            ) from None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def conclude(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(numbers))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
