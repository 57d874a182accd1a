"""Which blocks of a model: numbers, numbers from the end, and ranges of them, as texts.

>>> [[*blocks_of(part, 12)] for part in ("3", "-1", "0-2", "-2:", "4:6")]
[[3], [11], [0, 1, 2], [10, 11], [4, 5]]
>>> paths = [f"layers.{n}.q_proj" for n in range(4)]
>>> [*paths_in_blocks(paths, ["0-1"], paths)]
['layers.0.q_proj', 'layers.1.q_proj']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bora_pyro.backbone.usual_targets import block_of, pattern_of
from bora_pyro.errors import InputError, shown

_BLOCKS = re.compile(r"(?P<one>-?\d{1,9})|(?P<low>\d{1,9})-(?P<high>\d{1,9})|(?P<first>-?\d{1,9})?:(?P<last>-?\d{1,9})?")


def parts_of(text: str) -> list[str]:
    """The parts of a text between commas or spaces.

    >>> parts_of("-1, fc1 fc2")
    ['-1', 'fc1', 'fc2']
    """
    return [part for part in re.split(r"[,\s]+", text) if part]


def names_blocks(text: str) -> bool:
    """Whether a text stands for blocks: a number from 0, a number from -1 downwards, ``0-3`` or a range as in Python.

    >>> [names_blocks(text) for text in ("0", "-1", "0-3", "-4:", "q_proj", "3-")]
    [True, True, True, True, False, False]
    """
    return _BLOCKS.fullmatch(text) is not None


def blocks_of(text: str, count: int) -> range:
    """The numbers of the blocks that a text stands for. ``0-3`` has its last number in it, ``0:3`` has not.

    Args:
        text: a text for which `names_blocks` is true.
        count: the number of blocks.
    """
    found = _BLOCKS.fullmatch(text)
    assert found is not None
    if found["low"] is not None:
        return range(int(found["low"]), int(found["high"]) + 1)
    if found["one"] is None:
        return range(count)[slice(*(None if found[end] is None else int(found[end]) for end in ("first", "last")))]
    one = int(found["one"]) + (count if text.startswith("-") else 0)
    return range(one, one + 1)


def block_number(path: str) -> int:
    """The number of the block that a layer is in: the first number in its path; 0 without one.

    >>> block_number("model.decoder.layers.3.self_attn.q_proj")
    3
    """
    return next((int(part) for part in path.split(".") if part.isdecimal()), 0)


def paths_in_blocks(paths: Iterable[str], blocks: Sequence[str], every_path: Iterable[str]) -> list[str]:
    """The layers that are in one of some blocks.

    Args:
        paths: the paths of the layers.
        blocks: the blocks, as texts. Numbers from the end count within the stack of a layer, such as ``model.layers``.
        every_path: the paths of all linear layers, which say how many blocks a stack has.

    Raises:
        InputError: a text is not one of blocks, or none of the layers is in its blocks.
    """
    counts: dict[str, int] = {}
    for path in every_path:
        counts[_stack(path)] = max(counts.get(_stack(path), 0), 1 + block_number(path))
    paths = list(paths)
    chosen: set[str] = set()
    for text in blocks:
        if not names_blocks(text):
            raise InputError(f"layers has {shown(text)}; give blocks by number, as 0, -1 (the last one), 0-3 or -4:")
        found = [path for path in paths if block_number(path) in blocks_of(text, counts[_stack(path)])]
        if not found:
            there = sorted(map(block_number, paths))
            raise InputError(
                f"layers names the blocks {shown(text)}, in which there is no target layer; there are some from block {there[0]} "
                f"to block {there[-1]}"
            )
        chosen.update(found)
    return [path for path in paths if path in chosen]


def _stack(path: str) -> str:
    return pattern_of(block_of(path))
