"""The options that say how files are read. The configuration of a fit inherits them.

>>> ReadingOptions(separator="semicolon").delimiter
';'
>>> ReadingOptions(encoding="latin1x").validate()
Traceback (most recent call last):
bora_pyro.errors.InputError: encoding is 'latin1x', which is not known; ...did you mean 'latin-1'?
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.options.field import check_fields, option

#: The heading in ``--help``.
DATA = "data"
#: Names of separators that are awkward to type.
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "\\t": "\t"}
#: Encodings that an error suggests.
ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "cp1251", "cp1250", "gb18030", "shift_jis", "euc-kr", "big5", "koi8-r")
#: The values of ``task_from``.
COLUMN, FILE, FOLDER = "column", "file", "folder"


@dataclass(kw_only=True)
class ReadingOptions:
    """How the files of documents are read; the help of each field is its documentation."""

    separator: str | None = option(
        None,
        "what separates the cells of a .csv, .tsv or .txt table: a character, or comma, semicolon, tab or pipe (default: as the "
        "ending says; another one is found if the header is a single cell that holds it)",
        group=DATA,
    )
    quoting: str | None = option(
        None,
        "quotes in .csv and .tsv: minimal: a cell in double quotes may hold separators and line breaks; none: quotes are plain "
        "text (default: minimal, and a quoted cell that seems to hold rows is refused)",
        group=DATA,
        choices=("minimal", "none"),
    )
    encoding: str | None = option(
        None, "encoding of text files, such as latin-1 (default: UTF-8, or UTF-16 where the first bytes say so)", group=DATA,
        filled=True,
    )  # fmt: skip
    header: bool = option(
        True, "the first row of a table names its columns; if false, they are column1, column2, ... (or 1, 2, ...)", group=DATA
    )
    task_from: str = option(
        COLUMN,
        "what names the task of a document: a column; the name of its file without the ending (a .txt or .md file is one "
        "document, and its folder is the task); or the name of its folder",
        group=DATA,
        choices=(COLUMN, FILE, FOLDER),
    )

    @property
    def delimiter(self) -> str | None:
        """The separator as a character; None if none is given."""
        return None if self.separator is None else SEPARATORS.get(self.separator.lower(), self.separator)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_fields(self)
        check_reading(self)


def check_reading(options: ReadingOptions) -> None:
    """Raise ``InputError`` if the separator is not one character, or if there is no such encoding."""
    delimiter = options.delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0' or delimiter.isalnum()):
        raise InputError(
            f"separator is {shown(options.separator)}; give one character that is no letter, digit, quote or line end, or "
            f"{', '.join(list(SEPARATORS)[:4])}{nearest(options.separator or '', SEPARATORS)}"
        )
    if options.encoding is not None and not _is_text_encoding(options.encoding):
        raise InputError(
            f"encoding is {shown(options.encoding)}, which is not known; give one such as {', '.join(ENCODINGS[:4])}"
            f"{nearest(options.encoding, ENCODINGS)}"
        )


def _is_text_encoding(name: str) -> bool:
    try:
        b"ab".decode(name)
    except UnicodeError:  # an encoding that these bytes are no text of
        return True
    except (LookupError, ValueError):  # no codec, one such as hex that does not encode text, or a name with a NUL byte
        return False
    return True
