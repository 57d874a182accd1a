"""Processes of their own that have everything imported when they begin.

A new Python takes seconds of CPU time to import torch and transformers. Here one server imports them, once a test session, and
every process is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import datasets

from tests.tiny_base import SCRIPTS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch", "transformers", "bora_pyro.runs.map_fit", "tests.tiny", "tests.tiny_base"])


class Ended(NamedTuple):
    """A process that has ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    out: str
    err: str


class Forked:
    """A process that calls ``act(*arguments)``, which must be importable, and writes its output into ``folder``."""

    def __init__(self, folder, act, *arguments, cwd=None, environment=None):
        self.files = [Path(folder) / name for name in ("out.txt", "err.txt")]
        Path(folder).mkdir(parents=True, exist_ok=True)
        cache = datasets.config.HF_DATASETS_CACHE
        self.process = SERVER.Process(target=_begin, args=(self.files, cwd, environment or {}, cache, act, arguments))
        self.process.start()
        self.pid = self.process.pid

    def end(self, timeout=300):
        """Wait for the end; a process that takes longer is killed, and the test fails."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the process did not end within {timeout} s: {self.files[1].read_text(encoding='utf-8')}")
        return Ended(self.process.exitcode, *(file.read_text(encoding="utf-8") for file in self.files))


def _begin(files, cwd, environment, cache, act, arguments):
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ.update(environment)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    if cwd is not None:
        os.chdir(cwd)
    act(*arguments)


def run_script(name, words):
    """A script of ``scripts/`` as Python runs it."""
    sys.argv = [str(SCRIPTS / name), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")
