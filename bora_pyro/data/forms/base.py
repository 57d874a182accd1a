"""What a form of documents is, and what it is recognised by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from bora_pyro.data.chat_template import ChatTemplate
from bora_pyro.data.columns import Columns
from bora_pyro.data.forms.values import is_present

#: Texts, by column, of one row: ``text``; ``prompt`` and ``text``, and ``options`` if there are; or ``messages``.
Content = dict[str, str]


@dataclass
class Table:
    """What a form is recognised by.

    Attributes:
        names: the names of all columns.
        rows: the first rows.
        label: the name of the table in errors.
        template: the template that will write chats; None if there is none, or it is not known.
        columns: the columns that the options name.
    """

    names: Sequence[Any]
    rows: Sequence[Mapping[str, Any]] = ()
    label: str = "the table"
    template: ChatTemplate | None = None
    columns: Columns = field(default_factory=Columns)

    def has(self, *names: str) -> bool:
        """Whether the table has all these columns."""
        return all(name in self.names for name in names)

    def one_of(self, *names: str) -> str | None:
        """The first of these columns that the table has."""
        return next((name for name in names if name in self.names), None)

    def first(self, column: str) -> Any:
        """The first cell of a column, within the first rows, that holds something; None if there is none."""
        return next((row[column] for row in self.rows if is_present(row.get(column))), None)


class Form(Protocol):
    """One form of documents: which columns it reads, and how a row becomes a document.

    Attributes:
        name: the value of ``document_form``.
        usual: the columns that the form is known by, for errors.
        columns: (option, column) for each column that is read. The option is ``document_form`` for columns with fixed
            names, and "" for those that a document can do without.
        content: names of the texts of a document: ``text``; ``prompt`` and ``text``, and ``options`` if there are; or
            ``messages``.
        missing: what a row without a document lacks, for notes.
        recognised: what was recognised, for a note.
    """

    name: ClassVar[str]
    usual: ClassVar[str]
    columns: list[tuple[str, str]]
    content: tuple[str, ...]
    missing: str
    recognised: str

    @classmethod
    def recognise(cls, table: Table) -> Self | None:
        """The form with the columns of a table, or None if the table is not of this form."""

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The document of one row; None if there is none.

        Raises:
            InputError: a cell cannot be used.
        """

    def notes(self) -> list[str]:
        """One line for each thing that the user should know of the documents that were read."""
