"""Check the calibration of a finished run: are its probabilities right, and is it uncertain where it is wrong?

    bora calibrate runs/demo-posterior --draws 8 --foreign other.csv --questions questions.jsonl

It predicts the run's test documents at the centre of the posterior (``mean``) and with a mixture of draws (``mixture``). With
``--predict linearised`` the draws predict with the linear expansion of the network around the centre, and the prediction is
called ``linearised``. A MAP fit has one prediction, ``map``. What is predicted is each token, or each answer if the fit observes
answers among options. The command writes these files into the folder ``diagnostics`` of the run, or into ``--output``:

- ``calibration.csv``: one row for each task and one for all tasks, with the likelihood, Brier score and calibration error of each
  prediction;
- ``reliability.png``: accuracy against confidence;
- ``risk_coverage.csv``, ``.png``: the risk of the tokens or answers that remain when the most uncertain ones are left out, for
  each measure of uncertainty; ``area`` is the area under the whole curve;
- with ``--foreign`` (texts that belong to no task): ``foreign.csv``, ``foreign_auroc.csv`` and ``foreign.png``, which show how
  well each measure separates foreign texts from test documents. ``foreign.csv`` has one row for each text. Each text is read with
  the adapter that gives it the highest likelihood;
- with ``--questions`` (a .jsonl file with prompt, options, correct and task, where correct is a position from 0):
  ``questions.csv`` (one row for each question) and ``questions_calibration.csv``.

The files appear together, when all of them are complete.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from bora_pyro.data import TokenSplit, read_table
from bora_pyro.data.files import read_file
from bora_pyro.data.tokenise import tokenise
from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.unknown_texts import sample_texts, text_scores
from bora_pyro.errors import InputError, nearest
from bora_pyro.likelihoods import DPO
from bora_pyro.model import BoRA
from bora_pyro.options.field import check_choices, option
from bora_pyro.predict.answers import ChoicePredictions, predictions
from bora_pyro.predict.mixture import Draws, TokenPredictions
from bora_pyro.predict.multiple_choice import Question, choose
from bora_pyro.predict.posterior import PREDICT
from bora_pyro.runs.calibration_files import write_calibration, write_foreign, write_questions
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.layout import DIAGNOSTICS
from bora_pyro.runs.progress import print_data
from bora_pyro.runs.saved import SavedRun, load_run

DRAWS = 8  # draws of a posterior, unless --draws is given


@dataclass(kw_only=True)
class CalibrateConfig:
    """Check the calibration of a finished run on its test documents, on foreign texts and on multiple-choice questions."""

    run: str = option("", "folder of the run, a fit's output_dir", positional=True)
    draws: int | None = option(None, f"draws of the mixture (default: {DRAWS}; a MAP fit is a point and has none)")
    predict: str = option(
        "draws",
        "draws: each draw predicts with the network; linearised: with its linear expansion around the centre, which is right for "
        "the guides laplace, laplace_kfac and laplace_kronecker",
        choices=PREDICT,
    )
    foreign: str | None = option(None, "texts that belong to no task: a table, a saved folder, a hub id or builtin:documentation")
    foreign_text_column: str = option("text", "column of the foreign texts; no other column is read")
    foreign_documents: int = option(
        200, "largest number of foreign texts, and of test documents to compare them with; both are drawn at random"
    )
    questions: str | None = option(None, "a .jsonl file of multiple-choice questions")
    output: str | None = option(None, "folder for the results (default: the folder diagnostics of the run)")
    token_budget: int = option(4096, "tokens of a batch; the probabilities of a batch are token_budget x vocabulary numbers")
    seed: int = option(0, "seed of the draws of the posterior, and of the choice of texts")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError("no run is given; name its folder, as in calibrate.py runs/posterior_fit")
        check_choices(self)
        least = {"draws": 2, "foreign_documents": 1, "token_budget": 1, "seed": 0, "threads": 1}
        for name, lowest in least.items():
            if (value := getattr(self, name)) is not None and value < lowest:
                raise InputError(f"{name} is {value}; give a whole number from {lowest} up")

    @property
    def linearised(self) -> bool:
        """Whether the draws predict with the linear expansion of the network."""
        return self.predict == "linearised"


class Predictor:
    """Predicts with the centre of a run, and with draws of its posterior if it has one."""

    def __init__(self, run: SavedRun, config: CalibrateConfig) -> None:
        model, centre = run.fitted.model, run.fitted.weights()[0]
        self.centre, self.token_budget, self.likelihood = centre, config.token_budget, model.likelihood
        #: The model and the draws of each prediction, by its name; the mixture is last.
        self.parts: dict[str, tuple[BoRA, Draws]] = {"map": (model, lambda: [centre])}
        if not run.is_point:
            posterior, number = run.posterior(seed=config.seed), config.draws or DRAWS
            mixture, name = posterior.predictor(config.linearised), "linearised" if config.linearised else "mixture"
            of_centre = "best_member" if isinstance(run.config, EnsembleConfig) else "mean"
            self.parts = {of_centre: (model, lambda: [centre]), name: (mixture, lambda: posterior.draws(number))}
        elif config.draws is not None or config.linearised:
            name, value = ("predict", config.predict) if config.draws is None else ("draws", config.draws)
            raise InputError(
                f"{name} is {value}, but the run in {run.folder.path} is a MAP fit, a point, and has no draws; leave --{name} "
                f"out, or fit a posterior around it: scripts/posterior_fit.py {run.folder.path}"
            )

    def predictions(self, split: TokenSplit) -> dict[str, TokenPredictions | ChoicePredictions]:
        """The predictions of every token or answer, by name; the mixture is last."""
        budget = self.token_budget
        return {name: predictions(model, split, draws, token_budget=budget) for name, (model, draws) in self.parts.items()}

    def answers(self, questions: list[Question], tasks: list[str]) -> dict[str, ChoicePredictions]:
        """The predictions of every multiple-choice question, by name; the mixture is last."""
        # options are compared as the fit has compared them
        normalise = "none" if getattr(self.likelihood, "option_score", "mean") == "sum" else "tokens"
        return {
            name: choose(model, questions, draws, tasks, normalise=normalise, token_budget=self.token_budget)
            for name, (model, draws) in self.parts.items()
        }

    def texts(self, split: TokenSplit) -> pd.DataFrame:
        """Score how foreign each text is. A point estimate has no epistemic uncertainty."""
        model, draws = [*self.parts.values()][-1]
        scores = text_scores(model, split, self.centre, draws, token_budget=self.token_budget)
        return scores if len(self.parts) > 1 else scores.drop(columns="epistemic")


def calibrate(config: CalibrateConfig) -> Path:
    """Write all tables and pictures; return their folder.

    Raises:
        InputError: the run, the foreign texts or the questions cannot be read; the run has no test documents; or the folder
            cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    predictor, tasks = Predictor(run, config), run.data.tasks
    if not len(run.data.test):
        raise InputError(f"the run in {run.folder.path} has no test documents; split the data so that some tasks have some")
    if config.foreign is not None:
        predictor.likelihood.check_texts("--foreign")
    foreign = read_foreign(config, run) if config.foreign is not None else None
    if config.questions is not None and isinstance(predictor.likelihood, DPO):
        raise InputError(
            f"questions are given, whose options are compared by their probabilities, and the run in {run.folder.path} compares "
            "answers by rewards; leave --questions out"
        )
    questions = read_questions(Path(config.questions)) if config.questions is not None else None
    folder = Path(config.output) if config.output is not None else run.folder.path / DIAGNOSTICS
    with _all_or_nothing(folder) as place, plots.style():
        if questions is not None:  # first, because a question may still name an unknown task
            write_questions(place, questions, predictor.answers(questions, tasks), tasks)
        print_data(run.data)
        unit = "questions" if predictor.likelihood.reads_options else "tokens"
        write_calibration(place, predictor.predictions(run.data.test), tasks, unit=unit)
        if foreign is not None:
            own = sample_texts(run.data.test, config.foreign_documents, seed=config.seed)
            write_foreign(place, predictor.texts(own), predictor.texts(foreign), tasks)
    return folder


