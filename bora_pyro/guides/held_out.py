"""What held-out documents say of a guide's draws, for guides that leave something to be chosen by it after their fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bora_pyro.errors import InputError, shown


class HeldOut(Protocol):
    """Held-out documents, and how well the mixture of a guide's draws predicts them.

    Attributes:
        documents: the number of documents of each task, (D,).
        tokens: the number of their predicted tokens, (D,); for answers among options that of the questions.
    """

    documents: Tensor
    tokens: Tensor

    def nll(self) -> Tensor:
        """−log-probability of the documents of each task under the mixture of the guide's draws as it is now: (D,) float64.

        The draws have the same random numbers each time.
        """


@runtime_checkable
class Settles(Protocol):
    """A guide that leaves something to be chosen by held-out documents."""

    def settle(self, held_out: HeldOut) -> dict[str, Any]:
        """Choose it, and return what was chosen, JSON-able; ``notes`` in it are sentences for the user."""


def positive_numbers(what: str, given: str | Sequence[float]) -> list[float]:
    """Positive numbers, given as such or as a text with commas.

        >>> positive_numbers("scales", "0.1, 1,3")
        [0.1, 1.0, 3.0]

    Raises:
        InputError: there is none, or one is not a finite number above 0.
    """
    parts = given.split(",") if isinstance(given, str) else given
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise InputError(f"{what} is {shown(given)}; give finite numbers above 0 with commas between them, for example 0.1,1,3")
    return numbers
