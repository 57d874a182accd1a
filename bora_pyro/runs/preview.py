"""Show how a fit would read a file: its columns, tasks and splits, and two documents with the predicted part marked.

    bora preview --data speeches.csv --base_model facebook/opt-350m

Only the tokenizer of the base is loaded. Nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.tokenizer import load_tokenizer
from bora_pyro.data import DataOptions, TaskData, TokenSplit, load_tasks
from bora_pyro.data.counts import counted, listed
from bora_pyro.data.options import DATA
from bora_pyro.data.readers.raw import column_of
from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.tables import check_source
from bora_pyro.errors import escaped
from bora_pyro.files.text import NAME_LENGTH, name_line
from bora_pyro.options.field import by_heading, changed, option, part_of
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.groups import BaseOptions, SourceOptions
from bora_pyro.runs.progress import data_lines, print_fitted

#: The heading of the options of the preview itself.
PREVIEW = "preview"
#: Characters of a part of a document that are shown at its start and at its end.
_START, _END = 400, 150
#: Signs around what is predicted, and those for a terminal or file that cannot show them.
_SIGNS, _PLAIN_SIGNS = ("⟦", "⟧"), ("[[", "]]")


@by_heading(DATA, PREVIEW)
@dataclass(kw_only=True)
class PreviewConfig(DataOptions, SourceOptions):
    """Show how a fit would read a file: columns, tasks, splits, and two documents with the predicted part marked."""

    base_model: str = changed(
        BaseOptions, "base_model", "builtin:nano", "the base whose tokenizer and chat template are used", group=PREVIEW
    )
    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=PREVIEW)
    seed: int = changed(DataOptions, "seed", 0, "seed of the split, as in the fit", group=DATA)
    most: int = option(20, "largest number of tasks to list", group=PREVIEW, least=1)
    documents: int = option(2, "number of tasks of which the first document is shown", group=PREVIEW, least=0)

    def validate(self) -> None:
        """Check every value that can be checked without the data.

        Raises:
            InputError: one line with the value and what is allowed.
        """
        for group in (SourceOptions, DataOptions):
            group.validate(self)


@dataclass(frozen=True)
class Preview:
    """Documents as a fit would read them, and the tokenizer that reads them."""

    data: TaskData
    tokenizer: PreTrainedTokenizerBase


def preview(config: PreviewConfig) -> Preview:
    """Read the documents of a fit as the fit would.

    Raises:
        InputError: the data or the tokenizer cannot be used.
    """
    check_source(config.data)
    tokenizer, context = load_tokenizer(config.base_model, trust_remote_code=config.trust_remote_code)
    options, notes = part_of(config, DataOptions), []
    if context is not None and options.max_tokens > context:
        notes.append(f"max_tokens {options.max_tokens} is more than the base model reads; {context} is used")
        options.max_tokens = context
    data = load_tasks(config.data, tokenizer, options)
    data.notes[:0] = notes
    return Preview(data, tokenizer)


def show(config: PreviewConfig, found: Preview, *, file: TextIO | None = None) -> None:
    """Print a preview.

    Args:
        config: the configuration.
        found: what was read.
        file: where to print; default: stdout.
    """
    file, data = file or sys.stdout, found.data
    assert data.counts is not None
    others = [name for name in data.counts.columns if name not in data.counts.used]
    # a nested name or a number stands for a column of another name
    roots = {column_of(name, others) for name in data.counts.used}
    others = [name for name in others if name not in roots]
    lines = [
        f"source: {escaped(config.data if isinstance(config.data, str) else ' '.join(config.data))}",
        f"columns: {listed(data.counts.used, most=20)}" + (f"; not read: {listed(others, most=20)}" if others else ""),
        f"form of the documents: {data.counts.form}",
        *data_lines(data),
    ]
    shown: list[RenderableType] = [*map(Text, lines), task_table(data, config.most)]
    signs = _SIGNS if _can_show("".join(_SIGNS), file) else _PLAIN_SIGNS
    trained = [d for d, number in enumerate(data.train.documents_per_task) if number]
    for d in trained[: config.documents]:
        n = data.train.task.tolist().index(d)
        rows = (data.train.document_of == data.train.document_of[n]).nonzero()[:, 0]
        which = f", the first of {len(rows):,} pieces" if len(rows) > 1 else ""
        if data.train.correct is not None:
            n, which = int(rows[data.train.correct[rows]]), f", with the right one of {len(rows):,} options"
        tokens, predicted = counted(int(data.train.lengths[n]), "token"), int(data.train.predicted[n])
        what = f"{name_line(data.tasks[d])}{which}"
        shown.append(Text(f"{what}: {tokens}, {predicted:,} of them predicted: {' '.join(signs)}"))
        shown.append(Text.assemble(document_text(data.train, n, found.tokenizer, signs), "\n"))
    print_fitted(*shown, file=file)


def task_table(data: TaskData, most: int) -> Table:
    """The largest tasks with their documents on each side of the split, and one row for the others."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold", max_width=NAME_LENGTH)
    for name in (*SPLITS, "tokens to\npredict"):
        table.add_column(f"{name}\ndocuments" if name in SPLITS else name, justify="right", no_wrap=True)
    sides = [getattr(data, name) for name in SPLITS]
    numbers = [side.documents_per_task for side in sides]
    tokens = [0] * data.num_tasks
    for side in sides:
        for task, number in zip(side.task.tolist(), side.predicted.tolist(), strict=True):
            tokens[task] += number
    sizes = [sum(column) for column in zip(*numbers, strict=True)]
    order = sorted(range(data.num_tasks), key=lambda d: (-sizes[d], d))
    for d in order[:most]:
        table.add_row(Text(name_line(data.tasks[d], characters=None)), *(f"{column[d]:,}" for column in [*numbers, tokens]))
    if rest := order[most:]:
        table.add_row(f"... and {len(rest):,} more", *(f"{sum(column[d] for d in rest):,}" for column in [*numbers, tokens]))
    return table


def document_text(split: TokenSplit, n: int, tokenizer: PreTrainedTokenizerBase, signs: tuple[str, str]) -> Text:
    """A document, with signs around what is predicted. Long parts are shortened."""
    text = Text()
    for part, predicted in _parts(split.document(n).tolist(), [label >= 0 for label in split.labels(n).tolist()], tokenizer):
        shown = escaped(part, keep="\n\t")
        if len(shown) > _START + _END + 20:
            left_out = len(shown) - _START - _END
            shown = f"{shown[:_START]} ... {left_out:,} characters ... {shown[-_END:]}"
        text.append(f"{signs[0]}{shown}{signs[1]}" if predicted else shown, style="bold green" if predicted else "dim")
    return text


def _parts(ids: list[int], predicted: list[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are all predicted or all not."""
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and predicted[end] == predicted[start]:
            continue
        # decoded from the start of the document, because many tokenizers drop a space at the start of a text
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        part = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end])
        yield part, predicted[start]
        start, before = end, whole


def _can_show(text: str, file: TextIO) -> bool:
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


COMMAND = Command("preview", PreviewConfig, preview, show)