def read_foreign(config: CalibrateConfig, run: SavedRun) -> TokenSplit:
    """Read the foreign texts and cut them as the documents of the run are cut. Leave out documents of the run."""
    backbone, column = run.fitted.model.backbone, config.foreign_text_column
    try:  # foreign texts have no task: the text column is also given as the task column
        table, notes = read_table(str(config.foreign), task_column=column, text_column=column)
    except InputError as error:
        raise InputError(str(error).replace("(task_column)", "(foreign_text_column)")) from None
    for note in notes:
        print(f"note: of the foreign texts: {note}", file=sys.stderr)
    tasks = {name: d for d, name in enumerate(run.data.tasks)}
    table = table.remove_columns("task").add_column("task", [run.data.tasks[0]] * len(table))  # any task: text_scores ignores it
    max_tokens = min(run.config.max_tokens, backbone.context or run.config.max_tokens)
    read = tokenise(table, backbone.tokenizer, task_index=tasks, max_tokens=max_tokens)
    if read.num_dropped:
        print(f"note: {read.num_dropped} of the foreign texts have no token and were left out", file=sys.stderr)
    split = read.split
    known = {_key(each, n) for each in (run.data.train, run.data.validation, run.data.test) for n in range(len(each))}
    kept = [n for n in range(len(split)) if _key(split, n) not in known]
    if not kept:
        raise InputError(f"every text of {config.foreign} is a document of the run; give texts that belong to no task")
    if left_out := len(split) - len(kept):
        print(f"note: {left_out} of the foreign texts are documents of the run and were left out", file=sys.stderr)
    return sample_texts(split.subset(torch.tensor(kept)), config.foreign_documents, seed=config.seed)


def read_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl file.

    Raises:
        InputError: the file does not exist or is not a .jsonl file, or a line is not a question.
    """
    if not path.is_file() or path.suffix != ".jsonl":
        raise InputError(
            f"questions {path} is no .jsonl file; give one with a JSON object per line: prompt, options, correct, task"
        )
    questions, names = [], ("prompt", "options", "correct", "task")
    for number, row in enumerate(read_file(path).to_dict("records"), start=1):
        where = f"questions {path}, question {number}"
        for name in names:
            if name not in row:
                raise InputError(
                    f"questions {path} has no {name!r}; a question has {', '.join(names)}{nearest(name, map(str, row))}"
                )
        if not isinstance(row["options"], list):
            raise InputError(f"{where}: options is {row['options']!r:.40}; give a list of two texts or more")
        try:
            questions.append(Question(**{name: row[name] for name in names}))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if not questions:
        raise InputError(f"questions {path} is empty; give a JSON object per line: prompt, options, correct, task")
    return questions


def _key(split: TokenSplit, n: int) -> bytes:
    return split.document(n).numpy().tobytes()


@contextlib.contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. Its files are moved into ``folder`` at the end; after an error none are."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"output {folder} cannot be written ({reason}); give another --output") from None
    try:
        with place as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                os.replace(file, folder / file.name)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


COMMAND = Command("calibrate", CalibrateConfig, calibrate, lambda config, folder: print(f"calibration: {folder}"))
