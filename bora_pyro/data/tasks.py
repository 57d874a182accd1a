"""Load a table of documents as D tasks, each with tokenised training, validation and test documents.

>>> import pandas as pd
>>> from tokenizers import Tokenizer, models, pre_tokenizers
>>> from transformers import PreTrainedTokenizerFast
>>> words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "good": 3, "day": 4}, unk_token="?"))
>>> words.pre_tokenizer = pre_tokenizers.Whitespace()
>>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")
>>> speeches = pd.DataFrame({"task": ["Ada", "Bo"] * 5, "text": ["good day", "day"] * 5})
>>> data = load_tasks(speeches, tokenizer)
>>> data
TaskData(2 tasks: 'Ada', 'Bo'; documents: 6 train, 2 validation, 2 test)
>>> data.train.document(0).tolist()
[0, 3, 4, 1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat import ASSISTANT, chat_template_of, load_chat_template
from bora_pyro.data.digest import documents_digest
from bora_pyro.data.files import SPLITS
from bora_pyro.data.rows import Columns
from bora_pyro.data.split import (
    apply_split,
    check_task_count,
    drop_small_tasks,
    record_of_column,
    split_by_group,
    split_notes,
    task_generator,
)
from bora_pyro.data.streaming import TokenFile, stream_documents
from bora_pyro.data.tables import Source, read_table
from bora_pyro.data.task_weights import task_weights as weights_of
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, tokenise
from bora_pyro.errors import InputError


@dataclass
class TaskData:
    """The documents of D tasks, split and tokenised.

        >>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> TaskData(["ada", "bob"], train=split, validation=split, test=split).num_tasks
        2

    Attributes:
        tasks: sorted names. The position of a name is its task index d.
        train: tokens of the training documents.
        validation: tokens of the validation documents.
        test: tokens of the test documents.
        split_record: the split of each group of each task, in a form that JSON can hold. `load_tasks` can split by it again.
        notes: lines for the user: what was dropped or cut, and which tasks are not in every split.
        task_weights: (D,) factors of the tasks' log-likelihoods, for ``CausalLM(task_weights=...)``; None: all are 1.
        chat_template: the template that wrote the documents, if they are chats.
    """

    tasks: list[str]
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    split_record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    task_weights: Tensor | None = None
    chat_template: str | None = None

    @property
    def num_tasks(self) -> int:
        """D, the number of tasks."""
        return len(self.tasks)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all that a fit sees of the documents, with task weights. A run recognises its documents by it."""
        return documents_digest(self.tasks, [self.train, self.validation, self.test], self.task_weights)

    def __repr__(self) -> str:
        names = ", ".join(repr(task) for task in self.tasks[:3]) + (", ..." if len(self.tasks) > 3 else "")
        counts = ", ".join(f"{len(getattr(self, name))} {name}" for name in SPLITS)
        return f"TaskData({len(self.tasks)} tasks: {names}; documents: {counts})"


