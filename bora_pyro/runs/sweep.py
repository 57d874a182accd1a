"""The runs of a sweep: which to fit next, which are finished, and the processes in which they run.

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
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

import datasets
import pandas as pd

from bora_pyro.data.chat_template import same_chat_template
from bora_pyro.errors import InputError
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results_table import rows_of_run

R = TypeVar("R", bound=Hashable)
#: Arguments with which Python runs a MAP fit. -P: a file in the current folder must not shadow a module.
MAP_FIT = ("-P", "-m", "bora_pyro.cli", "map-fit")
# Options that do not change the result of a fit.
_NO_EFFECT = {
    "output_dir", "overwrite", "resume", "threads", "device", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "gradient_checkpointing", "trackers",
}  # fmt: skip


def next_rates(rates: Sequence[str], scores: Mapping[str, float], search: str) -> list[str]:
    """The learning rates to try next; an empty list if the search is over.

    Args:
        rates: the grid, ascending.
        scores: validation perplexity by rate for the rates that were tried; infinite if the fit failed.
        search: ``grid`` tries all rates. ``climb`` assumes that the perplexity has one minimum. It begins in the middle and goes
            up as long as the perplexity falls. If the first step up does not lower it, it goes down in the same way.
    """
    if search == "grid":
        return [rate for rate in rates if rate not in scores]
    middle = (len(rates) - 1) // 2
    for direction in (rates[middle:], rates[middle::-1]):
        for n, rate in enumerate(direction):
            if rate not in scores:
                return [rate]
            if n and not scores[rate] < scores[direction[n - 1]]:
                break
        if len(direction) > 1 and scores[direction[1]] < scores[direction[0]]:
            break
    return []


def finished_rows(asked: MapFitConfig, *, tau: str, learning_rate: str) -> pd.DataFrame | None:
    """The rows of the finished run in ``asked.output_dir``; None if the run has to be fitted or resumed.

    Args:
        asked: the configuration that the run should have.
        tau: its τ as a text.
        learning_rate: its learning rate as a text.

    Raises:
        InputError: the folder contains something that no run wrote, or a finished run with other options.
    """
    folder = Path(asked.output_dir)
    if not folder.exists():
        return None
    try:
        rows = rows_of_run(folder, tau=tau, learning_rate=learning_rate)
    except InputError:  # no run, an unfinished or a damaged one
        if not can_resume(asked):
            RunFolder(folder).check_free(overwrite=True)
        return None
    if differs := difference(asked):
        raise InputError(f"{folder} is a finished run with {differs}; give another --output or --runs_dir, or move it away")
    return rows


def difference(asked: MapFitConfig) -> str | None:
    """Describe the first option in which the run in ``asked.output_dir`` differs from ``asked``; None if there is none.

    Options that do not change the result of a fit are ignored. An option that did not exist when the run was made counts as
    its default.

    Raises:
        InputError: the folder has no run.
    """
    stored = RunFolder.open(asked.output_dir).read_config()
    for field in dataclasses.fields(asked):
        value, found = getattr(asked, field.name), stored.get(field.name, field.default)
        same = value == found or (field.name == "data" and _absolute(value) == _absolute(found))
        same = same or (field.name == "chat_template" and same_chat_template(value, found))
        if field.name not in _NO_EFFECT and not same:
            return f"{field.name} {found} instead of {value}"
    return None


def _absolute(data: Any) -> list[Path]:
    """The sources of documents, wherever the program was started."""
    return [Path(str(name)).resolve() for name in (data if isinstance(data, list) else [data])]


def can_resume(asked: MapFitConfig) -> bool:
    """Whether ``asked.output_dir`` has a checkpoint of a fit with the same options."""
    try:
        found = Checkpoints(RunFolder.open(asked.output_dir).checkpoints).newest()
        return found is not None and difference(asked) is None
    except InputError:
        return False


class Fits:
    """Fits that run as processes of a program, a limited number at a time.

    Args:
        program: Python's arguments in each process: a script, or options such as ``MAP_FIT``.
        jobs: how many processes may run at the same time, each with one thread.
    """

    def __init__(self, program: Sequence[str], jobs: int) -> None:
        self.program, self.pool, self.lock = program, ThreadPoolExecutor(jobs), Lock()
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def start(self, arguments: Sequence[str]) -> Future[str | None]:
        """Queue a fit. Its result is None, or one line that says why the fit failed.

        Args:
            arguments: the program's command-line arguments.
        """
        return self.pool.submit(self._run, [sys.executable, *self.program, *arguments])

    def _run(self, command: list[str]) -> str | None:
        # the processes share this process's cache of tokenised documents
        cache = {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
        environment = os.environ | cache | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.lock:
            if self.stopped:
                return "it was not started"
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
        """Terminate the running fits and cancel the queued ones."""
        with self.lock:
            self.stopped = True
            for child in self.children:
                child.terminate()
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts() -> Iterator[Event]:
    """Context manager whose event is set by Ctrl-C or SIGTERM. The main loop has to check the event.

    An exception from a signal handler could be raised anywhere: while a table is written, or in garbage collection, which ignores
    it.
    """
    interrupted = Event()
    before = {number: signal.signal(number, lambda *_: interrupted.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_fits(
    fits: Fits, next_runs: Callable[[], Iterable[R]], words: Callable[[R], Sequence[str]], finish: Callable[[R, str | None], None]
) -> None:
    """Do fits until none is left to do. The results of those that have ended decide which come next.

    Args:
        fits: the processes of the fits; they are stopped at the end.
        next_runs: returns the runs that can begin now. It is called at the start and after each fit that has ended. Runs that
            have begun already are left out.
        words: returns the command line of a run.
        finish: called with each run that has ended, and with the reason if it failed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the fits that have ended were finished.
    """
    waiting, begun = dict[Future[str | None], R](), set[R]()

    def begin() -> None:
        for run in next_runs():
            if run not in begun:
                begun.add(run)
                waiting[fits.start(words(run))] = run

    with interrupts() as interrupted:
        try:
            begin()
            while waiting:
                done = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done
                if interrupted.is_set():
                    raise KeyboardInterrupt
                for future in done:
                    run = waiting.pop(future)
                    finish(run, future.result())
                    begin()
        finally:
            fits.stop()
