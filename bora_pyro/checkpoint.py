"""The state of a fit as one safetensors file: parameters, optimiser moments, the best state, and where the loop stood."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.row_tensor import RowTensor
from bora_pyro.safetensors_file import write_safetensors


def save_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor | RowTensor]], progress: dict[str, Any]) -> None:
    """Write ``groups`` of tensors and the JSON-able ``progress`` to ``path``; a crash leaves the old file or the new one."""
    tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    write_safetensors(temporary, tensors, {"progress": json.dumps(progress)})
    os.replace(temporary, path)


class Checkpoint:
    """A file that :func:`save_checkpoint` wrote, of which no more is read than is asked for.

    Args:
        path: the file.

    Raises:
        InputError: it is missing, cut short or not a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._file = safe_open(path, framework="pt").__enter__()
            self.progress: dict[str, Any] = json.loads((self._file.metadata() or {})["progress"])
            self._names: dict[str, list[str]] = {}
            keys = self._file.keys()
            for key in keys:
                group, name = key.split("/", 1)
                self._names.setdefault(group, []).append(name)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            what = f"checkpoint {str(self.path)!r} cannot be read ({error}); start afresh with --overwrite true"
            raise InputError(what) from error

    def group(self, group: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a group by name; an unknown group has none."""
        with self._errors():
            return {name: self._file.get_tensor(f"{group}/{name}") for name in self._names.get(group, ()) if name not in without}

    def shapes(self, group: str) -> dict[str, torch.Size]:
        """The shapes of a group's tensors, none of which is read."""
        with self._errors():
            return {name: torch.Size(self._file.get_slice(f"{group}/{name}").get_shape()) for name in self._names.get(group, ())}

    def rows(self, group: str, name: str, index: Tensor) -> Tensor:
        """The rows ``index`` (n,), rising, of one tensor: (n, *shape)."""
        with self._errors():
            first, last = int(index[0]), int(index[-1]) + 1
            return self._file.get_slice(f"{group}/{name}")[first:last][index - first]


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
    """Put back what :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
