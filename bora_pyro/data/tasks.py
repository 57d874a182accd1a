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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.data.chat_template import ASSISTANT, ChatTemplate, chat_template_of, load_chat_template
from bora_pyro.data.digest import documents_digest
from bora_pyro.data.encode import content_columns
from bora_pyro.data.options import DataOptions
from bora_pyro.data.split import task_generator
from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.splitters import ByColumn, ByGroup, Splitter
from bora_pyro.data.streaming import TokenFile, stream_documents
from bora_pyro.data.tables import Source, read_table
from bora_pyro.data.task_weights import task_weights as weights_of
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import Tokenised, tokenise
from bora_pyro.errors import InputError
from bora_pyro.options.field import with_changes


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
        split_record: the split of each group of each task, in a form that JSON can hold. `bora_pyro.data.ByRecord` splits by it.
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
    options: DataOptions | None = None,
    *,
    split: Splitter | None = None,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    task_weights: Mapping[str, float] | str | Path | None = None,
    hub_split: str | None = "train",
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
        source: see `read_table`, as for `hub_split` and the columns among the options.
        tokenizer: the tokenizer of the base model.
        options: names of the columns, lengths and numbers of documents; default: ``DataOptions()``. A smaller
            ``max_train_documents`` keeps a subset of the documents that a larger one keeps, and does not change validation and
            test, so that learning curves are comparable. For ``long_documents`` see `bora_pyro.data.encode.encoder`.
        split: the way to split (`bora_pyro.data.splitters`); default: by ``split_column`` if it is given, otherwise by group.
        fractions: share of train, validation and test in a split by group.
        task_weights: a factor of the log-likelihood of each task, by name, or a file of them (`bora_pyro.data.task_weights`);
            1 where none is given.
        hub_split: split to read of a hub id; None reads all.
        changes: single options, as ``max_tokens=64``.

    Raises:
        InputError: the data or an argument cannot be used.
    """
    options = with_changes(options or DataOptions(), changes)
    options.validate()
    options = replace(options, chat_template=load_chat_template(options.chat_template))
    if split is None:
        split = ByColumn() if options.split_column is not None else ByGroup(fractions, options.seed)
    table, tokens, notes, content = _read(source, tokenizer, options, hub_split)
    parts, record, split_lines = split.split(table, options)
    tasks = sorted(record["tasks"])
    done = _tokenised(parts, tokens, tokenizer, tasks, options)
    notes = [*notes, *split_lines, *_token_notes([*done.values()], content, options.max_tokens)]
    if not len(done["train"].split):
        raise _nothing_to_train_on(content, options.max_tokens, notes)
    return TaskData(
        tasks=tasks,
        train=done["train"].split,
        validation=done["validation"].split,
        test=done["test"].split,
        split_record=record,
        notes=notes,
        task_weights=None if task_weights is None else weights_of(task_weights, tasks, known=set(table["task"][:])),
        chat_template=chat_template_of(tokenizer, options.chat_template) if "messages" in content else None,
    )


def _read(
    source: Source, tokenizer: PreTrainedTokenizerBase, options: DataOptions, hub_split: str | None
) -> tuple[datasets.Dataset, TokenFile | None, list[str], list[str]]:
    """The table of documents, their tokens if ``streaming``, notes, and the columns that hold a document.

    With ``streaming`` the table has no texts.
    """
    if options.streaming:
        return stream_documents(source, tokenizer, options.columns, hub_split=hub_split, **_form(options))
    template = ChatTemplate.find(tokenizer, options.chat_template)
    columns = {**options.column_options, "document_form": options.document_form}
    table, notes = read_table(source, **columns, template=template, hub_split=hub_split)
    return table, None, notes, content_columns(table.column_names)


def _form(options: DataOptions) -> dict[str, Any]:
    """Options that say how a document becomes tokens."""
    return {name: getattr(options, name) for name in ("max_tokens", "long_documents", "chat_template")}


def _tokenised(
    parts: Mapping[str, datasets.Dataset],
    tokens: TokenFile | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    options: DataOptions,
) -> dict[str, Tokenised]:
    """Tokenise each side of the split, with at most as many documents of a task as the options allow."""
    task_index, done = {task: index for index, task in enumerate(tasks)}, {}
    for name in SPLITS:
        limit = options.max_train_documents if name == "train" else options.max_eval_documents
        part = parts[name] if limit is None else _at_most(parts[name], limit, seed=options.seed, split=name)
        if tokens is None:
            done[name] = tokenise(part, tokenizer, task_index=task_index, **_form(options))
        else:
            done[name] = tokens.of(part, tokenizer, task_index)
    return done


def _nothing_to_train_on(content: Sequence[str], max_tokens: int, notes: Sequence[str]) -> InputError:
    if "messages" in content:
        give = f"chats in which a turn of the role {ASSISTANT!r} begins within {max_tokens} tokens"
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
        notes.append(f"{num_dropped} documents without a token {what} were dropped")
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