def load_tasks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task_column: str | Sequence[str] = "task",
    text_column: str | Sequence[str] = "text",
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    chat_template: str | Path | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    hub_split: str | None = "train",
    streaming: bool = False,
    num_tasks: int | None = None,
    max_tokens: int = 256,
    long_documents: str = "cut",
    max_train_documents: int | None = None,
    max_eval_documents: int | None = None,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    small_tasks: str = "error",
    split_record: Mapping[str, Any] | None = None,
    task_weights: Mapping[str, float] | str | Path | None = None,
    new_tasks: bool = False,
) -> TaskData:
    """Read, split and tokenise.

        >>> from transformers import AutoTokenizer
        >>> from bora_pyro.backbone.backbone import BUILTIN_BASES
        >>> tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
        >>> rows = {"task": ["ada", "bob"] * 5, "text": [f"document {n}" for n in range(10)]}
        >>> load_tasks(datasets.Dataset.from_dict(rows), tokenizer, max_tokens=16)
        TaskData(2 tasks: 'ada', 'bob'; documents: 6 train, 2 validation, 2 test)
        >>> rows = {"task": ["ada", "bob"] * 3, "question": ["Is it?"] * 6, "answer": [" Yes.", " No."] * 3}
        >>> columns = {"prompt_column": "question", "completion_column": "answer"}
        >>> data = load_tasks(datasets.Dataset.from_dict(rows), tokenizer, **columns)
        >>> tokenizer.decode([label for label in data.train.labels(0).tolist() if label >= 0])
        ' Yes.</s>'

    Args:
        source: see `read_table`, as for the columns and `hub_split`.
        tokenizer: the tokenizer of the base model.
        task_column: column with the name of the task, or several, whose names are joined by `` / ``.
        text_column: column with the text, or several, whose texts are joined by a blank line.
        prompt_column: column with a prompt, which is only read.
        completion_column: column with the text that follows the prompt and is predicted.
        messages_column: column with a chat, of which the assistant's turns are predicted.
        chat_template: how chats are written, a .jinja file or a template as text; default: the tokenizer's own.
        group_column: column with what a split must not separate.
        split_column: column with a ready split; then `fractions` and `small_tasks` do nothing.
        hub_split: split to read of a hub id; None reads all.
        streaming: read a hub id or a folder row by row, and keep the tokens in a file: for corpora larger than memory.
        num_tasks: take the first n tasks by sorted name; None takes all.
        max_tokens: longest document in tokens, with its start and end.
        long_documents: ``cut`` leaves out what is beyond `max_tokens`; ``split`` makes consecutive pieces of a document, which
            stay on one side of the split, have its prompt each, and count as a document each (`bora_pyro.data.encode.encoder`).
        max_train_documents: keep at most so many training documents a task, drawn by the seed. The documents of a smaller
            number are among those of a larger one, and validation and test stay whole: made for learning curves.
        max_eval_documents: the same for validation and for test documents.
        fractions: share of train, validation and test.
        seed: of the split and of the documents that are kept.
        small_tasks: ``error`` or ``drop``: tasks with fewer than three documents.
        split_record: split as this record of an earlier run says, whatever `split_column`, `fractions` and `small_tasks` say;
            tasks that it does not have are left out.
        task_weights: a factor of the log-likelihood of each task, by name, or a file of them (`bora_pyro.data.task_weights`);
            1 where none is given.
        new_tasks: the tasks are new ones that a fit is adapted to (`bora_pyro.inference.adapt`): one is enough, and without
            `split_column` all their documents train.

    Raises:
        InputError: the data or an argument cannot be used; the message says which and what to do.
    """
    for option, value in (("max_train_documents", max_train_documents), ("max_eval_documents", max_eval_documents)):
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}; give 1 or more, or None for all")
    columns: dict[str, Any] = {
        "task_column": task_column,
        "text_column": text_column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "messages_column": messages_column,
        "group_column": group_column,
        "split_column": split_column,
    }
    tokens: TokenFile | None = None
    form: dict[str, Any] = {
        "max_tokens": max_tokens,
        "long_documents": long_documents,
        "chat_template": load_chat_template(chat_template),
    }
    if streaming:
        table, tokens, notes = stream_documents(source, tokenizer, Columns.given(**columns), hub_split=hub_split, **form)
    else:
        table, notes = read_table(source, **columns, hub_split=hub_split)
    names = set(table["task"][:])
    if split_record is not None:
        record: dict[str, Any] = _first_tasks_of_record(split_record, num_tasks)
        parts = apply_split(table, record)
        left_out = names - set(record["tasks"])
        if small_tasks == "drop" and split_column is None and not new_tasks:
            large, dropped = drop_small_tasks(table, small_tasks=small_tasks)
            if (small := names - set(large["task"][:])) <= left_out:
                notes += dropped  # as they were when the record was made
                left_out -= small
        if left_out and num_tasks is None:
            noun = "1 task" if len(left_out) == 1 else f"{len(left_out)} tasks"
            were = "was" if len(left_out) == 1 else "were"
            notes.append(f"{noun} that the split record does not have {were} left out")
        notes += split_notes(parts, record)
    elif split_column is not None or new_tasks:
        if not (new_tasks and num_tasks is None):
            table = _first_tasks(table, num_tasks)
        record = record_of_column(table, new_tasks=new_tasks)
        parts = apply_split(table, record)
        notes += split_notes(parts, record, asked=split_column is not None)
    else:
        if small_tasks == "drop":
            # Before the first n are taken, so that n tasks are left.
            table, dropped = drop_small_tasks(table, small_tasks=small_tasks)
            notes += dropped
        table = _first_tasks(table, num_tasks)
        parts, record, split_lines = split_by_group(table, fractions=fractions, seed=seed, small_tasks=small_tasks)
        notes += split_lines

    tasks = sorted(record["tasks"])
    task_index = {task: index for index, task in enumerate(tasks)}
    done = {}
    for name in SPLITS:
        limit = max_train_documents if name == "train" else max_eval_documents
        part = parts[name] if limit is None else _at_most(parts[name], limit, seed=seed, split=name)
        done[name] = (
            tokenise(part, tokenizer, task_index=task_index, **form) if tokens is None else tokens.of(part, tokenizer, task_index)
        )
    what = "of text" if prompt_column is None and messages_column is None else f"to predict within {max_tokens}"
    notes += _token_notes([*done.values()], what, max_tokens)
    if not len(done["train"].split):
        if messages_column is not None:
            give = f"chats in which a turn of the role {ASSISTANT!r} begins within {max_tokens} tokens"
        elif prompt_column is not None:
            give = f"prompts that leave room for a token of their completions within {max_tokens}"
        else:
            give = "texts that the tokenizer knows"
        why = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(f"no training document is left{why}; give {give}, and a split that trains")
    return TaskData(
        tasks=tasks,
        train=done["train"].split,
        validation=done["validation"].split,
        test=done["test"].split,
        split_record=record,
        notes=notes,
        task_weights=None if task_weights is None else weights_of(task_weights, tasks, known=names),
        chat_template=None if messages_column is None else chat_template_of(tokenizer, form["chat_template"]),
    )


