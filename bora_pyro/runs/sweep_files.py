"""Functions that cold and warm sweeps share: read the stored table, check the validation split, save the figure."""

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
    """The table of an earlier sweep with the same output; None if there is none."""
    file = config.stem.with_name(f"{config.stem.name}.csv")
    try:
        return read_sweep(file) if file.exists() else None
    except InputError as error:
        raise InputError(f"{error}, move it away, or give another --output") from None


def check_validation(data: TaskData) -> None:
    """Refuse data without a validation document."""
    if not data.validation.num_tokens:
        raise InputError(
            "there is no validation document, but tau is chosen on validation documents; give data with a validation split"
        )


def save_figure(figure: Figure, stem: Path) -> None:
    """Write ``<stem>.png`` atomically."""
    replace_file(stem.with_name(f"{stem.name}.png"), lambda file: figure.savefig(file, format="png"))
