"""The runs of a sweep: which to make next, which folder has one already, and the processes that make them.

>>> next_rates(["0.003", "0.01", "0.03"], {}, "climb")
['0.01']
>>> next_rates(["0.003", "0.01", "0.03"], {"0.01": 20.0, "0.03": 21.0}, "climb")
['0.003']
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

import datasets
import pandas as pd

from bora_pyro.data.chat import same_chat_template
from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results_table import rows_of_run

SEARCHES = ("climb", "grid")
# Options that leave the result of a fit alone.
_HOW = {
    "output_dir", "overwrite", "resume", "threads", "device", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "gradient_checkpointing", "trackers",
}  # fmt: skip


class Run(NamedTuple):
    """One fit of a sweep.

    >>> str(Run("100", "0.01", 0))
    'tau 100, learning rate 0.01, seed 0'
    """

    tau: str
    rate: str
    seed: int

    def __str__(self) -> str:
        return f"tau {self.tau}, learning rate {self.rate}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"tau{self.tau}-lr{self.rate}-seed{self.seed}"


def next_rates(rates: Sequence[str], scores: Mapping[str, float], search: str) -> list[str]:
    """The learning rates to try next; none where the search has come to its end.

    Args:
        rates: the grid, ascending.
        scores: the validation perplexity at the rates that were tried, infinite where the fit failed.
        search: ``grid`` tries all. ``climb`` takes the perplexity to have one minimum: it begins in the middle and goes up as
            long as that is better; where the first step up was not, it goes down in the same way.
    """
    if search == "grid":
        return [rate for rate in rates if rate not in scores]
    middle = (len(rates) - 1) // 2
    for way in (rates[middle:], rates[middle::-1]):
        for n, rate in enumerate(way):
            if rate not in scores:
                return [rate]
            if n and not scores[rate] < scores[way[n - 1]]:
                break
        if len(way) > 1 and scores[way[1]] < scores[way[0]]:
            break
    return []


def finished_rows(asked: MapFitConfig, *, tau: str, learning_rate: str) -> pd.DataFrame | None:
    """The rows of the finished run in ``asked.output_dir``; None where it is to be fitted, now or again.

    Args:
        asked: the run's configuration, as it is to be.
        tau: the text of its τ.
        learning_rate: the text of its learning rate.

    Raises:
        InputError: the folder holds something that no run wrote, or a finished run with other options.
    """
    folder = Path(asked.output_dir)
    if not folder.exists():
        return None
    try:
        rows = rows_of_run(folder, tau=tau, learning_rate=learning_rate)
    except InputError:  # no run, an unfinished or a damaged one
        if not can_resume(asked):
            RunFolder.check(folder, overwrite=True)
        return None
    if differs := difference(asked):
        raise InputError(f"{folder} is a finished run with {differs}; give another --output or --runs_dir, or move it away")
    return rows


def difference(asked: MapFitConfig) -> str | None:
    """The first option in which the run in ``asked.output_dir`` differs, of those that change a fit; None where none does.

    An option that is newer than the run stands at its default there.

    Raises:
        InputError: there is no run.
    """
    stored = RunFolder.open(asked.output_dir).read_config()
    for field in dataclasses.fields(asked):
        value, there = getattr(asked, field.name), stored.get(field.name, getattr(MapFitConfig(), field.name))
        same = value == there or (field.name == "data" and Path(value).resolve() == Path(str(there)).resolve())
        same = same or (field.name == "chat_template" and same_chat_template(value, there))
        if field.name not in _HOW and not same:
            return f"{field.name} {there}, where {value} is asked for"
    return None


def can_resume(asked: MapFitConfig) -> bool:
    """Whether ``asked.output_dir`` has a checkpoint of just the fit that is asked for."""
    try:
        found = Checkpoints(RunFolder.open(asked.output_dir).checkpoints).newest()
        return found is not None and difference(asked) is None
    except InputError:
        return False


class Fits:
    """Processes of a script, so many at a time.

    Args:
        script: what each of them runs.
        jobs: how many may run at the same time, one thread each.
    """

    def __init__(self, script: Path, jobs: int) -> None:
        self.script, self.pool, self.lock = script, ThreadPoolExecutor(jobs), Lock()
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def start(self, arguments: Sequence[str]) -> Future[str | None]:
        """Begin a fit as soon as there is room; its result is why it failed, in one line, or None."""
        return self.pool.submit(self._run, [sys.executable, str(self.script), *arguments])

    def _run(self, command: list[str]) -> str | None:
        # the tokens are found where this process keeps them
        own = {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.lock:
            if self.stopped:
                return "it was not begun"
            child = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
            )
            self.children.add(child)
        _, stderr = child.communicate()
        with self.lock:
            self.children.remove(child)
        if child.returncode == 0:
            return None
        if child.returncode < 0:
            return f"it was ended by signal {-child.returncode}"
        lines = stderr.strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"it ended with code {child.returncode}"

    def stop(self) -> None:
        """End the fits that are running, and begin no other."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.terminate()
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts() -> Iterator[Event]:
    """Ctrl-C and a polite kill, noted in an event for the main loop to find.

    An exception of their own would come anywhere: in the middle of a table, or of a garbage collection, which swallows it.
    """
    asked = Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
