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

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.assign import task_generator
from bora_pyro.data.chat_template import ASSISTANT, ChatTemplate, chat_template_of, load_chat_template
from bora_pyro.data.counts import Counts, Documents, counted, listed, others
from bora_pyro.data.digest import documents_digest
from bora_pyro.data.options import DataOptions
from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.splitters import AsGiven, ByGroup, Split, Splitter, drop_tasks
from bora_pyro.data.streaming import TokenFile, stream_documents
from bora_pyro.data.tables import Source, read_documents
from bora_pyro.data.task_weights import task_weights as weights_of
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, tokenise
from bora_pyro.errors import InputError, shown
from bora_pyro.options.field import with_changes


@dataclass
class TaskData:
    """The documents of D tasks, split and tokenised.

        >>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> TaskData(["ada", "bob"], train=split, validation=split, test=split).num_tasks
        2

    Attributes:
        tasks: sorted names; those that were joined later (:func:`~bora_pyro.data.join.join_tasks`) come after them. The position
            of a name is its task index d.
        train: tokens of the training documents.
        validation: tokens of the validation documents.
        test: tokens of the test documents.
        split_record: the split of each group of each task, in a form that JSON can hold. `bora_pyro.data.ByRecord` splits by it.
        notes: lines for the user: what was dropped or cut, and which tasks are not in every split.
        task_weights: (D,) factors of the tasks' log-likelihoods, for ``CausalLM(task_weights=...)``; None: all are 1.
        chat_template: the template that wrote the documents, if they are chats.
        counts: what was read and left out, if the documents come from a table.
        task_groups: the name of each task's group, (D,); None: tasks have no groups.
    """

    tasks: list[str]
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    split_record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    task_weights: Tensor | None = None
    chat_template: str | None = None
    counts: Counts | None = None
    task_groups: list[str] | None = None

    @property
    def num_tasks(self) -> int:
        """D, the number of tasks."""
        return len(self.tasks)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all that a fit sees: documents, task weights and task groups. A run recognises its documents by it."""
        splits = [self.train, self.validation, self.test]
        return documents_digest(self.tasks, splits, self.task_weights, task_groups=self.task_groups)

    def __repr__(self) -> str:
        names = ", ".join(shown(task) for task in self.tasks[:3]) + (", ..." if len(self.tasks) > 3 else "")
        counts = ", ".join(f"{getattr(self, name).num_documents} {name}" for name in SPLITS)
        return f"TaskData({len(self.tasks)} tasks: {names}; documents: {counts})"


def load_tasks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions | None = None,
    *,
    split: Splitter | None = None,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    task_weights: Mapping[str, float] | str | Path | None = None,
    least_tasks: int = 2,
    **changes: Any,
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
        source: see `read_table`, as for the columns among the options.
        tokenizer: the tokenizer of the base model.
        options: names of the columns, lengths and numbers of documents; default: ``DataOptions()``. A smaller
            ``max_train_documents`` keeps a subset of the documents that a larger one keeps, and does not change validation and
            test, so that learning curves are comparable. For ``long_documents`` see `bora_pyro.data.encode.encoder`.
        split: the way to split (`bora_pyro.data.splitters`); default: the split that ``split_column`` or the source gives, where
            validation or test documents that it lacks are cut from train; otherwise a split by group.
        fractions: share of train, validation and test in a split by group.
        task_weights: a factor of the log-likelihood of each task, by name, or a file of them (`bora_pyro.data.task_weights`);
            1 where none is given.
        least_tasks: the least number of tasks; 1 if the others that share the prior are elsewhere. A ``split`` decides itself.
        changes: single options, as ``max_tokens=64``.

    Raises:
        InputError: the data or an argument cannot be used.
    """
    options = with_changes(options or DataOptions(), changes)
    options.validate()
    if options.options_column is not None and options.long_documents == "split":
        raise InputError("options_column and long_documents split are both given; no option is split: leave one of them out")
    options = replace(options, chat_template=load_chat_template(options.chat_template))
    read, tokens = _read(source, tokenizer, options)
    if split is None:
        split = (AsGiven if "split" in read.table.column_names else ByGroup)(fractions, options.seed_of_split, least_tasks)
    found = split.split(read.table, options)
    found, done = _with_training(found, lambda now: _tokenised(now, tokens, tokenizer, options), options, read.notes, least_tasks)
    notes = [*read.notes, *found.notes, *_token_notes([*done.values()], read.content, options.max_tokens)]
    tasks = sorted(found.record["tasks"])
    if not len(done["train"].split):
        raise _nothing_to_train_on(read.content, options.max_tokens, notes)
    notes += _empty_side_notes(found, done)
    task_groups = None if options.task_group_column is None else _task_groups(tasks, read.task_groups, options.task_group_column)
    notes += [] if task_groups is None else [_task_group_note(task_groups)]
    return TaskData(
        tasks=tasks,
        train=done["train"].split,
        validation=done["validation"].split,
        test=done["test"].split,
        split_record=found.record,
        notes=notes,
        task_weights=None if task_weights is None else weights_of(task_weights, tasks, known=set(read.table["task"][:])),
        chat_template=chat_template_of(tokenizer, options.chat_template) if "messages" in read.content else None,
        counts=_counts(read, found, done),
        task_groups=task_groups,
    )