def _token_notes(done: Sequence[Tokenised], what: str, max_tokens: int) -> list[str]:
    """Notes on what became of documents when they were tokenised."""
    notes, total = [], sum(part.num_documents for part in done)
    if num_dropped := sum(part.num_dropped for part in done):
        notes.append(f"{num_dropped} documents without a token {what} were dropped")
    if num_cut := sum(part.num_cut for part in done):
        notes.append(f"{num_cut} of {total} documents are longer than {max_tokens} tokens and were cut")
    if num_split := sum(part.num_split for part in done):
        pieces = sum(len(part.split) for part in done) - total + num_split
        notes.append(f"{num_split} of {total} documents are longer than {max_tokens} tokens and were split into {pieces} pieces")
    return notes


def _first_tasks(table: datasets.Dataset, num_tasks: int | None) -> datasets.Dataset:
    """The rows of the first `num_tasks` tasks by name."""
    names = table["task"][:]
    tasks = sorted(set(names))
    check_task_count(tasks)
    if num_tasks is None:
        return table
    keep = set(_take(tasks, num_tasks, "the data"))
    return table.select([row for row, name in enumerate(names) if name in keep])


def _first_tasks_of_record(record: Mapping[str, Any], num_tasks: int | None) -> dict[str, Any]:
    tasks = record.get("tasks")
    if num_tasks is None or not isinstance(tasks, Mapping):
        return dict(record)
    return {**record, "tasks": {task: tasks[task] for task in _take(sorted(tasks), num_tasks, "the split record")}}


def _take(tasks: list[str], num_tasks: int, where: str) -> list[str]:
    if not 2 <= num_tasks <= len(tasks):
        raise InputError(f"num_tasks is {num_tasks}; {where} has {len(tasks)} tasks, give 2 to {len(tasks)} or None for all")
    return tasks[:num_tasks]


def _at_most(dataset: datasets.Dataset, limit: int, *, seed: int, split: str) -> datasets.Dataset:
    """At most `limit` documents of each task; a smaller limit keeps a subset of what a larger one keeps."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(dataset["task"][:]):
        rows.setdefault(task, []).append(row)
    keep: list[int] = []
    for task, members in rows.items():
        order = task_generator(seed, task, split).permutation(len(members))
        keep += [members[position] for position in order[:limit]]
    return dataset.select(sorted(keep))
