"""The state of a fit as one safetensors file: parameters, optimiser moments, the best state, and the progress of the loop.

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
    """Write ``groups`` of tensors and the JSON-able ``progress`` to ``path``. After a crash the old or the new file is complete.

    Raises:
        InputError: the file cannot be written, for example because the disk is full. The old file is unchanged.
    """
    tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    metadata = {"progress": json.dumps(progress)}
    replace_file(path, lambda temporary: write_safetensors(temporary, tensors, metadata, digest=True))


class Checkpoints:
    """A folder with the newest checkpoints of a fit.

    Args:
        folder: the folder; it is created with the first checkpoint.
        keep: how many checkpoints are kept. With two or more, a fit can resume from the previous one if the newest is damaged.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        #: One line for each damaged checkpoint that ``newest`` skipped.
        self.notes: list[str] = []

    def files(self) -> list[Path]:
        """The checkpoint files, the newest first."""
        return sorted(self.folder.glob(_NAME.format("[0-9]" * 8)), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None if there are no checkpoints.

        Raises:
            InputError: there are checkpoints, and all are damaged.
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
        """Write the checkpoint of a step, and delete all but the newest ``keep``.

        Raises:
            InputError: the checkpoint cannot be written; the earlier ones are unchanged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.folder / _NAME.format(f"{step:08d}"), groups, progress)
        unfinished = self.folder.glob(f".{_NAME.format('*')}.tmp")  # left by a process that was killed
        for file in (*self.files()[self.keep :], *unfinished):
            file.unlink(missing_ok=True)


class Checkpoint:
    """A file that :func:`save_checkpoint` wrote. Tensors are read only when a method needs them.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, cut short or not a checkpoint. The methods that read tensors raise it if a number is
            not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.errors():
            if not is_intact(path):
                raise ValueError("it is cut short, or its bytes are not those that were written")
            self._file = safe_open(path, framework="pt").__enter__()
            self.progress: dict[str, Any] = json.loads((self._file.metadata() or {})["progress"])
            if not isinstance(self.progress, dict):
                raise ValueError("its progress is not a mapping")
            self._names: dict[str, list[str]] = {}
            keys = self._file.keys()
            for key in keys:
                group, name = key.split("/", 1)
                self._names.setdefault(group, []).append(name)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn all errors that damaged content can cause into an ``InputError`` that names the file."""
        try:
            yield
        except InputError:
            raise
        except (*DAMAGE, KeyError, IndexError, RecursionError) as error:
            what = f"checkpoint {str(self.path)!r} cannot be read ({error}); start afresh with --overwrite true"
            raise InputError(what) from error

    def check_progress(self, kinds: Mapping[str, tuple[type, ...]]) -> None:
        """Check that the progress has all names in ``kinds``, with values of these types.

        Raises:
            InputError: a name is missing, or its value has another type.
        """
        with self.errors():
            for name, kind in kinds.items():
                if not isinstance(self.progress[name], kind) or (isinstance(self.progress[name], bool) and bool not in kind):
                    raise ValueError(f"its {name} is {shown(self.progress[name])}")

    def group(self, group: str, *, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors of a group by name, except those in ``without``; an unknown group has no tensors."""
        with self.errors():
            names = [name for name in self._names.get(group, ()) if name not in without]
            return {name: self._finite(group, name, self._file.get_tensor(f"{group}/{name}")) for name in names}

    def shapes(self, group: str) -> dict[str, torch.Size]:
        """The shapes of a group's tensors; the tensors are not read."""
        with self.errors():
            return {name: torch.Size(self._file.get_slice(f"{group}/{name}").get_shape()) for name in self._names.get(group, ())}

    def rows(self, group: str, name: str, index: Tensor) -> Tensor:
        """The rows ``index`` of one tensor: (n, *shape). ``index`` (n,) is in ascending order."""
        with self.errors():
            first, last = int(index[0]), int(index[-1]) + 1
            return self._finite(group, name, self._file.get_slice(f"{group}/{name}")[first:last][index - first])

    def _finite(self, group: str, name: str, value: Tensor) -> Tensor:
        if problem := not_a_number(value):
            raise ValueError(f"{group}/{name} has {problem}")
        return value


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the progress that :func:`save_checkpoint` wrote.

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
    """Restore an optimiser's state from the tensors that :func:`optimizer_tensors` returned.

    Raises:
        ValueError: the tensors are not the state of this optimiser for these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"optimizer/{name} belongs to no parameter")
        state.setdefault(int(index), {})[key] = value
    for number, entry in state.items():
        shape = parameters[number].shape
        expected = {"step": torch.Size(()), "exp_avg": shape, "exp_avg_sq": shape}
        if not isinstance(optimizer, torch.optim.AdamW):
            del expected["exp_avg_sq"]  # IVON
        if {key: value.shape for key, value in entry.items()} != expected:
            raise ValueError(f"optimizer/{number} belongs to another parameter")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
