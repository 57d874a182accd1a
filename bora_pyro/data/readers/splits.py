"""Splits that a source has by itself: those of a ``DatasetDict``, and those that the names of files and folders say.

>>> split_in_name("corpus/train/ada-00001.jsonl"), split_in_name("dev.csv"), split_in_name("latest.csv")
('train', 'validation', None)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath, PurePosixPath

from bora_pyro.data.readers.raw import Part, RawTable
from bora_pyro.data.split_names import SPLITS, find_split
from bora_pyro.errors import InputError, nearest, shown

_WORDS = re.compile(r"[^\W\d_]+")


def split_in_name(name: str | PurePath, *, folders_only: bool = False) -> str | None:
    """The side of a split that a word in a path names; the file's own name decides before its folders.

    Args:
        name: a path relative to the source.
        folders_only: do not look at the file's name, which names a task.
    """
    path = PurePosixPath(name)
    parts = [*reversed(path.parts[:-1])] if folders_only else [path.name.partition(".")[0], *reversed(path.parts[:-1])]
    for part in parts:
        if sides := [side for word in _WORDS.findall(part) if (side := find_split(word)) is not None]:
            return sides[0]
    return None


def splits_of_names(names: Sequence[str], label: str, *, folders_only: bool = False) -> list[str | None]:
    """The side of each file; None for all if no two files are of two sides and not all are of one.

    Raises:
        InputError: some names say a side and others do not.
    """
    found = [split_in_name(name, folders_only=folders_only) for name in names]
    if len(set(found) - {None}) < 2:
        return found if None not in found else [None] * len(found)
    if None in found:
        with_side, without = next(n for n, side in zip(names, found, strict=True) if side), names[found.index(None)]
        raise InputError(
            f"{label} has files named for a split, such as {shown(with_side)}, and others, such as {shown(without)}; name all of "
            "them for a split (train, validation, test), or none"
        )
    return found


def check_no_hub_split(label: str, hub_split: str | None) -> None:
    """Raise ``InputError`` if one split of a source without splits is asked for."""
    if hub_split is not None:
        raise InputError(f"hub_split is {shown(hub_split)}, but {label} has no splits; leave it out")


def table_of_splits(label: str, parts: Mapping[str, Sequence[Part]], hub_split: str | None, notes: Sequence[str]) -> RawTable:
    """A table of parts that belong to named splits.

    Several splits give each row its side in the column ``split``. The one that ``hub_split`` names gives none, and neither does a
    single one, unless it is for validation or test: its documents may not train.

    Args:
        label: the name of the source.
        parts: the parts by split; "" is the name of parts of no split.
        hub_split: the split to read alone; None: all.
        notes: lines for the user.

    Raises:
        InputError: there is no such split, or one of several has a name that stands for no side.
    """
    names = ", ".join(shown(name) for name in parts)
    if [*parts] == [""]:
        check_no_hub_split(label, hub_split)
    if not parts:
        raise InputError(f"{label} has no splits; save one with a split 'train'")
    if hub_split is not None:
        if hub_split not in parts:
            raise InputError(f"hub_split is {shown(hub_split)}; the splits of {label} are {names}{nearest(hub_split, parts)}")
        return RawTable(label, parts[hub_split], notes=notes)
    if len(parts) == 1 and find_split(next(iter(parts))) in (None, "train"):
        [(name, own_parts)] = parts.items()
        return RawTable(label, own_parts, notes=[*notes, f"{label} has the split {shown(name)} alone"] if name else notes)
    for name in parts:
        if find_split(name) is None:
            raise InputError(
                f"{label} has the splits {names}, and {shown(name)} stands for none of {', '.join(SPLITS)}; read one split alone "
                "with hub_split to have it split by group"
            )
    joined, own = [], False
    for side in SPLITS:
        for name, of_name in parts.items():
            if find_split(name) == side:
                own = own or any("split" in part.columns for part in of_name)
                joined += [dataclasses.replace(part, fixed={**part.fixed, "split": side}) for part in of_name]
    replaced = [f"{label} is split by itself; the column 'split' of its rows is not read"] if own else []
    return RawTable(label, joined, notes=[*notes, *replaced], has_splits=True)
