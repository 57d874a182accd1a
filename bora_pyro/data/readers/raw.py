"""The rows of a source before they become documents: cells as they are written, and the place of each row.

>>> part = Part("file 'a.csv'", ["task", "meta"], lambda columns, notes: iter([("line 2", {"task": "Ada", "meta": {"n": 7}})]))
>>> raw = RawTable("file 'a.csv'", [part])
>>> list(raw)
[('line 2', {'task': 'Ada', 'meta': {'n': 7}})]
>>> list(raw.only(["meta.n"]))
[('line 2', {'meta.n': 7})]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

from bora_pyro.errors import InputError, nearest, shown

#: A row: its place in the file, such as ``line 17``, and its cells by column.
Row: TypeAlias = tuple[str, dict[str, Any]]


@dataclass
class Part:
    """One file, or another container of rows, that was opened: its columns are known, and no handle is open.

    Attributes:
        name: the name of the container in messages, such as ``file 'a.csv'``.
        columns: the names of all columns.
        rows: starts a new pass over the rows. Its first argument names the columns that are wanted; None: all. Further columns
            may come too. A missing cell is None. At the end of the pass, lines for the user are added to its second argument.
        notes: lines for the user: how the container was opened.
        ragged: whether a row may lack a column, as in JSON.
        fixed: columns whose value is the same in all rows, such as the task that the file's name gives.
    """

    name: str
    columns: list[str]
    rows: Callable[[Sequence[str] | None, list[str]], Iterator[Row]]
    notes: list[str] = field(default_factory=list)
    ragged: bool = False
    fixed: dict[str, str] = field(default_factory=dict)


class RawTable:
    """The rows of a source. It may be read several times.

    Attributes:
        label: the name of the source, for errors.
        columns: the names of all columns. A column with ``a.b`` may be asked for where ``a`` holds mappings with a key ``b``.
        notes: lines for the user: how the source was read, and what was left out. They are complete after a pass.
        has_splits: whether the source itself is split; the rows then have a column ``split`` with the values ``train``,
            ``validation`` and ``test``.
        num_rows: the number of rows of the last pass.
    """

    def __init__(self, label: str, parts: Sequence[Part], *, notes: Sequence[str] = (), has_splits: bool = False) -> None:
        self.label, self.parts, self.has_splits = label, list(parts), has_splits
        self.columns = list(dict.fromkeys(name for part in parts for name in (*part.columns, *part.fixed)))
        if len(parts) == 1:  # a table in memory may have a column twice; whoever reads that column refuses it
            self.columns = [*parts[0].columns, *(name for name in parts[0].fixed if name not in parts[0].columns)]
        self.num_rows = 0
        self._own_notes, self._pass_notes = [*notes, *(note for part in parts for note in part.notes)], list[str]()
        self._wanted: list[str] | None = None
        _check_same_columns(parts)

    @property
    def notes(self) -> list[str]:
        """Lines for the user; complete after a pass."""
        return [*self._own_notes, *self._pass_notes]

    def column_of(self, name: str) -> str | None:
        """The column in which ``name`` is found: itself, or that of a nested name or of a number; None: there is none.

        >>> raw = RawTable("the table", [Part("t", ["meta", "a.b", "column3"], lambda columns, notes: iter(()))])
        >>> raw.column_of("meta.speaker"), raw.column_of("a.b"), raw.column_of("3"), raw.column_of("b")
        ('meta', 'a.b', 'column3', None)
        """
        return column_of(name, self.columns)

    def with_nested(self, names: Sequence[str]) -> list[str]:
        """All columns, with those of ``names`` that lie in one of them, such as ``meta.speaker`` in ``meta``."""
        return [*self.columns, *(name for name in names if name not in self.columns and self.column_of(name) is not None)]

    def only(self, names: Sequence[str], *, optional: Sequence[str] = ()) -> RawTable:
        """The same table with these columns, nested ones under their whole names.

        Args:
            names: the columns.
            optional: those of them that a file of JSON may lack if another file has them; the cells of its rows are None.

        Raises:
            InputError: a part has no such column.
        """
        found = copy.copy(self)
        found._wanted = list(dict.fromkeys(names))
        for part in self.parts:
            own = [*part.columns, *part.fixed]
            for name in found._wanted:
                if column_of(name, own) is None and not (part.ragged and name in optional):
                    where = self.label if len(self.parts) == 1 else f"{self.label}: {part.name}"
                    raise InputError(f"{where} has no column {shown(name)}; it has {listed(own)}{nearest(name, own)}")
        return found

    def take_counts(self, other: RawTable) -> None:
        """Take the notes and the number of rows from a pass over a part of the columns."""
        self._pass_notes, self.num_rows = other._pass_notes, other.num_rows

    def head(self, count: int, names: Sequence[str] | None = None) -> list[Row]:
        """The first rows, at most ``count``; with ``names``, these columns, nested ones too, as far as a row has them."""
        found = copy.copy(self)
        found._wanted = self._wanted if names is None else list(dict.fromkeys(names))
        return list(islice(found._rows([]), count))

    def __iter__(self) -> Iterator[Row]:
        self._pass_notes, self.num_rows = [], 0
        for row in self._rows(self._pass_notes):
            self.num_rows += 1
            yield row

    def _rows(self, notes: list[str]) -> Iterator[Row]:
        several = len(self.parts) > 1
        for part in self.parts:
            own = [*part.columns, *part.fixed]
            roots = None if self._wanted is None else [column_of(name, own) or name for name in self._wanted]
            narrow = self._wanted is not None and (roots != self._wanted)
            wanted = None if roots is None else [name for name in roots if name not in part.fixed]
            for place, cells in part.rows(wanted, notes):
                if part.fixed:
                    cells = {**cells, **part.fixed}
                if several:
                    place = f"{part.name}, {place}"
                if narrow:
                    cells = {name: _value(name, cells, place) for name in self._wanted or ()}
                yield place, cells


def listed(names: Sequence[object], *, most: int = 20) -> str:
    """Names in a message: at most ``most``, each cut short."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!s:.60}" for name in names[:most]) + more


def column_of(name: str, columns: Sequence[str]) -> str | None:
    """The column in which ``name`` is found, as :meth:`RawTable.column_of` says."""
    if name in columns:
        return name
    if name.isdecimal() and f"column{name}" in columns:
        return f"column{name}"
    parts = name.split(".")
    roots = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((root for root in roots if root in columns), None)


def _value(name: str, cells: Mapping[str, Any], place: str) -> Any:
    """The cell of a column, or what lies at the nested name in it; None where the mappings end earlier."""
    if name in cells:
        return cells[name]
    root = column_of(name, list(cells))
    if root is None:
        return None
    value = cells[root]
    for key in name[len(root) + 1 :].split(".") if name.startswith(f"{root}.") else ():
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise InputError(f"{place}: column {root!r} is a {type(value).__name__} ({shown(value)}), in which {name!r} is not")
        value = value.get(key)
    return value


def _check_same_columns(parts: Sequence[Part]) -> None:
    tables = [part for part in parts if not part.ragged]
    for part in tables[1:]:
        first = tables[0]
        if more := [name for name in part.columns if name not in first.columns]:
            raise InputError(f"{part.name} has the column {shown(more[0])}, which {first.name} has not{_cure(first)}")
        if less := [name for name in first.columns if name not in part.columns]:
            raise InputError(f"{part.name} has no column {shown(less[0])}, which {first.name} has{_cure(first)}")


def _cure(first: Part) -> str:
    return f"; files that are read together need the same columns: {listed(first.columns)}"
