"""The configuration of an adaptation to new tasks.

>>> config = parse_config(AdaptConfig, ["runs/demo", "--data", "new.csv", "--guide", "normal"])
>>> config.run, config.data, config.steps
('runs/demo', 'new.csv', 60)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.options import DataOptions
from bora_pyro.data.readers.options import COLUMN, ReadingOptions, check_reading
from bora_pyro.errors import InputError
from bora_pyro.inference.adapt import ALLOWED
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import changed, check_fields, option, part_of
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, SourceOptions, check_device

__all__ = ["AdaptConfig", "parse_config"]

ADAPTATION = "adaptation"


@dataclass(kw_only=True)
class AdaptConfig:
    """Adapt a finished fit to new tasks with few documents each: Theta and tau stay fixed, the new deviations are inferred."""

    run: str = option("", "folder of the fit, its output_dir", positional=True)

    data: str | list[str] = changed(
        SourceOptions, "data", "", "the documents of the new tasks, in any form that map_fit.py reads"
    )
    separator: str | None = changed(ReadingOptions, "separator", None)
    quoting: str | None = changed(ReadingOptions, "quoting", None)
    encoding: str | None = changed(ReadingOptions, "encoding", None)
    header: bool = changed(ReadingOptions, "header", True)
    task_from: str = changed(ReadingOptions, "task_from", COLUMN)
    task_column: str | list[str] | None = changed(
        DataOptions, "task_column", None, "column that names a document's task, or several (default: as in the fit)"
    )
    text_column: str | list[str] | None = changed(
        DataOptions,
        "text_column",
        None,
        "column that holds a document's text, or several (default: text, prompt and completion, or chat, as in the fit)",
    )
    prompt_column: str | None = changed(
        DataOptions, "prompt_column", None, "column with a prompt, which is read but not predicted (default: see text_column)"
    )
    completion_column: str | None = changed(
        DataOptions, "completion_column", None, "column with the text after the prompt (default: see text_column)"
    )
    options_column: str | None = changed(
        DataOptions, "options_column", None, "column with the options of each prompt (default: see text_column)"
    )
    messages_column: str | None = changed(DataOptions, "messages_column", None, "column with a chat (default: see text_column)")
    document_form: str | None = changed(
        DataOptions, "document_form", None, "how a row is a document (default: as in the fit, or auto where a column is named)"
    )
    chat_template: str | None = changed(
        DataOptions,
        "chat_template",
        None,
        "a .jinja file with the chat template, or the template itself (default: as in the fit)",
    )
    group_column: str | None = changed(
        DataOptions,
        "group_column",
        None,
        "rows with the same value in this column are one document (default: doc_id if the table has it)",
    )
    split_column: str | None = changed(
        DataOptions,
        "split_column",
        None,
        "column that says train, validation or test (default: the splits that the data has; else all documents are for training)",
    )
    hub_split: str | None = changed(
        DataOptions,
        "hub_split",
        None,
        "of a source with several splits, read this one alone, all for training (default: all, each for what its name says)",
    )
    max_tokens: int | None = changed(
        DataOptions, "max_tokens", None, "tokens of a document that are read (default: as in the fit)"
    )
    max_train_documents: int | None = changed(
        DataOptions, "max_train_documents", None, "largest number of documents of a task (default: all)"
    )

    task_group: str | None = option(
        None,
        "the group of the fit that all new tasks belong to, if the fit has groups of tasks (default: none of them)",
        group=ADAPTATION,
        filled=True,
    )
    guide: str = option("map", "how the posterior is approximated; map is a point estimate", group=ADAPTATION, choices=ALLOWED)
    steps: int = option(
        60, "optimiser steps of each task, rounded up to whole passes over its documents", group=ADAPTATION, least=1
    )
    learning_rate: float = changed(FitOptions, "learning_rate", 1e-2, group=ADAPTATION)
    scale: float = option(
        0.1, "initial standard deviations in units of the prior's, for guides that learn them", group=ADAPTATION, positive=True
    )
    token_budget: int | None = changed(
        FitOptions, "token_budget", None, "tokens of a batch, padding included (default: as in the fit)", group=ADAPTATION
    )
    seed: int = changed(FitOptions, "seed", 0, "seed of the order of the documents and of the guide's draws", group=ADAPTATION)

    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    device: str = changed(BaseOptions, "device", "auto")
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/adapted", "folder of the new run")
    overwrite: bool = changed(RunOptions, "overwrite", False)

    def validate(self) -> None:
        """Check every value that can be checked without the run.

            >>> AdaptConfig(run="runs/demo", data="new.csv", steps=0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: steps is 0; give a whole number from 1 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in adapt.py runs/map_fit --data new.csv")
        if not all(name.strip() for name in ([self.data] if isinstance(self.data, str) else self.data)):
            raise InputError("no data is given; name the documents of the new tasks, as in --data new.csv")
        check_fields(self)
        check_reading(part_of(self, ReadingOptions))
        check_device(self.device)

    @property
    def documents(self) -> dict[str, Any]:
        """The options of the documents, by name, as in the configuration of a fit."""
        names = [field.name for field in dataclasses.fields(DataOptions)]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}
