"""What a fit leaves on disk, and how it is found again.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = RunFolder.create(f"{folder}/run")
    ...     run.write_config({"tau": 100.0})
    ...     run.save_tensors("posterior", {"prior_mean": torch.zeros(2)}, {"adapter": "lora"})
    ...     run.write_metrics({"test_perplexity": 20.2})
    ...     found = RunFolder.open(f"{folder}/run")
    ...     found.read_config()["tau"], found.read_metrics()["test_perplexity"], found.load_tensors("posterior")
    (100.0, 20.2, {'prior_mean': tensor([0., 0.])})

A run folder holds ``config.yaml`` (resolved), ``split.json`` (which documents are where), ``metrics.jsonl`` (a line a
record), ``metrics.json`` (the result, written last), tensors as safetensors, ``checkpoints/``, ``adapters/<task>/`` and,
once ``scripts/diagnose.py`` and ``scripts/report.py`` have looked at it, ``diagnostics/`` and ``report.html``; of a fit that
was tracked also ``tensorboard/`` and ``wandb/``.
Nothing in it is pickled, and every file but the log is replaced in one piece, so that a killed run leaves no half file.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
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
    CHECKPOINTS,
    CONFIG,
    FIT,
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
from bora_pyro.runs.record import strange_metric, strange_record

#: The largest log, split or result that is read; those of 10,000 tasks take some megabytes.
MAX_BYTES = 2**30


class RunFolder:
    """The folder of one run. Make one by ``create`` (for a fit) or ``open`` (to read what a fit left)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, timeout=0)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Let other processes write into the folder, which ``create`` has kept from them."""
        if self._lock.is_locked:
            (self.path / LOCK).unlink(missing_ok=True)  # while it is held: who waits for it looks again
            self._lock.release()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def check(cls, path: str | Path, *, overwrite: bool = False, resume: bool | None = False) -> None:
        """Raise what ``create`` would raise, and leave the disk alone: for a look before the long work begins.

        ``resume`` is None where the command that asks has no such option.
        """
        try:
            cls(Path(path))._entries(overwrite=overwrite, resume=resume)
            check_writable(path, (Path(path), *Path(path).absolute().parents))
        except (OSError, ValueError) as error:
            raise unusable(path, error) from None

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False, resume: bool | None = False) -> RunFolder:
        """Take a folder for a run; call it once the configuration is checked, for it is the first to touch the disk.

        No other process can take it meanwhile: the folder is a context manager that ends this, as does the end of the process.

        Args:
            path: a folder that is missing or empty, or that holds a run where ``overwrite`` or ``resume`` is given.
            overwrite: delete the run that is there. Only what a run writes is deleted, and only where nothing else is there.
            resume: go on with the run that is there; None where that cannot be asked for.

        Raises:
            InputError: the path is a file, holds something else, or cannot be written; there is no run to resume; another process
                is at work there.
        """
        run = cls(Path(path))
        try:
            run._entries(overwrite=overwrite, resume=resume)
            run.path.mkdir(parents=True, exist_ok=True)
            run._take()
            names = run._entries(overwrite=overwrite, resume=resume)
            with tempfile.TemporaryFile(dir=run.path):  # finds out whether files can be written, also for root
                pass
            if resume:
                run._drop_half_line()
            else:
                clear(run.path, names)
        except BaseException as error:
            run.__exit__()
            if isinstance(error, OSError | ValueError):
                raise unusable(path, error) from None
            raise
        return run

    def _take(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise InputError(
                f"output_dir {self.path}: another process is at work there; wait until it ends, or give another --output_dir"
            ) from None

    @classmethod
    def holds_run(cls, path: str | Path) -> bool:
        """Whether a run can be resumed there."""
        return is_ours(Path(path))

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Find the run in an existing folder.

        Raises:
            InputError: there is no such folder, no run in it, or a link in it that leads out of it.
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
        """The folder of the checkpoints; there once ``write_config`` was called."""
        return self.path / CHECKPOINTS

    @property
    def adapters(self) -> Path:
        """The folder of the adapters in PEFT form, one folder a task; there once ``write_config`` was called."""
        return self.path / ADAPTERS

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``, which makes the folder a run."""
        text = f"{HEADER}\n{dump_mapping(config)}"
        replace_file(self.path / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self.checkpoints.mkdir(exist_ok=True)
        self.adapters.mkdir(exist_ok=True)

    def write_fit(self, config: Mapping[str, Any]) -> None:
        """Write ``fit.yaml``: the configuration of the fit around which a posterior was fitted."""
        text = dump_mapping(config)
        replace_file(self.path / FIT, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def write_source(self, source: Mapping[str, Any]) -> None:
        """Write ``source.json``: by which the fit is known again around which a posterior was fitted."""
        self._write_json(SOURCE, source)

    def read_source(self) -> dict[str, Any]:
        """The mapping in ``source.json``; empty in the folder of an older posterior, and in that of any other fit."""
        return self._read_json(SOURCE) if (self.path / SOURCE).exists() else {}

    def read_config(self, name: str = CONFIG) -> dict[str, Any]:
        """The mapping in ``config.yaml``, or in another YAML file of the run."""
        file = self.path / name
        try:
            check_regular(file)
            return read_mapping(file)
        except (OSError, YamlError) as error:
            line = f"line {error.line}: " if isinstance(error, YamlError) and error.line else ""
            raise InputError(f"{file} cannot be read ({line}{error}); fit again") from None

    def write_split(self, split: Mapping[str, Any]) -> None:
        """Write ``split.json``: which documents were trained on, validated on and tested on."""
        self._write_json(SPLIT, split)

    def read_split(self) -> dict[str, Any]:
        """The mapping in ``split.json``."""
        return self._read_json(SPLIT)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; NaN and infinity, which JSON lacks, are written as null."""
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")
        except OSError as error:
            raise unwritable(self.path / LOG, error) from error

    def cut_log(self, records: int) -> None:
        """Keep the first ``records`` lines of ``metrics.jsonl``: a run resumed from a checkpoint repeats what came after it."""
        if (self.path / LOG).exists():
            self._rewrite_log(lambda content: b"".join(content.splitlines(keepends=True)[:records]))

    def read_log(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``; a last line that a killed run left half written is passed over."""
        file = self.path / LOG
        try:
            text = read_regular(file, most=MAX_BYTES).decode("utf-8", errors="replace") if file.exists() else ""
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error}); fit again") from None
        lines = text.split("\n")[:-1]  # what follows the last line's end is empty, or half a line
        try:
            records = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}); fit again") from None
        for number, record in enumerate(records, start=1):
            if problem := strange_record(record):
                raise InputError(f"{file} is damaged (line {number} {problem}); fit again")
        return records

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, which makes the run a finished one; NaN and infinity are written as null."""
        self._write_json(METRICS, metrics)

    def remove_metrics(self) -> None:
        """Delete ``metrics.json`` where there is one: a run that goes on is none that is finished."""
        try:
            (self.path / METRICS).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path / METRICS, error) from error

    def read_metrics(self) -> dict[str, Any]:
        """The mapping in ``metrics.json``; what is there of the names of :mod:`bora_pyro.runs.record` is of their types."""
        if not (self.path / METRICS).is_file():
            raise InputError(f"the run in {self.path} is not finished: it has no {METRICS}; finish it with --resume true")
        metrics = self._read_json(METRICS)
        if problem := strange_metric(metrics):
            raise InputError(f"{self.path / METRICS} {problem}; run the fit again with --resume true")
        return metrics

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Write ``<name>.safetensors``, with its digest; a name such as ``checkpoints/epoch-3`` makes the folder it needs."""
        replace_file(self._tensor_file(name), lambda file: write_safetensors(Path(file), tensors, metadata or {}, digest=True))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU; where the file has a digest, its bytes must be those of it."""
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
        """The metadata that ``save_tensors`` was given."""
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
        """The SHA-256 of ``<name>.safetensors`` as it lies there, as 64 hexadecimal digits."""
        file = self._tensor_file(name)
        try:
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(file, error) from None

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n"
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
        """The names in the folder, once it is clear that a run may go there."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir {self.path} is a file; give another --output_dir")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if resume:
            check_links(self.path, "output_dir")
        if resume and CONFIG not in names:
            raise InputError(f"output_dir {self.path} holds no run to resume; check the path, or leave --resume out to start one")
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

    def _drop_half_line(self) -> None:
        """Cut off what a killed run left of its last record, so that the next one starts on a line of its own."""
        if (self.path / LOG).exists():
            self._rewrite_log(lambda content: content[: content.rfind(b"\n") + 1])

    def _rewrite_log(self, change: Callable[[bytes], bytes]) -> None:
        """Put a new file in the log's place: one that has a second name, as in a copy by hard links, stays as it is there."""
        file = self.path / LOG
        try:
            content, names = read_regular(file, most=MAX_BYTES), file.stat().st_nlink
        except OSError as error:
            raise unwritable(file, error) from None
        if (kept := change(content)) != content or names > 1:
            replace_file(file, lambda temporary: temporary.write_bytes(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unreadable(file: Path, error: Exception) -> InputError:
    if not file.exists():
        return InputError(f"{file} does not exist; the run may not have come so far")
    return InputError(f"{file} is damaged ({' '.join(str(error).split())}); run the fit again")