def _task_groups(tasks: Sequence[str], known: Mapping[str, str], column: str) -> list[str]:
    """The group of each task.

    Raises:
        InputError: a task has none.
    """
    without = [task for task in tasks if task not in known]
    if without:
        more = others(len(without) - 1, "nor")
        raise InputError(
            f"task {shown(without[0])} has no group in column {column!r} (task_group_column){more}; give every task one; a group "
            "may have a single task"
        )
    return [known[task] for task in tasks]


def _task_group_note(groups: Sequence[str], *, most: int = 12) -> str:
    """A note on the groups and the number of their tasks."""
    sizes = sorted(Counter(groups).items())
    parts = [f"{shown(name)} ({number:,})" for name, number in sizes[:most]]
    parts += [f"{len(sizes) - most:,} more"] * (len(sizes) > most)
    return f"{counted(len(groups), 'task')} in {counted(len(sizes), 'group')}: {', '.join(parts)}"


def _read(source: Source, tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> tuple[Documents, TokenFile | None]:
    """The documents, and their tokens if ``streaming``; the table then has no texts."""
    how: dict[str, Any] = {"hub_split": options.hub_split, "reading": options}
    if options.streaming:
        return stream_documents(source, tokenizer, options.columns, **how, **_form(options))
    template = ChatTemplate.find(tokenizer, options.chat_template)
    return read_documents(source, options.columns, template=template, **how), None


def _form(options: DataOptions) -> dict[str, Any]:
    """Options that say how a document becomes tokens."""
    return {name: getattr(options, name) for name in ("max_tokens", "long_documents", "chat_template")}


def _tokenised(
    found: Split, tokens: TokenFile | None, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> dict[str, Tokenised]:
    """Tokenise each side of the split, with at most as many documents of a task as the options allow."""
    task_index, done = {task: index for index, task in enumerate(sorted(found.record["tasks"]))}, {}
    for name in SPLITS:
        limit = options.max_train_documents if name == "train" else options.max_eval_documents
        part = found.parts[name] if limit is None else _at_most(found.parts[name], limit, seed=options.seed_of_split, split=name)
        if tokens is None:
            done[name] = tokenise(part, tokenizer, task_index=task_index, **_form(options))
        else:
            done[name] = tokens.of(part, tokenizer, task_index)
    return done


def _with_training(
    found: Split, tokenised: Callable[[Split], dict[str, Tokenised]], options: DataOptions, notes: Sequence[str], least: int
) -> tuple[Split, dict[str, Tokenised]]:
    """Tokenise. Refuse or drop tasks of which no training document has a token to predict."""
    done = tokenised(found)
    untrained = [task for task, number in zip(sorted(found.record["tasks"]), _per_task(done["train"]), strict=True) if not number]
    if not untrained or found.keeps_tasks or not len(done["train"].split):
        return found, done
    if options.small_tasks == "error":
        documents = counted(Counter(found.parts["train"]["task"][:])[untrained[0]], "training document")
        more, noted = others(len(untrained) - 1, "nor"), f" ({'; '.join(notes)})" if notes else ""
        lacks = "has a token to predict" if options.options_column is None else "has room for all its options"
        raise InputError(
            f"task {shown(untrained[0])} has no training document left: none of its {documents} {lacks} within "
            f"max_tokens {options.max_tokens}{more}{noted}; raise max_tokens, or leave such tasks out with small_tasks=drop"
        )
    why = f"of which no training document has a token to predict within {options.max_tokens}"
    found = drop_tasks(found, untrained, why, least=least)
    return found, tokenised(found)


def _per_task(side: Tokenised) -> list[int]:
    return side.split.documents_per_task


def _empty_side_notes(found: Split, done: Mapping[str, Tokenised]) -> list[str]:
    """Notes on tasks that have documents on a side of the split, but no token there to predict."""
    notes, tasks = [], sorted(found.record["tasks"])
    for name in SPLITS:
        there = set(found.parts[name]["task"][:])
        empty = [task for task, number in zip(tasks, _per_task(done[name]), strict=True) if task in there and not number]
        if empty:
            verb = "has" if len(empty) == 1 else "have"
            notes.append(f"{counted(len(empty), 'task')} {verb} {name} documents, but no token there to predict: {listed(empty)}")
    return notes


def _counts(read: Documents, found: Split, done: Mapping[str, Tokenised]) -> Counts:
    left_out = Counter(read.left_out)
    left_out.update(found.left_out)
    for name, option in (("train", "max_train_documents"), ("validation", "max_eval_documents"), ("test", "max_eval_documents")):
        left_out[f"beyond {option}"] += len(found.parts[name]) - done[name].num_documents - done[name].num_dropped
    reason = "with an option without a token, or too long" if "options" in read.content else "without a token to predict"
    left_out[reason] += sum(side.num_dropped for side in done.values())
    return Counts(
        rows=read.rows,
        tasks=len(found.record["tasks"]),
        documents={name: side.num_documents for name, side in done.items()},
        tokens={name: side.split.num_tokens for name, side in done.items()},
        left_out={reason: number for reason, number in left_out.items() if number},
        columns=read.columns,
        used=read.used,
        form=read.form,
    )


def _nothing_to_train_on(content: Sequence[str], max_tokens: int, notes: Sequence[str]) -> InputError:
    if "messages" in content:
        give = f"chats in which a turn of the role {ASSISTANT!r} begins within {max_tokens} tokens"
    elif "options" in content:
        give = f"prompts and options of {max_tokens} tokens or fewer together"
    elif "prompt" in content:
        give = f"prompts that leave room for a token of their completions within {max_tokens}"
    else:
        give = "texts that the tokenizer knows"
    why = f" ({'; '.join(notes)})" if notes else ""
    return InputError(f"no training document is left{why}; give {give}, and a split that trains")


def _token_notes(done: Sequence[Tokenised], content: Sequence[str], max_tokens: int) -> list[str]:
    """Notes on documents that were dropped, cut or split into pieces."""
    what = "of text" if list(content) == ["text"] else f"to predict within {max_tokens}"
    notes, total = [], sum(part.num_documents for part in done)
    if num_dropped := sum(part.num_dropped for part in done):
        was = "was" if num_dropped == 1 else "were"
        without = f"without a token {what}"
        if "options" in content:
            without = f"with an option that has no token, or more than {max_tokens} with its prompt,"
        notes.append(f"{counted(num_dropped, 'document')} {without} {was} dropped")
    if num_cut := sum(part.num_cut for part in done):
        notes.append(f"{num_cut} of {total} documents are longer than {max_tokens} tokens and were cut")
    if num_split := sum(part.num_split for part in done):
        pieces = sum(len(part.split) for part in done) - total + num_split
        notes.append(f"{num_split} of {total} documents are longer than {max_tokens} tokens and were split into {pieces} pieces")
    return notes


def _at_most(dataset: datasets.Dataset, limit: int, *, seed: int, split: str) -> datasets.Dataset:
    """At most `limit` documents of each task. A smaller limit keeps a subset of what a larger one keeps."""
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(dataset["task"][:]):
        rows.setdefault(task, []).append(row)
    keep: list[int] = []
    for task, members in rows.items():
        order = task_generator(seed, task, split).permutation(len(members))
        keep += [members[position] for position in order[:limit]]
    return dataset.select(sorted(keep))
