"""A text, all of which is predicted: the column ``text``, or those that ``text_column`` names.

>>> form = Text(("title", "body"))
>>> form.read({"title": "On engines", "body": "They compute."}, "row 1")
{'text': 'On engines\\n\\nThey compute.'}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bora_pyro.data.forms.base import Content, Table
from bora_pyro.data.forms.values import text_of

#: The separator between texts from several columns.
TEXT_SEPARATOR = "\n\n"


class Text:
    """The text of one column, or the texts of several, joined by a blank line.

    Args:
        names: the columns.
    """

    name: ClassVar[str] = "text"
    usual: ClassVar[str] = "text"
    content: tuple[str, ...] = ("text",)
    missing = "empty text"
    recognised = "texts"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.columns = [("text_column", name) for name in names]

    @classmethod
    def recognise(cls, table: Table) -> Text | None:
        """Texts in the columns that the options name."""
        return cls(table.columns.text) if table.has(*table.columns.text) else None

    def read(self, cells: Mapping[str, Any], where: str) -> Content | None:
        """The text of one row."""
        texts = [text_of(cells[name], f"{where}: column {name!r}") for name in self.names]
        texts = [text for text in texts if text.strip()]
        return {"text": TEXT_SEPARATOR.join(texts)} if texts else None

    def notes(self) -> list[str]:
        """Nothing."""
        return []
