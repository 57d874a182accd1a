"""Continue a prompt with the adapters of several tasks, and show the texts side by side.

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
from bora_pyro.predict.authors import BASE, ROUTED, Authors
from bora_pyro.predict.generate import Continuation, generate_side_by_side
from bora_pyro.runs.command import Command
from bora_pyro.runs.saved import load_run

#: The smallest readable width of a column. If a column would be narrower, the tasks are shown below each other.
LEAST_WIDTH = 28


@dataclass(kw_only=True)
class GenerateConfig:
    """Continue prompts with the adapters of several tasks of a finished run, in one batch."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    prompt: list[str] = option(
        [],
        "beginning of a text; if the run was fitted to chats, the message of a user; may be repeated (at least one is needed)",
        whole=True,
    )
    task: list[str] = option(
        [],
        f"task whose adapter continues the prompt: its name or the name of its folder, {BASE} (no adapter) or {GLOBAL_MEAN} (Θ); "
        f"may be repeated; if a task is named {BASE} or {GLOBAL_MEAN}, 'plain {BASE}' or 'plain {GLOBAL_MEAN}' means no adapter "
        f"or Θ (default: the first two tasks, {GLOBAL_MEAN} and {BASE}); a run of route-fit has {ROUTED} and {BASE} alone",
        whole=True,
    )
    samples: int = option(1, "continuations of each prompt by each task")
    max_new_tokens: int = option(40, "tokens of a continuation, at most")
    temperature: float = option(0.0, "0 takes the most probable token; above 0 tokens are drawn")
    top_p: float = option(1.0, "draw from the most probable tokens whose total probability is this")
    seed: int = option(0, "seed of the draws")
    trust_remote_code: bool = option(
        False, "let a base model run code of its own on this machine; allowed on the command line only", line_only=True
    )
    raw: bool = option(False, "take prompts as beginnings of texts, even if the run was fitted to chats")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    json: bool = option(False, "print one line of JSON for each text instead of a table")

    def validate(self) -> None:
        """Raise ``InputError`` if the run or the prompt is missing."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in generate.py runs/map_fit --prompt 'It was'")
        if not self.prompt:
            raise InputError("no prompt is given; give the beginning of a text, as in --prompt 'It was'")


def side_by_side(written: list[Continuation], width: int, *, between: str = "") -> Table:
    """A table with one column for each task, or one row for each task if the terminal is too narrow.

    Args:
        written: the texts.
        width: width of the terminal, in characters.
        between: text between a prompt and its continuation.
    """
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
    """A record as one line of JSON. Characters that a terminal could interpret are escaped."""
    text = json.dumps(record, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)


def generate(config: GenerateConfig) -> tuple[list[Continuation], bool]:
    """Continue the prompts with the adapters of the tasks; return the texts, and whether they are answers in a chat.

    Raises:
        InputError: the run cannot be read, or it does not have one of the tasks.
    """
    fitted = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code).fitted
    authors = Authors(fitted.tasks, routed=fitted.model.router.reads_all_tasks)
    usual = [*fitted.tasks[:2], authors.mean] if authors.routed is None else [authors.routed]
    tasks = config.task or [*usual, authors.base]
    written = generate_side_by_side(
        fitted, config.prompt, tasks, samples=config.samples, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_p=config.top_p, seed=config.seed, raw=config.raw,
    )  # fmt: skip
    return written, fitted.chat_template is not None and not config.raw


def show_generated(config: GenerateConfig, result: tuple[list[Continuation], bool]) -> None:
    """Print the texts side by side, or each as one line of JSON."""
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
