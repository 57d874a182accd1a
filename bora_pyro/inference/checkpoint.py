"""The state of a fit as one safetensors file: parameters, optimiser moments, the best state, and where the loop stood.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     store = Checkpoints(Path(folder), keep=2)
...     for step in (8, 16, 24):
...         store.save(step, {"parameters": {"a": torch.tensor([float(step)])}}, {"epoch": step // 8})
...     newest = store.newest()
...     [file.name for file in store.files()], newest.progress, newest.group("parameters")
(['step-00000024.safetensors', 'step-00000016.safetensors'], {'epoch': 3}, {'a': tensor([24.])})
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bora_pyro.errors import InputError, shown
from bora_pyro.files.atomic import replace_file
from bora_pyro.files.row_file import RowTensor
from bora_pyro.files.tensors import DAMAGE, is_intact, not_a_number, write_safetensors

_NAME = "step-{}.safetensors"


def save_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor | RowTensor]], progress: dict[str, Any]) -> None:
    """Write ``groups`` of tensors and the JSON-able ``progress`` to ``path``; a crash leaves the old file or the new one.

    Raises:
        InputError: the disk is full, or it cannot be written for another reason; the old file is as it was.
    """
    tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    metadata = {"progress": json.dumps(progress)}
    replace_file(path, lambda temporary: write_safetensors(temporary, tensors, metadata, digest=True))


class Checkpoints:
    """The newest checkpoints of a fit, in a folder of their own.

    Args:
        folder: made with the first of them.
        keep: how many are kept; with two or more a damaged one costs no more than the way from the one before it.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        #: The damaged ones that ``newest`` has passed over, a line each.
        self.notes: list[str] = []

    def files(self) -> list[Path]:
        """The files, the newest first."""
        return sorted(self.folder.glob(_NAME.format("[0-9]" * 8)), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest one that is whole; None where there is none at all.

        Raises:
            InputError: there are some, and all are damaged.
        """
        self.notes = []
        for file in self.files():
            try:
                return Checkpoint(file)
            except InputError as error:
                self.notes.append(str(error).partition("; ")[0])
        if self.notes:
            raise InputError(f"{self.notes[0]}; there is no older one: start afresh with --overwrite true")
        return None

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor | RowTensor]], progress: dict[str, Any]) -> None:
        """Write the checkpoint of a step, and delete those beyond the newest ``keep``.

        Raises:
            InputError: it cannot be written; those before it stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.folder / _NAME.format(f"{step:08d}"), groups, progress)
        left_by_killed = self.folder.glob(f".{_NAME.format('*')}.tmp")
        for file in (*self.files()[self.keep :], *left_by_killed):
            file.unlink(missing_ok=True)


class Checkpoint:
    """A file that :func:`save_checkpoint` wrote, of which no more is read than is asked for.

    Args:
        path: the file.

    Raises:
        InputError: it is missing, cut short or not a checkpoint; or, once they are read, its numbers are not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.errors():
            if not is_intact(path):
                raise ValueError("it is cut short, or its bytes are not those that were written")
            self._file = safe_open(path, framework="pt").__enter__()
            self.progress: dict[str, Any] = json.loads((self._file.metadata() or {})["progress"])
            if not isinstance(self.progress, dict):
                raise ValueError("its progress is no mapping")
            self._names: dict[str, list[str]] = {}
            keys = self._file.keys()
            for key in keys:
                group, name = key.split("/", 1)
                self._names.setdefault(group, []).append(name)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever the file's content makes go wrong within is an ``InputError`` that names the file."""
        try:
            yield
        except InputError:
            raise
        except (*DAMAGE, KeyError, IndexError, RecursionError) as error:
            what = f"checkpoint {str(self.path)!r} cannot be read ({error}); start afresh with --overwrite true"
            raise InputError(what) from error

    def check_progress(self, kinds: Mapping[str, tuple[type, ...]]) -> None:
        """Refuse a checkpoint whose progress lacks a name, or has a value of another type under it."""
        with self.errors():
            for name, kind in kinds.items():
                if not isinstance(self.progress[name], kind) or isinstance(self.progress[name], bool):
                    raise ValueError(f"its {name} is {shown(self.progress[name])}")

    def group(self, group: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a group by name; an unknown group has none."""
        with self.errors():
            names = [name for name in self._names.get(group, ()) if name not in without]
            return {name: self._finite(group, name, self._file.get_tensor(f"{group}/{name}")) for name in names}

    def shapes(self, group: str) -> dict[str, torch.Size]:
        """The shapes of a group's tensors, none of which is read."""
        with self.errors():
            return {name: torch.Size(self._file.get_slice(f"{group}/{name}").get_shape()) for name in self._names.get(group, ())}

    def rows(self, group: str, name: str, index: Tensor) -> Tensor:
        """The rows ``index`` (n,), rising, of one tensor: (n, *shape)."""
        with self.errors():
            first, last = int(index[0]), int(index[-1]) + 1
            return self._finite(group, name, self._file.get_slice(f"{group}/{name}")[first:last][index - first])

    def _finite(self, group: str, name: str, value: Tensor) -> Tensor:
        if problem := not_a_number(value):
            raise ValueError(f"{group}/{name} has {problem}")
        return value


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """All that :func:`save_checkpoint` wrote.

    Raises:
        InputError: the file is missing, cut short or not a checkpoint.
    """
    checkpoint = Checkpoint(path)
    return {group: checkpoint.group(group) for group in checkpoint._names}, checkpoint.progress


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises:
        ValueError: the tensors are not of AdamW's for these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"optimizer/{name} is of no parameter")
        state.setdefault(int(index), {})[key] = value
    for number, entry in state.items():
        shape = parameters[number].shape
        expected = {"step": torch.Size(()), "exp_avg": shape, "exp_avg_sq": shape}
        if {key: value.shape for key, value in entry.items()} != expected:
            raise ValueError(f"optimizer/{number} is of another parameter")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
