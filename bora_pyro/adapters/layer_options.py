"""Options of an adapter that speak of some of the layers, as texts: which layers, and a rank for each kind of layer.

>>> kind = Slot("q_proj", ("layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"), 4, 4)
>>> [ChosenLayers.read("task_layers", "-1, fc1 q_proj").has(kind, path) for path in kind.paths]
[False, False, True]
>>> read_ranks("module_ranks", "fc1:16/4, q_proj:8")
{'fc1': (16, 4), 'q_proj': (8, None)}

The parts of such a text are separated by commas or spaces. A kind of layer has the name that a fit prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bora_pyro.backbone.blocks import block_number, blocks_of, names_blocks, parts_of
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, nearest, shown

#: The largest rank of an adapter. The memory for a larger one would be requested at once.
LARGEST_RANK = 2**16
_RANKS = re.compile(r"(?P<kind>[^:]+):(?P<rank>\d{1,9})(/(?P<other>\d{1,9}))?")


@dataclass(frozen=True)
class ChosenLayers:
    """Some of the adapted layers: those in one of these blocks and of one of these kinds.

    Attributes:
        option: the name of the option, for error messages.
        blocks: the blocks, as texts: a number from 0, a number from -1 downwards that counts from the last block of the kind, or
            a range as in Python, such as ``-4:`` or ``2:6``. Empty: all blocks.
        kinds: names of kinds of layers. Empty: all kinds.
    """

    option: str
    blocks: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @classmethod
    def read(cls, option: str, text: str) -> ChosenLayers:
        """The layers that a text names: numbers and ranges are blocks, all other parts are kinds.

        Raises:
            InputError: the text names nothing.
        """
        if not (parts := parts_of(text)):
            raise InputError(f"{option} is {shown(text)}; name blocks (-1 is the last one) or kinds of layers, or leave it out")
        blocks = tuple(part for part in parts if names_blocks(part))
        return cls(option, blocks, tuple(part for part in parts if part not in blocks))

    def has(self, slot: Slot, path: str) -> bool:
        """Whether a layer is chosen.

        Args:
            slot: its kind.
            path: its path.
        """
        if self.kinds and slot.name not in self.kinds:
            return False
        return not self.blocks or any(block_number(path) in _range(part, slot) for part in self.blocks)

    def number(self, slot: Slot) -> int:
        """How many of the layers of a kind are chosen."""
        return sum(self.has(slot, path) for path in slot.kind_paths or slot.paths)

    def check(self, slots: Sequence[Slot]) -> None:
        """Check that there are layers of each of the kinds and in each of the blocks.

        Args:
            slots: all adapted layers.

        Raises:
            InputError: a kind or a block has none.
        """
        check_kinds(self.option, self.kinds, slots)
        chosen = [slot for slot in slots if not self.kinds or slot.name in self.kinds]
        for part in self.blocks:
            if not any(block_number(path) in _range(part, slot) for slot in chosen for path in slot.paths):
                there = sorted({block_number(path) for slot in chosen for path in slot.paths})
                raise InputError(
                    f"{self.option} names block {part}, in which there is no such layer; the first is block {there[0]} and the "
                    f"last is block {there[-1]}"
                )


def _range(part: str, slot: Slot) -> range:
    """The blocks that a part of the text stands for, among those of a kind of layer."""
    return blocks_of(part, 1 + max(map(block_number, slot.kind_paths or slot.paths)))


def read_ranks(option: str, text: str) -> dict[str, tuple[int, int | None]]:
    """Ranks by kind of layer from a text of ``kind:rank`` or ``kind:rank/rank``. The second rank is None where it is not given.

    Raises:
        InputError: a part has another form, a rank is not from 1 to ``LARGEST_RANK``, or a kind is given twice.
    """
    ranks: dict[str, tuple[int, int | None]] = {}
    for part in parts_of(text):
        if (found := _RANKS.fullmatch(part)) is None:
            raise InputError(f"{option} has {shown(part)}; give kind:rank or kind:rank/rank, for example q_proj:8 or q_proj:8/4")
        if found["kind"] in ranks:
            raise InputError(f"{option} has {shown(found['kind'])} twice; give it once")
        rank, other = int(found["rank"]), None if found["other"] is None else int(found["other"])
        for value in (rank, other):
            if value is not None:
                check_rank(f"{option} for {found['kind']}", value)
        ranks[found["kind"]] = rank, other
    if not ranks:
        raise InputError(f"{option} is {shown(text)}; give kind:rank, for example q_proj:8, or leave it out")
    return ranks


def check_rank(what: str, rank: Any) -> int:
    """The rank as a whole number, from a number or a text.

    >>> check_rank("rank of task 'ada'", "8")
    8

    Raises:
        InputError: it is not a whole number from 1 to ``LARGEST_RANK``.
    """
    try:
        number = math.nan if isinstance(rank, bool) else float(rank)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (1 <= number <= LARGEST_RANK and number == int(number)):
        raise InputError(f"{what} is {shown(rank)}; give a whole number from 1 to {LARGEST_RANK}")
    return int(number)


def check_kinds(option: str, kinds: Sequence[str], slots: Sequence[Slot]) -> None:
    """Check that each name is that of a kind of adapted layer.

    Raises:
        InputError: one is not.
    """
    known = [slot.name for slot in slots]
    for kind in kinds:
        if kind not in known:
            raise InputError(
                f"{option} names {shown(kind)}, which is no kind of adapted layer; there are {', '.join(known)}"
                f"{nearest(kind, known)}"
            )
