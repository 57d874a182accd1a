"""Continue a prompt by several tasks' adapters, side by side.

bora generate runs/demo --prompt "Returns the" --task drawing --task utils --task base
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bora_pyro.errors import InputError, escaped
from bora_pyro.files.slugs import GLOBAL_MEAN
from bora_pyro.files.text import name_line
from bora_pyro.options.field import option
from bora_pyro.predict.authors import BASE, Authors
from bora_pyro.predict.generate import Continuation, generate_side_by_side
from bora_pyro.runs.command import Command
from bora_pyro.runs.saved import load_run

#: A column narrower than this is no pleasure to read: tasks then stand below each other.
LEAST_WIDTH = 28


@dataclass(kw_only=True)
class GenerateConfig:
    """Continue prompts by several tasks of a finished run, in one batch."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    prompt: list[str] = option(
        [], "beginning of a text, or what a user says to a fit of chats; may be repeated (no default: one is needed)", whole=True
    )
    task: list[str] = option(
        [],
        f"who continues it; may be repeated: names of tasks or of their folders, {BASE} (no adapter), {GLOBAL_MEAN} (Θ); where a "
        f"task is called so, 'plain {BASE}', 'plain {GLOBAL_MEAN}' (default: these two and the first two tasks)",
        whole=True,
    )
    samples: int = option(1, "continuations of each prompt by each task")
    max_new_tokens: int = option(40, "tokens of a continuation, at most")
    temperature: float = option(0.0, "0 takes the most probable token; above 0 tokens are drawn")
    top_p: float = option(1.0, "draw among the most probable tokens that have so much probability together")
    seed: int = option(0, "seed of the draws")
    trust_remote_code: bool = option(
        False, "let a base model that brings code of its own run it on this machine; a file cannot say so", line_only=True
    )
    raw: bool = option(False, "take prompts as beginnings of texts, also where the fit was one of chats")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    json: bool = option(False, "print a line of JSON a text instead of a table")

    def validate(self) -> None:
        """Raise ``InputError`` where a run or a prompt is missing."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in generate.py runs/map_fit --prompt 'It was'")
        if not self.prompt:
            raise InputError("no prompt is given; give the beginning of a text, as in --prompt 'It was'")


def side_by_side(written: list[Continuation], width: int, *, between: str = "") -> Table:
    """A column a task where they fit, else a row a task; a block of rows a prompt, and ``between`` it and its continuation."""
    tasks = list(dict.fromkeys(text.task for text in written))
    if width // max(len(tasks), 1) >= LEAST_WIDTH:
        table = Table(box=box.SIMPLE_HEAD, expand=True)
        for task in tasks:
            table.add_column(Text(name_line(task)), ratio=1)
        for start in range(0, len(written), len(tasks) * (samples := _samples(written))):
            block = written[start : start + len(tasks) * samples]
            for sample in range(samples):
                table.add_row(*(_shown(text, between) for text in block if text.sample == sample))
            table.add_section()
        return table
    table = Table(box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("task", max_width=max(12, width // 4), overflow="fold")
    table.add_column("text", overflow="fold")
    for number, text in enumerate(written):
        if number and text.prompt != written[number - 1].prompt:
            table.add_section()
        table.add_row(Text(name_line(text.task)), _shown(text, between))
    return table


def _samples(written: list[Continuation]) -> int:
    return 1 + max(text.sample for text in written)


def _shown(text: Continuation, between: str) -> Text:
    return Text.assemble((escaped(text.prompt, keep="\n\t"), "dim"), between, escaped(text.text, keep="\n\t"))


def _json_line(record: dict[str, Any]) -> str:
    """A record as JSON, in which what would speak to a terminal has its number."""
    text = json.dumps(record, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def generate(config: GenerateConfig) -> tuple[list[Continuation], bool]:
    """Continue the prompts by the tasks; returns the texts, and whether they answer a chat's user.

    Raises:
        InputError: a run that cannot be read, or a task that it has not.
    """
    fitted = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code).fitted
    authors = Authors(fitted.tasks)
    tasks = config.task or [*fitted.tasks[:2], authors.mean, authors.base]
    written = generate_side_by_side(
        fitted, config.prompt, tasks, samples=config.samples, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_p=config.top_p, seed=config.seed, raw=config.raw,
    )  # fmt: skip
    return written, fitted.chat_template is not None and not config.raw


def show_generated(config: GenerateConfig, result: tuple[list[Continuation], bool]) -> None:
    """Print the texts side by side, or as a line of JSON each."""
    written, chat = result
    if not config.json:
        console = Console()
        console.print(side_by_side(written, console.width, between="\n" if chat else ""))
        return
    for text in written:
        perplexity = math.exp(-float(text.log_prob.mean())) if len(text.tokens) else None
        record = {"prompt": text.prompt, "task": text.task, "sample": text.sample, "text": text.text, "perplexity": perplexity}
        print(_json_line(record))


COMMAND = Command("generate", GenerateConfig, generate, show_generated)
