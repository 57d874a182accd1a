"""The output of a fit for people: its progress while it runs, and a table of the tasks at the end.

    >>> metrics = {"base_test_perplexity": 31.5, "test_perplexity": 20.25, "tasks": {
    ...     "drawing": {"name": "drawing", "train_documents": 40, "test_documents": 9, "base_test_perplexity": 31.5,
    ...                 "test_perplexity": 20.25, "deviation_norm": None}}}
    >>> print_table(metrics)
                      train        test         base      adapted
      task        documents   documents   perplexity   perplexity   ‖θ_d − Θ‖
     ─────────────────────────────────────────────────────────────────────────
      drawing            40           9        31.50        20.25           –
    <BLANKLINE>
      all tasks          40           9        31.50        20.25           –

Progress goes to stderr, so that a program's result can be piped. A terminal gets a bar with the newest numbers below it. A log
file, or a terminal that cannot move its cursor, gets plain lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

import torch
from rich import box
from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from bora_pyro.backbone.slots import Slot
from bora_pyro.data import TaskData
from bora_pyro.files.text import NAME_LENGTH, escaped, name_line
from bora_pyro.likelihoods import PERPLEXITY, Measure, measure_of
from bora_pyro.model import BoRA

_MISSING = "–"


class _Bar(rich_progress.Progress):
    """A bar with the steps and the time left in one line, and the newest numbers in a second line, within 80 columns."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers)


