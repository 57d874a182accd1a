"""What a cold and a warm sweep share: the table that is there, the split that chooses, the picture beside the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bora_pyro.data import TaskData
from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.runs.config.tau_sweep import SweepConfig


def stored_table(config: SweepConfig) -> pd.DataFrame | None:
    """The table that is there already."""
    file = config.stem.with_name(f"{config.stem.name}.csv")
    try:
        return read_sweep(file) if file.exists() else None
    except InputError as error:
        raise InputError(f"{error}, move it away, or give another --output") from None


def check_validation(data: TaskData) -> None:
    """Refuse data without a validation document."""
    if not data.validation.num_tokens:
        raise InputError("there is no validation document, and nothing else may choose tau; give data with a validation split")


def save_figure(figure: Figure, stem: Path) -> None:
    """Write ``<stem>.png``, whole or not at all."""
    replace_file(stem.with_name(f"{stem.name}.png"), lambda file: figure.savefig(file, format="png"))
