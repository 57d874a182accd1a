"""Infer the task of a text: which task of a finished run does it belong to? Or the task of each token, if it changes in the text.

bora infer-task runs/demo --text "Returns the shortest path between two nodes." --unknown 0.1
bora infer-task runs/demo --file texts.txt --by token --switch_rate 0.02
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.errors import InputError
from bora_pyro.files.text import name_line
from bora_pyro.options.field import check_fields, option
from bora_pyro.predict.infer_task import PRIORS, TaskCalibration, infer_task
from bora_pyro.predict.token_filter import TokenFilter, token_filter
from bora_pyro.runs.command import Command
from bora_pyro.runs.saved import SavedRun, load_run

#: Largest number of validation documents to calibrate with. Each is read once for every task.
CALIBRATION_DOCUMENTS = 512
#: Tasks that are printed for each text by default.
MOST = 3
#: What has a task: a whole text, or each of its tokens.
TEXT, TOKEN = BY = ("text", "token")


@dataclass(kw_only=True)
class InferTaskConfig:
    """Infer which tasks of a finished run some texts belong to, with probabilities."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    text: list[str] = option([], "a text; may be repeated (default: the lines of --file)", whole=True)
    file: str | None = option(None, "a file with one text per line")
    prior: str = option("documents", "prior p(d): proportional to the training documents, or flat", choices=PRIORS)
    by: str = option(
        TEXT,
        "text: a text is of one task; token: the task may change in a text, whose segments are printed (a hidden Markov model)",
        choices=BY,
    )
    switch_rate: float | None = option(
        None,
        "with --by token: probability that the task is drawn anew before a token (default: the most likely rate for these texts)",
    )
    draws: int | None = option(
        None,
        "with --by token: read the texts with this many draws of the posterior of the run (default: with its centre)",
        least=1,
    )
    unknown: float = option(0.0, "prior probability that a text belongs to none of the tasks")
    calibrate: bool = option(
        False, f"calibrate the probabilities on at most {CALIBRATION_DOCUMENTS} validation documents of the run"
    )
    temperature: float | None = option(
        None,
        "likelihoods are raised to 1/temperature; above 1, tasks are less certain (default: 1, or as --calibrate finds)",
    )
    most: int = option(MOST, "how many tasks to print for each text")
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
        check_fields(self)
        for name in ("switch_rate", "draws") if self.by == TEXT else ():
            if getattr(self, name) is not None:
                raise InputError(f"{name} is {getattr(self, name)}, but by is {TEXT}; give --by {TOKEN}, or leave it out")
        if self.by == TOKEN and self.calibrate:
            raise InputError(f"calibrate is for whole texts, and by is {TOKEN}; leave it out, or give a --temperature")
        if self.by == TOKEN and self.most != MOST:
            raise InputError(f"most is {self.most}, and a segment has one task; leave it out with --by {TOKEN}")
        if self.switch_rate is not None and not 0 <= self.switch_rate <= 1:
            raise InputError(f"switch_rate is {self.switch_rate}; give a probability from 0 to 1, for example 0.02")
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
    """One row for each text with its most probable tasks, or one for each segment of it, to be printed.

    Raises:
        InputError: the file or the run cannot be read, or the run has no documents to calibrate with.
    """
    texts = _texts(config)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    run.fitted.model.likelihood.check_texts("infer-task")
    if config.by == TOKEN:
        temperature = 1.0 if config.temperature is None else config.temperature
        found = token_filter(
            run.fitted, texts, switch_rate=config.switch_rate, temperature=temperature, prior=config.prior,
            unknown=config.unknown, draws=config.draws,
        )  # fmt: skip
        return _segments(found, run)
    probabilities = infer_task(
        run.fitted, texts, prior=config.prior, unknown=config.unknown, calibration=_calibration(config, run)
    )
    table = probabilities.table(most=config.most)
    table = table.map(lambda cell: name_line(cell) if isinstance(cell, str) else cell)
    table["text"] = [name_line(text) for text in texts]
    return table


def _segments(found: TokenFilter, run: SavedRun) -> pd.DataFrame:
    """One row for each segment of each text, with the number of the text, the task, its probability, and the words."""
    split, context = found.likelihoods.split, run.fitted.model.backbone.context
    tokenizer = tokenizer_of(run.fitted.model.backbone)
    rows = []
    for number, segments in enumerate(found.segments):
        tokens = split.document(number)
        if len(tokens) == context:
            print(f"note: text {number + 1} fills the {context} tokens that the base reads; no more is read", file=sys.stderr)
        for segment in segments:
            words = tokenizer.decode(tokens[segment.start : segment.end], skip_special_tokens=True)
            row = {"text": number + 1, "tokens": segment.end - segment.start, "task": name_line(segment.task)}
            rows.append(row | {"p": segment.probability, "segment": name_line(words)})
    table = pd.DataFrame(rows)
    table.attrs |= {"switch_rate": found.switch_rate, "perplexity": found.perplexity}
    return table


def show(config: InferTaskConfig, table: pd.DataFrame) -> None:
    """Print the table, and for segments the switch rate and the perplexity of the texts."""
    print(table.round(4).to_string(index=False))
    if config.by == TOKEN:
        print(f"switch rate {table.attrs['switch_rate']:.3g}, perplexity of the texts {table.attrs['perplexity']:.2f}")


COMMAND = Command("infer-task", InferTaskConfig, infer_tasks, show)