class Progress:
    """Show the progress of a fit. Use it as a context manager.

        >>> with Progress(2, enabled=False) as progress:
        ...     progress.update(1, loss=3.2, epoch=1)
        ...     progress.update(2, loss=3.1, epoch=1, validation=20.9)

    Args:
        total_steps: optimiser steps of the whole fit. The attribute can be set later, once the number is known.
        epochs: epochs of the whole fit; None: the number is not shown.
        measure: how the fit's likelihood judges validation documents.
        enabled: False shows nothing.
        start: steps that a resumed fit had done before. None: the first update reports the first step of this fit.
        file: where to write; None: stderr.
        interval: seconds between plain lines. The end of an epoch always gets a line.
        clock: function that returns monotonic seconds; tests pass their own.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        epochs: int | None = None,
        measure: Measure = PERPLEXITY,
        enabled: bool = True,
        start: int | None = None,
        file: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.start, self.interval, self.clock = total_steps, start, interval, clock
        self._measure = measure
        self._epochs = "" if epochs is None else f"/{epochs}"
        self._console = Console(file=file or sys.stderr, highlight=False)
        draws = self._console.is_terminal and not self._console.is_dumb_terminal
        self._plain = enabled and not draws
        self._bar: _Bar | None = None
        if enabled and draws:
            self._bar = _Bar(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("steps,"),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("left"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("starting", total=total_steps, completed=start or 0)
        self._seen: dict[str, float | int] = {}  # the newest value of each quantity
        self._begin = self._last = clock()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        self._begin = self._last = self.clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        epoch: int | None = None,
        validation: float | None = None,
        tau: float | None = None,
        kl: float | None = None,
        reward: float | None = None,
    ) -> None:
        """Show that ``step`` steps are done. Quantities that are None keep their last value.

        Args:
            step: optimiser steps done so far, over the whole fit.
            loss: training loss in nats a token.
            tokens_per_second: training speed.
            epoch: the current epoch, counted from 1.
            validation: the measure of the validation documents, given at the end of each epoch. It prints a line that stays.
            tau: precision of the prior, if the fit learns it.
            kl: KL divergence in nats, if the fit reports it: of a task from the prior, or of a written token from the base.
            reward: mean reward of the texts that the model wrote in this epoch, if the fit has rewards.
        """
        given = {"epoch": epoch, "loss": loss, "tokens_per_second": tokens_per_second, "validation": validation}
        given["tau"] = None if tau is None else float(f"{tau:.3g}")
        given |= {"kl": kl, "reward": reward}
        self.start = step - 1 if self.start is None else self.start
        self._seen |= {key: value for key, value in given.items() if value is not None}
        if self._bar is not None:
            self._bar.numbers = self._describe(without="epoch")
            named = self._describe(only="epoch") or "fitting"
            self._bar.update(self._task, total=self.total_steps, completed=step, description=named)
            if validation is not None:
                self._bar.console.print(self._line(step), markup=False)
        elif self._plain and (validation is not None or self.clock() - self._last >= self.interval):
            self._last = self.clock()
            self._console.print(self._line(step), markup=False, soft_wrap=True)

    def _describe(self, *, only: str = "", without: str = "") -> str:
        formats = {
            "epoch": f"epoch {{}}{self._epochs}",
            "loss": "loss {:.4f}",
            "reward": "reward {:.4g}",
            "kl": "KL {:.3g}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "validation": f"validation {self._measure.title} {{:.{self._measure.digits}f}}",
            "tau": "τ {:g}",
        }
        shown = [key for key in formats if key in self._seen and key != without and only in ("", key)]
        return "  ".join(formats[key].format(self._seen[key]) for key in shown)

    def _line(self, step: int) -> str:
        elapsed = self.clock() - self._begin
        line = f"step {step}/{self.total_steps}  {self._describe()}  {_duration(elapsed)}"
        if self.start is not None and self.start < step < self.total_steps:
            left = elapsed * (self.total_steps - step) / (step - self.start)
            line += f", about {_duration(left)} left"
        return line


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Make a table with one row a task and a last row for all tasks together.

    Args:
        metrics: content of ``metrics.json``; a missing value is shown as "–".
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold", max_width=NAME_LENGTH)
    columns = result_columns(metrics)
    for heading in ("train\ndocuments", "test\ndocuments", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    tasks = metrics.get("tasks") or {}
    for slug, task in tasks.items():
        # Text, not str: a task's name may look like rich's markup
        table.add_row(Text(name_line(task.get("name") or slug, characters=None)), *_cells(task, columns))
    table.add_section()
    counts = {
        key: sum(known) if (known := [t[key] for t in tasks.values() if t.get(key) is not None]) else None
        for key in ("train_documents", "test_documents")
    }
    table.add_row("all tasks", *_cells({**metrics, **counts, "deviation_norm": None}, columns))
    return table


def result_columns(metrics: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """The columns of `result_table` behind the numbers of documents: by heading, the name in ``metrics.json`` and the decimals.

    >>> list(result_columns({"test_nll": 0.5}))[:3]
    ['base\\nNLL', 'adapted\\nNLL', 'base\\naccuracy']
    """
    measure = measure_of(metrics)
    shown = {measure.title: (measure.name, measure.digits)}
    if measure.observation == "question":
        shown["accuracy"] = ("accuracy", 3)
    found: dict[str, tuple[str, int]] = {}
    for title, (name, digits) in shown.items():
        found |= {f"base\n{title}": (f"base_test_{name}", digits), f"adapted\n{title}": (f"test_{name}", digits)}
    return found | {"\n‖θ_d − Θ‖": ("deviation_norm", 2)}


def print_table(metrics: Mapping[str, Any], *, file: TextIO | None = None) -> None:
    """Print ``result_table``, fitted to the width of a terminal. Elsewhere it is plain text of any width.

    Names of more than ``NAME_LENGTH`` characters take several lines.

    Args:
        metrics: content of ``metrics.json``.
        file: where to print; default: stdout.
    """
    print_fitted(result_table(metrics), file=file)


def print_fitted(*parts: RenderableType, file: TextIO | None = None) -> None:
    """Print something, fitted to the width of a terminal. Elsewhere it is plain text of any width.

    Args:
        parts: what to print, one below another.
        file: where to print; default: stdout.
    """
    file = file or sys.stdout
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        width = max(Console(width=10**6).measure(part).maximum for part in parts)  # wide enough for all cells
        console = Console(file=file, highlight=False, color_system=None, width=width)
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    # an encoding without θ gets "?": a fit must not end in an error here
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write("\n".join(lines).strip("\n").encode(encoding, "replace").decode(encoding) + "\n")


def print_data(data: TaskData, *, file: TextIO | None = None) -> None:
    """Print one line on what was read and left out, and the notes.

    Args:
        data: the documents.
        file: where to print; default: stderr.
    """
    for line in data_lines(data):
        print(line, file=file or sys.stderr)


def layers_line(slots: Sequence[Slot]) -> str:
    """One line on the layers that have adapters."""
    kinds = ", ".join(f"{slot.name} x {slot.layers}" for slot in slots)
    return f"adapters: on {sum(slot.layers for slot in slots)} layers: {kinds}"


def latents_lines(model: BoRA) -> list[str]:
    """One line on the number of latents, if tasks have some in common or differ in how many they have; otherwise none."""
    tensors, shared = model.tensors, model.adapter.shared
    common, own = 0, torch.zeros(model.num_tasks, dtype=torch.int64)
    for name in model.starts:
        if name.rpartition(".")[-1] in shared:
            common += int(tensors.active(name, 1))
        else:
            own += tensors.active(name, model.num_tasks)
    if not common and not tensors.masks_by_task:
        return []
    least, most = int(own.min()), int(own.max())
    return [f"latents: {common:,} for all tasks together, and {least:,}{f' to {most:,}' * (least != most)} for each task"]


def data_lines(data: TaskData) -> list[str]:
    """One line on what was read and left out, and one for each note."""
    lines = [] if data.counts is None else [f"data: {data.counts}"]
    return [escaped(line) for line in [*lines, *(f"note: {note}" for note in data.notes)]]


def _cells(row: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]) -> list[str]:
    counts = [_MISSING if row.get(key) is None else f"{row[key]:,}" for key in ("train_documents", "test_documents")]
    return counts + [_MISSING if row.get(key) is None else f"{row[key]:,.{digits}f}" for key, digits in columns.values()]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
