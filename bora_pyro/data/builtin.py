"""The data sources that have a name of their own: ``builtin:documentation``.

>>> list(BUILTIN)
['builtin:documentation']
>>> sorted(BUILTIN["builtin:documentation"]()[0])
['doc_id', 'task', 'text']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bora_pyro.data.documentation import documentation_rows

#: Readers of named sources, by the name that a configuration gives them. A reader returns the rows of a table, one per document:
#: the columns are those of a file, ``task``, ``text``, and whatever else the source has.
BUILTIN: dict[str, Callable[[], Sequence[Mapping[str, str]]]] = {"builtin:documentation": documentation_rows}
