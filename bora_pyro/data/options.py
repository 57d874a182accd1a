"""The options of ``load_tasks``. The configuration of a fit inherits them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.columns import AUTO, DOCUMENT_FORMS, Columns
from bora_pyro.data.encode import LONG_DOCUMENTS
from bora_pyro.data.readers.options import COLUMN, DATA, ReadingOptions, check_reading
from bora_pyro.errors import InputError, shown
from bora_pyro.options.field import check_fields, option
from bora_pyro.options.seed import Seeded


@dataclass(kw_only=True)
class DataOptions(ReadingOptions, Seeded):
    """Options of :func:`~bora_pyro.data.tasks.load_tasks`; the help of each field is its documentation.

    >>> DataOptions(max_tokens=64).columns  # doctest: +NORMALIZE_WHITESPACE
    Columns(task=('task',), text=('text',), group=None, split=None, prompt=None, messages=None, text_option='text_column',
            document_form='auto', options=None, task_group=None)
    >>> DataOptions(max_tokens=1).validate()
    Traceback (most recent call last):
    bora_pyro.errors.InputError: max_tokens is 1; give a whole number from 2 up
    """

    task_column: str | list[str] = option(
        "task", "column that names a document's task, or several, whose names are joined by ' / '", group=DATA, filled=True
    )
    text_column: str | list[str] = option(
        "text",
        "column that holds a document's text, or several, whose texts are joined by a blank line",
        group=DATA,
        filled=True,
    )
    prompt_column: str | None = option(
        None,
        "column with a prompt, read before the completion and not predicted (default: no prompts)",
        group=DATA,
        filled=True,
    )
    completion_column: str | None = option(
        None, "column with the text that follows the prompt and is predicted (default: text_column)", group=DATA, filled=True
    )
    options_column: str | None = option(
        None,
        "column with the options of each prompt, a list of texts or its JSON, one of which is the completion: what --likelihood "
        "choice observes; metrics.json has the accuracy (default: no options; with --likelihood dpo: rejected)",
        group=DATA,
        filled=True,
    )
    messages_column: str | None = option(
        None,
        "column with a chat, a list of {role, content}; the assistant's turns are predicted (default: no chats)",
        group=DATA,
        filled=True,
    )
    chat_template: str | None = option(
        None, "a .jinja file that writes chats, or its text (default: the tokenizer's own)", group=DATA, filled=True
    )
    document_form: str = option(
        AUTO,
        "how a row is a document; auto recognises it by the columns where no column option is given, and says so in a note",
        group=DATA,
        choices=DOCUMENT_FORMS,
    )
    group_column: str | None = option(
        None,
        "documents that agree here stay on one side of the split (default: doc_id where the table has it)",
        group=DATA,
        filled=True,
    )
    task_group_column: str | None = option(
        None,
        "column with the group that a row's task belongs to, as a speaker's party: the prior then has a level of groups between "
        "the tasks and Theta (default: no groups)",
        group=DATA,
        filled=True,
    )
    split_column: str | None = option(
        None,
        "column that says train, validation or test, or val, dev, eval, ... (default: the splits that the data has, or a seeded "
        "split by group)",
        group=DATA,
        filled=True,
    )
    hub_split: str | None = option(
        None,
        "of a source with several splits, read this one alone and split it by group (default: all, each for what its name says)",
        group=DATA,
        filled=True,
    )
    split_seed: int | None = option(
        None,
        "seed of the split and of the documents that are kept; fits with other seeds then have the same ones (default: seed)",
        group=DATA,
        least=0,
        most=2**32 - 1,
    )
    small_tasks: str = option(
        "error",
        "what becomes of a task with too few documents to split, or none to train on",
        group=DATA,
        choices=("error", "drop"),
    )
    num_tasks: int | None = option(None, "use only so many tasks (default: all)", group=DATA, least=1)
    # the first token is not predicted, so a document needs two
    max_tokens: int = option(256, "tokens of a document that are read, its end mark included", group=DATA, least=2)
    long_documents: str = option(
        "cut",
        "what becomes of documents of more tokens: cut, or split into pieces, each behind the document's prompt",
        group=DATA,
        choices=LONG_DOCUMENTS,
    )
    streaming: bool = option(False, "read row by row, and keep the tokens in a file instead of memory", group=DATA)
    max_train_documents: int | None = option(
        None, "at most so many training documents of a task (default: all)", group=DATA, least=1
    )
    max_eval_documents: int | None = option(
        None, "at most so many validation and so many test documents of a task (default: all)", group=DATA, least=1
    )

    @property
    def seed_of_split(self) -> int:
        """The seed of the split."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def column_options(self) -> dict[str, Any]:
        """The options that name columns, as ``read_table`` takes them."""
        names = [field.name for field in dataclasses.fields(DataOptions) if field.name.endswith("_column")]
        return {name: getattr(self, name) for name in names}

    @property
    def content_options(self) -> dict[str, Any]:
        """The options that say what the content is: a text, a prompt and its completion, or a chat, and its columns."""
        others = ("task_column", "group_column", "split_column", "task_group_column")
        columns = {name: value for name, value in self.column_options.items() if name not in others}
        return {**columns, "document_form": self.document_form}

    @property
    def columns(self) -> Columns:
        """The columns of the table.

        Raises:
            InputError: the options do not fit together.
        """
        return Columns.given(**self.column_options, document_form=self.document_form)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        check_reading(self)
        if self.task_from != COLUMN and self.task_column != "task":
            raise InputError(f"task_from is {self.task_from} and task_column is {shown(self.task_column)}; give one of them")
        _ = self.columns
