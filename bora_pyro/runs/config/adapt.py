"""What an adaptation to new tasks can be told: every option of ``scripts/adapt.py``, with its default and its help.

>>> config = parse_config(AdaptConfig, ["runs/demo", "--data", "new.csv", "--guide", "normal"])
>>> config.run, config.data, config.steps
('runs/demo', 'new.csv', 60)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError
from bora_pyro.inference.adapt import ALLOWED
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import check_choices, option

__all__ = ["AdaptConfig", "parse_config"]

DATA, ADAPTATION, RUN = "data", "adaptation", "run"


#: The options that say of which kind a document is, and where it stands.
CONTENT = ("text_column", "prompt_column", "completion_column", "messages_column")
#: The options that say what the new tasks' documents are, by the names that they have in a fit's configuration.
NEW_DOCUMENTS = (
    "task_column", "text_column", "prompt_column", "completion_column", "messages_column", "chat_template", "group_column",
    "split_column", "max_tokens", "max_train_documents", "seed",
)  # fmt: skip


@dataclass(kw_only=True)
class AdaptConfig:
    """Adapt a finished fit to new tasks with few documents each: its Theta and tau stay, only the new deviations are inferred."""

    run: str = option("", "folder of the fit, its output_dir", positional=True)

    data: str = option("", "the new tasks' documents, as map_fit.py takes them", group=DATA)
    task_column: str | list[str] | None = option(
        None, "column that names a document's task, or several (default: as in the fit)", group=DATA
    )
    text_column: str | list[str] | None = option(
        None,
        "column that holds a document's text, or several (default: text, prompt and completion, or chat, as in the fit)",
        group=DATA,
    )
    prompt_column: str | None = option(
        None, "column with a prompt, read and not predicted (default: see text_column)", group=DATA
    )
    completion_column: str | None = option(None, "column with the text behind the prompt (default: see text_column)", group=DATA)
    messages_column: str | None = option(None, "column with a chat (default: see text_column)", group=DATA)
    chat_template: str | None = option(None, "a .jinja file that writes chats, or its text (default: as in the fit)", group=DATA)
    group_column: str | None = option(
        None, "documents that agree here are one (default: doc_id where the table has it)", group=DATA
    )
    split_column: str | None = option(
        None, "column that says train, validation or test (default: all documents are learned from)", group=DATA
    )
    max_tokens: int | None = option(None, "tokens of a document that are read (default: as in the fit)", group=DATA)
    max_train_documents: int | None = option(None, "at most so many documents of a task (default: all)", group=DATA)

    guide: str = option("map", "map, a point, or how the posterior is approximated", group=ADAPTATION, choices=ALLOWED)
    steps: int = option(60, "optimiser steps of each task, rounded up to whole passes over its documents", group=ADAPTATION)
    learning_rate: float = option(1e-2, "AdamW's largest learning rate", group=ADAPTATION)
    scale: float = option(0.1, "first standard deviations in units of the prior's, for guides that learn them", group=ADAPTATION)
    token_budget: int | None = option(None, "tokens of a batch, padding included (default: the fit's)", group=ADAPTATION)
    seed: int = option(0, "seed of the order of the documents and of the guide's draws", group=ADAPTATION)

    trust_remote_code: bool = option(
        False,
        "let a base model that brings code of its own run it on this machine; a file cannot say so",
        group=RUN,
        line_only=True,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps", group=RUN)
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", group=RUN)
    output_dir: str = option("runs/adapted", "the new run's folder", group=RUN)
    overwrite: bool = option(False, "replace the run that output_dir holds", group=RUN)

    def validate(self) -> None:
        """Check every value that needs no run to be checked.

            >>> AdaptConfig(run="runs/demo", data="new.csv", steps=0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: steps is 0; give a whole number from 1 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_choices(self)
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in adapt.py runs/map_fit --data new.csv")
        if not self.data.strip():
            raise InputError("no data is given; name the new tasks' documents, as in --data new.csv")
        for name in ("steps", "max_train_documents", "token_budget", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give a whole number from 1 up")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise InputError(f"max_tokens is {self.max_tokens}; give a whole number from 2 up")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; give a whole number from 0 to 2**32 - 1")
        for name in ("learning_rate", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")
