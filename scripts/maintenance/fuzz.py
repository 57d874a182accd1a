"""Fuzz all readers of files: each must read a damaged file or raise an ``InputError`` with a message of one line.

    python scripts/maintenance/fuzz.py --inputs 100000 --output results/fuzz.csv

A tiny fit makes the valid files. Each input is one of them with a few mutations of its bytes or of its structure, drawn from the
seed and the input's number. Everything else counts as a crash: another exception, more than 5 seconds of processor time (or 100
seconds in all), more memory than --memory, or the death of the process. The damaged file is kept, and the command that repeats
the crash is printed. The exit code is 1 if there was a crash. The readers run in a child process (Unix only), which is started
again if it dies.
"""

from __future__ import annotations

import math
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from fuzz_mutations import damaged
from fuzz_readers import Reader, readers

from bora_pyro.errors import InputError, escaped, nearest
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option

READ, REFUSED, CRASHED = range(3)
SECONDS = 5.0
# factor between the limits of elapsed time and of processor time: on a busy machine a reader may only be waiting
PATIENCE = 20
# largest number of crashes of one reader whose files are kept
KEPT = 10


@dataclass(kw_only=True)
class FuzzConfig:
    """Read damaged files with every reader."""

    inputs: int = option(100_000, "number of files to damage")
    seed: int = option(0, "seed of the mutations")
    readers: list[str] | None = option(None, "only these readers (default: all)")
    memory: float = option(2.0, "GiB that reading a file may use, in addition to what the process uses already")
    output: str | None = option(None, "CSV of the counts by reader (default: they are only printed)")
    crashes: str = option("fuzz_crashes", "folder for the files that crash a reader")
    repeat: str | None = option(None, "repeat a crash: its folder, as it was printed")

    def validate(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one of them is out of range.
        """
        if self.inputs < 1 or self.seed < 0 or not 0 < self.memory < math.inf:
            raise InputError("give inputs from 1 up, a seed from 0 up and memory above 0")


class _TooLongError(BaseException):
    """Reading took more than ``SECONDS``. It is a BaseException so that readers do not catch it."""


def _too_long(*_: object) -> None:
    raise _TooLongError(f"more than {SECONDS:g} seconds")


def outcome(reader: Reader, raw: bytes) -> tuple[int, str]:
    """Read a file with a reader.

    Args:
        reader: the reader.
        raw: content of the file.

    Returns:
        ``READ``, ``REFUSED`` or ``CRASHED``, and a traceback if it is a crash.
    """
    reader.file.write_bytes(raw)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(reader.file)
    except InputError as error:
        one_line = str(error) and escaped(str(error)) == str(error)
        return (REFUSED, "") if one_line else (CRASHED, f"InputError that is not one line: {str(error)!r}")
    except BaseException:  # includes panics of Rust code and SystemExit
        return CRASHED, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if reader.file.exists() and len(reader.valid) == 1:
            reader.file.write_bytes(reader.valid[0])  # other readers need the valid file
    return READ, ""


class Fuzz:
    """Reads all inputs in order, in a child process that is restarted after an input that killed it."""

    def __init__(self, config: FuzzConfig, found: list[Reader]) -> None:
        self.config, self.readers = config, found
        # memory shared with the child: counts and nanoseconds by reader; number and start time of the current input
        self.counts = np.frombuffer(mmap.mmap(-1, 32 * len(found)), dtype=np.int64).reshape(-1, 4)
        self.at = np.frombuffer(mmap.mmap(-1, 16), dtype=np.float64)

    def input(self, index: int) -> tuple[int, bytes]:
        """Make an input: the number of its reader, and its content."""
        rng = random.Random(f"{self.config.seed} {index}")
        (number,) = rng.choices(range(len(self.readers)), [reader.share for reader in self.readers])
        reader = self.readers[number]
        return number, damaged(rng, reader.valid, reader.form, packed=reader.file.suffix)

    def run(self) -> None:
        """Read all inputs."""
        first = 0
        while first < self.config.inputs:
            self.at[:] = first, time.monotonic()
            child = os.fork()
            if not child:
                self._child(first)
            status, ended = 0, 0
            while not ended:
                time.sleep(0.05)
                ended, status = os.waitpid(child, os.WNOHANG)
                if not ended and time.monotonic() - self.at[1] > PATIENCE * SECONDS:  # the alarm did not stop it
                    os.kill(child, signal.SIGKILL)
            first = int(self.at[0]) + 1
            if status:
                number, raw = self.input(first - 1)
                self._crash(number, first - 1, raw, f"the process ended with status {status} (signal {status & 127})")

    def _child(self, first: int) -> None:
        code = 1
        try:
            if sys.platform == "linux":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + int(self.config.memory * 2**30),) * 2)
            signal.signal(signal.SIGPROF, _too_long)
            for index in range(first, self.config.inputs):
                number, raw = self.input(index)
                self.at[:] = index, time.monotonic()
                start = time.process_time()
                kind, why = outcome(self.readers[number], raw)
                self.counts[number, 3] += int(1e9 * (time.process_time() - start))
                if kind == CRASHED:
                    self._crash(number, index, raw, why)
                else:
                    self.counts[number, kind] += 1
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _crash(self, number: int, index: int, raw: bytes, why: str) -> None:
        self.counts[number, CRASHED] += 1
        reader = self.readers[number]
        if self.counts[number, CRASHED] > KEPT:
            return
        folder = Path(self.config.crashes, f"{number}-{index}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "input").write_bytes(raw)
        (folder / "reader.txt").write_text(reader.name, encoding="utf-8")
        (folder / "why.txt").write_text(why, encoding="utf-8", errors="backslashreplace")
        what = why.strip().splitlines()[-1]
        again = f"python scripts/maintenance/fuzz.py --repeat {folder}"
        print(f"crash of {reader.name}: {what:.120}\n  again: {again}", flush=True)

    def table(self) -> pd.DataFrame:
        """A table of the counts with one row a reader, and a last row with their sums."""
        table = pd.DataFrame(self.counts[:, :3], columns=["read", "refused", "crashed"])
        table.insert(0, "inputs", table.sum(axis=1))
        table.insert(0, "reader", [reader.name for reader in self.readers])
        table["seconds"] = (self.counts[:, 3] / 1e9).round(1)
        table = table[table.inputs > 0]
        return pd.concat([table, table.drop(columns="reader").sum().to_frame().T.assign(reader="all")])[table.columns].astype(
            {name: int for name in ("inputs", "read", "refused", "crashed")}
        )


def repeat(found: list[Reader], folder: Path) -> int:
    """Repeat a crash and print what happens.

    Args:
        found: all readers.
        folder: folder of the crash.

    Returns:
        1 if it crashes again, else 0.
    """
    name = (folder / "reader.txt").read_text(encoding="utf-8")
    (reader,) = (reader for reader in found if reader.name == name)
    signal.signal(signal.SIGPROF, _too_long)
    kind, why = outcome(reader, (folder / "input").read_bytes())
    print(why if kind == CRASHED else f"{name}: {('read', 'refused in one line')[kind]}")
    return int(kind == CRASHED)


def main(argv: list[str]) -> int:
    """Make the valid files, read damaged copies of them, and print the counts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        config = parse_config(FuzzConfig, argv, prog="fuzz.py")
        if config.repeat is not None and not (Path(config.repeat) / "input").is_file():
            raise InputError(f"{config.repeat} contains no input; give the folder of a crash, as it was printed")
        with tempfile.TemporaryDirectory() as work:
            datasets.config.HF_DATASETS_CACHE = Path(work, "cache")
            found = readers(Path(work))
            if config.repeat is not None:
                return repeat(found, Path(config.repeat))
            names = [reader.name for reader in found]
            for name in config.readers or ():
                if name not in names:
                    raise InputError(f"reader {name!r} is not known; it is one of {', '.join(names)}{nearest(name, names)}")
            fuzz = Fuzz(config, [reader for reader in found if reader.name in (config.readers or names)])
            fuzz.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = fuzz.table()
    print(table.to_string(index=False))
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(config.output, index=False)
    return int(table.crashed.iloc[-1] > 0)


if __name__ == "__main__":
    run_script(main)
