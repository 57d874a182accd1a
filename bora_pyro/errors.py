"""The one error that bad input raises: a single line that says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. Its message is one line; the command-line tools print it and exit with code 2.

    >>> import bora_pyro as bp
    >>> try:
    ...     bp.prior_from_tau(-1)
    ... except bp.InputError as error:
    ...     print(error)
    tau -1 is not allowed; it is a number from 0 (independent tasks) to inf (one shared adapter), nearest: 0
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """The clause that suggests the nearest valid name, or an empty string where none is near.

    >>> nearest("txt", ["task", "text"])
    "; did you mean 'text'?"
    """
    valid = list(valid)
    lower = {option.lower(): option for option in valid}
    match = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f"; did you mean {lower[match[0]]!r}?" if match else ""
