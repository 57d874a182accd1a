"""The folder of one run: write it, check it, and read it back.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = RunFolder.create(f"{folder}/run")
    ...     run.write_config({"tau": 100.0})
    ...     run.save_tensors("posterior", {"prior_mean": torch.zeros(2)}, {"adapter": "lora"})
    ...     run.write_metrics({"test_perplexity": 20.2})
    ...     found = RunFolder.open(f"{folder}/run")
    ...     found.read_config()["tau"], found.read_metrics()["test_perplexity"], found.load_tensors("posterior")
    (100.0, 20.2, {'prior_mean': tensor([0., 0.])})

A run folder holds ``config.yaml`` (resolved), ``split.json`` (the side of each document), ``metrics.jsonl`` (one line for each
record), ``metrics.json`` (the result, written last), tensors as safetensors, ``checkpoints/`` and ``adapters/<task>/``.
``scripts/diagnose.py`` and ``scripts/report.py`` add ``diagnostics/`` and ``report.html``, trackers ``tensorboard/`` and
``wandb/``. Nothing in it is pickled. Every file except the log is replaced in one piece, so that a killed run leaves no
incomplete file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import check_writable, replace_file, unusable, unwritable
from bora_pyro.files.regular import check_links, check_regular, read_regular
from bora_pyro.files.safe_yaml import YamlError, dump_mapping, read_mapping
from bora_pyro.files.tensors import DAMAGE, DIGEST, is_intact, write_safetensors
from bora_pyro.runs.layout import (  # fmt: skip
    ADAPTERS,
    ADDED,
    CHECKPOINTS,
    COMPOSE,
    CONFIG,
    FIT,
    FOLD,
    HEADER,
    LOCK,
    LOG,
    METRICS,
    SOURCE,
    SPLIT,
    clear,
    foreign_entries,
    is_ours,
)
from bora_pyro.runs.log import MAX_BYTES, Log, finite
from bora_pyro.runs.record import strange_metric


class RunFolder:
    """The folder of one run. ``take`` it to write a run, or ``open`` it to read one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / LOCK, timeout=0)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folder, so that other processes may take it."""
        if self._lock.is_locked:
            (self.path / LOCK).unlink(missing_ok=True)  # while it is held, so that a waiting process looks again
            self._lock.release()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False, resume: bool | None = False) -> RunFolder:
        """Take the folder at a path; see ``take``."""
        run = cls(path)
        run.take(overwrite=overwrite, resume=resume)
        return run

    def check_free(self, *, overwrite: bool = False, resume: bool | None = False) -> None:
        """Raise what ``take`` would raise, without a change on the disk. Call it before the long work begins.

        ``resume`` is None if the command has no such option.
        """
        try:
            self._entries(overwrite=overwrite, resume=resume)
            check_writable(self.path, (self.path, *self.path.absolute().parents))
        except (OSError, ValueError) as error:
            raise unusable(self.path, error) from None

    def take(self, *, overwrite: bool = False, resume: bool | None = False) -> None:
        """Take the folder for a run. This is the first change on the disk, so call it after the configuration is checked.

        Other processes cannot take the folder until this process ends or leaves the folder, which is a context manager.
        The folder may be missing or empty. With ``overwrite`` or ``resume`` it may contain a run.

        Args:
            overwrite: delete the run in the folder. Only files that a run writes are deleted, and only if there are no others.
            resume: continue the run in the folder; None if the command has no such option.

        Raises:
            InputError: the path is a file, contains something else, or cannot be written; there is no run to resume; or
                another process has taken the folder.
        """
        try:
            self._entries(overwrite=overwrite, resume=resume)
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            names = self._entries(overwrite=overwrite, resume=resume)
            with tempfile.TemporaryFile(dir=self.path):  # tests whether files can be written, also for root
                pass
            if resume:
                self._log.drop_half_line()
            else:
                clear(self.path, names)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError | ValueError):
                raise unusable(self.path, error) from None
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"output_dir {self.path}: another process is at work there; wait until it ends, or give another --output_dir"
            ) from None

    @classmethod
    def holds_run(cls, path: str | Path) -> bool:
        """Whether the folder contains a run, which can be resumed."""
        return is_ours(Path(path))

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the run in a folder.

        Raises:
            InputError: the folder does not exist, contains no run, or contains a link that leads out of it.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"run folder {path} does not exist; give the --output_dir of a fit")
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} is no run folder: it has no {CONFIG}; give the --output_dir of a fit")
        check_links(path, "run folder")
        run = cls(path)
        run.read_config()
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints. ``write_config`` creates it."""
        return self.path / CHECKPOINTS

    @property
    def _log(self) -> Log:
        return Log(self.path / LOG)

    @property
    def adapters(self) -> Path:
        """The folder of the adapters in PEFT form, one folder for each task. ``write_config`` creates it."""
        return self.path / ADAPTERS

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``. With it the folder is a run."""
        text = f"{HEADER}\n{dump_mapping(config)}"
        replace_file(self.path / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.checkpoints.mkdir(exist_ok=True)
        self.adapters.mkdir(exist_ok=True)

    def write_fit(self, config: Mapping[str, Any]) -> None:
        """Write ``fit.yaml``: the configuration of the fit that a posterior or an adaptation began from."""
        text = dump_mapping(config)
        replace_file(self.path / FIT, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write_source(self, source: Mapping[str, Any]) -> None:
        """Write ``source.json``: it identifies the fit that a posterior began from."""
        self._write_json(SOURCE, source)

    def read_source(self) -> dict[str, Any]:
        """Content of ``source.json``; empty if there is none, as in other runs and in older posteriors."""
        return self._read_json(SOURCE) if (self.path / SOURCE).exists() else {}

    def read_config(self, name: str = CONFIG) -> dict[str, Any]:
        """Content of ``config.yaml``, or of another YAML file of the run."""
        file = self.path / name
        try:
            check_regular(file)
            return read_mapping(file)
        except (OSError, YamlError) as error:
            line = f"line {error.line}: " if isinstance(error, YamlError) and error.line else ""
            raise InputError(f"{file} cannot be read ({line}{error}); fit again") from None

    def write_split(self, split: Mapping[str, Any]) -> None:
        """Write ``split.json``: which documents are for training, validation and test."""
        self._write_json(SPLIT, split)

    def read_split(self) -> dict[str, Any]:
        """Content of ``split.json``."""
        return self._read_json(SPLIT)

    def write_added(self, number: int, config: Mapping[str, Any], split: Mapping[str, Any]) -> None:
        """Write ``added/<number>.yaml`` and ``.json``: the documents of tasks that were added to a run, and their split."""
        (self.path / ADDED).mkdir(exist_ok=True)
        text = dump_mapping(config)
        replace_file(self.path / ADDED / f"{number}.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._write_json(f"{ADDED}/{number}.json", split)

    def read_added(self) -> list[tuple[Path, dict[str, Any]]]:
        """The YAML file of each addition, and its split; none for a run without additions."""
        files = sorted((self.path / ADDED).glob("*.yaml"), key=lambda file: (len(file.name), file.name))
        for file in files:
            check_regular(file)
        return [(file, self._read_json(f"{ADDED}/{file.stem}.json")) for file in files]

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. NaN and infinity are written as null."""
        self._log.append(record)

    def cut_log(self, records: int) -> None:
        """Keep the first ``records`` lines of ``metrics.jsonl``. A run that is resumed writes the later ones again."""
        self._log.cut(records)

    def read_log(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``. An incomplete last line, left by a killed run, is ignored."""
        return self._log.read()

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``. With it the run is finished. NaN and infinity are written as null."""
        self._write_json(METRICS, metrics)

    def remove_metrics(self) -> None:
        """Delete ``metrics.json`` if it exists: a run that continues is not finished."""
        try:
            (self.path / METRICS).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path / METRICS, error) from error

    def read_metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``. The names in :mod:`bora_pyro.runs.record` have values of their types."""
        if not (self.path / METRICS).is_file():
            raise InputError(f"the run in {self.path} is not finished: it has no {METRICS}; finish it with --resume true")
        metrics = self._read_json(METRICS)
        if problem := strange_metric(metrics):
            raise InputError(f"{self.path / METRICS} {problem}; run the fit again with --resume true")
        return metrics

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Write ``<name>.safetensors`` with its digest. The folder in a name such as ``checkpoints/epoch-3`` is created."""
        replace_file(self._tensor_file(name), lambda file: write_safetensors(Path(file), tensors, metadata or {}, digest=True))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU. If the file has a digest, it is checked."""
        file = self._tensor_file(name)
        try:
            check_regular(file)
            tensors = dict(load_file(file))
            with safe_open(file, framework="pt") as opened:
                has_digest = DIGEST in (opened.metadata() or {})
            if has_digest and not is_intact(file):
                raise ValueError("its bytes are not those that were written")
        except DAMAGE as error:
            raise _unreadable(file, error) from None
        return tensors

    def load_metadata(self, name: str) -> dict[str, str]:
        """The metadata that were given to ``save_tensors``."""
        file = self._tensor_file(name)
        try:
            check_regular(file)
            with safe_open(file, framework="pt") as opened:
                found = dict(opened.metadata() or {})
        except DAMAGE as error:
            raise _unreadable(file, error) from None
        found.pop(DIGEST, None)
        return found

    def digest_of(self, name: str) -> str:
        """The SHA-256 of the file ``<name>.safetensors``, as 64 hexadecimal digits."""
        file = self._tensor_file(name)
        try:
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(file, error) from None

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n"
        replace_file(self.path / name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            content = json.loads(read_regular(file, most=MAX_BYTES).decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file} cannot be read ({error}); run the fit again with --resume true") from None
        if not isinstance(content, dict):
            raise InputError(f"{file} holds no mapping; run the fit again with --resume true")
        return content

    def _tensor_file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _entries(self, *, overwrite: bool, resume: bool | None) -> list[str]:
        """Names of the folder's entries, after a check that a run may use the folder."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir {self.path} is a file; give another --output_dir")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if resume:
            check_links(self.path, "output_dir")
        if resume and CONFIG not in names:
            raise InputError(f"output_dir {self.path} holds no run to resume; check the path, or leave --resume out to start one")
        if resume and (FOLD in names or COMPOSE in names):
            raise InputError(
                f"output_dir {self.path} holds the joined adapters of several fits, which cannot go on; give another --output_dir"
            )
        foreign = foreign_entries(self.path, names, within=overwrite and not resume)
        if foreign and not (resume and is_ours(self.path)):
            raise InputError(
                f"output_dir {self.path} holds {foreign[0]!r}, which no run wrote; give another --output_dir, or move it away"
            )
        if set(names) - {LOCK} and not (overwrite or resume):
            go_on = "" if resume is None else " --resume true to go on with it,"
            raise InputError(
                f"output_dir {self.path} holds another run; give --overwrite true to replace it,{go_on} or another --output_dir"
            )
        return names


def _unreadable(file: Path, error: Exception) -> InputError:
    if not file.exists():
        return InputError(f"{file} does not exist; the run may not have come so far")
    return InputError(f"{file} is damaged ({' '.join(str(error).split())}); run the fit again")
