"""TensorBoard: event files in the folder ``tensorboard`` of a run. ``tensorboard --logdir runs`` compares all runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from bora_pyro.runs.trackers.base import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker(Tracker):
    """Writes scalars by step and the configuration as a text. It needs neither network nor account."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tracking"

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool, quiet: bool) -> None:
        self.folder, self.config, self.resume = folder / "tensorboard", config, resume
        self._writer: SummaryWriter | None = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        # a resumed fit discards the steps that the earlier process wrote after the checkpoint
        writer = self._open(step if self.resume else None)
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if any(name.startswith("validation/") for name in numbers):
            writer.flush()  # at the end of an epoch, so that a run that is killed later keeps it

    def conclude(self, numbers: Mapping[str, float], step: int) -> None:
        writer = self._open(None)
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # this import needs tensorboard, which is optional

            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)
            text = yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()))
        return self._writer
