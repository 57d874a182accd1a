"""Weights & Biases: a run of the project ``bora_pyro``, or of the one that ``WANDB_PROJECT`` names.

``WANDB_MODE=offline`` needs neither network nor account: the run's folder ``wandb`` then has what ``wandb sync`` uploads later.
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

# Which of the account's runs this folder's is, so that a resumed fit goes on with it.
_ID = "run_id.txt"


class WandbTracker(Tracker):
    """Numbers by step, the configuration, and the numbers of the whole fit as the run's summary."""

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
                # the progress of a fit is no log of it
                settings={"console": "off", "silent": quiet},
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb cannot begin ({' '.join(str(error).split())}); WANDB_MODE=offline needs neither network nor account, "
                "or leave wandb out of --trackers"
            ) from None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def conclude(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(numbers))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
