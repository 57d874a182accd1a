"""The options of the documents of new tasks, of which a finished fit says what is not given.

>>> NewDocuments(data="new.csv", text_column="body").documents["text_column"]
'body'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.options import DataOptions
from bora_pyro.data.readers.options import COLUMN, ReadingOptions, check_reading
from bora_pyro.errors import InputError
from bora_pyro.options.field import changed, check_fields, part_of
from bora_pyro.runs.config.groups import SourceOptions


@dataclass(kw_only=True)
class NewDocuments:
    """The documents of new tasks."""

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

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not all(name.strip() for name in ([self.data] if isinstance(self.data, str) else self.data)):
            raise InputError("no data is given; name the documents of the new tasks, as in --data new.csv")
        check_fields(self)
        check_reading(part_of(self, ReadingOptions))

    @property
    def documents(self) -> dict[str, Any]:
        """The options of the documents, by name, as in the configuration of a fit.

        A seed is one of them only where the configuration has one.
        """
        names = [field.name for field in dataclasses.fields(DataOptions)]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}
