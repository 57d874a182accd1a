"""Infer the task of a text: which task of a finished run does it belong to?

bora infer-task runs/demo --text "Returns the shortest path between two nodes." --unknown 0.1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from bora_pyro.errors import InputError
from bora_pyro.files.text import name_line
from bora_pyro.options.field import option
from bora_pyro.predict.infer_task import PRIORS, TaskCalibration, infer_task
from bora_pyro.runs.command import Command
from bora_pyro.runs.saved import SavedRun, load_run

#: Largest number of validation documents to calibrate with. Each is read once for every task.
CALIBRATION_DOCUMENTS = 512


@dataclass(kw_only=True)
class InferTaskConfig:
    """Infer which tasks of a finished run some texts belong to, with probabilities."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    text: list[str] = option([], "a text; may be repeated (default: the lines of --file)", whole=True)
    file: str | None = option(None, "a file with one text per line")
    prior: str = option("documents", "prior p(d): proportional to the training documents, or flat", choices=PRIORS)
    unknown: float = option(0.0, "prior probability that a text belongs to none of the tasks")
    calibrate: bool = option(
        False, f"calibrate the probabilities on at most {CALIBRATION_DOCUMENTS} validation documents of the run"
    )
    temperature: float | None = option(
        None,
        "likelihoods are raised to 1/temperature; above 1, tasks are less certain (default: 1, or as --calibrate finds)",
    )
    most: int = option(3, "how many tasks to print for each text")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")

    def validate(self) -> None:
        """Raise ``InputError`` if the run or the texts are missing."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in infer_task.py runs/map_fit --text 'It was'")
        if bool(self.text) == (self.file is not None):
            raise InputError("give texts with --text, or a file with one text per line with --file")
        if self.calibrate and self.temperature is not None:
            raise InputError(
                f"calibrate finds the temperature; leave out --temperature {self.temperature:g}, or leave out --calibrate"
            )
        if self.most < 1:
            raise InputError(f"most is {self.most}; give a whole number from 1 up")


def _texts(config: InferTaskConfig) -> list[str]:
    if config.file is None:
        return config.text
    try:
        lines = Path(config.file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file {config.file!r} cannot be read ({error}); give a text file in UTF-8") from None
    return [line for line in lines if line.strip()]


def _calibration(config: InferTaskConfig, run: SavedRun) -> TaskCalibration:
    if not config.calibrate:
        return TaskCalibration(1.0 if config.temperature is None else config.temperature)
    validation = run.data.validation
    if not len(validation):
        raise InputError(f"the run in {config.run} has no validation documents to calibrate with; give --temperature instead")
    # of a document in pieces only the first, because a text that is too long is cut as well
    order = torch.randperm(validation.num_documents, generator=torch.Generator().manual_seed(0))
    validation = validation.subset(validation.first_pieces[order[:CALIBRATION_DOCUMENTS]].sort().values)
    return infer_task(run.fitted, validation, prior=config.prior).calibrate(validation.task)


def infer_tasks(config: InferTaskConfig) -> pd.DataFrame:
    """One row for each text with its most probable tasks, to be printed.

    Raises:
        InputError: the file or the run cannot be read, or the run has no documents to calibrate with.
    """
    texts = _texts(config)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    run.fitted.model.likelihood.check_texts("infer-task")
    found = infer_task(run.fitted, texts, prior=config.prior, unknown=config.unknown, calibration=_calibration(config, run))
    table = found.table(most=config.most)
    table = table.map(lambda cell: name_line(cell) if isinstance(cell, str) else cell)
    table["text"] = [name_line(text) for text in texts]
    return table


COMMAND = Command("infer-task", InferTaskConfig, infer_tasks, lambda _, table: print(table.round(4).to_string(index=False)))
