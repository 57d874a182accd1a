"""Prompts as a reward sees them: the texts of the table, found again by their tokens.

The data of a fit from rewards are prompts, read as documents. A document ends with an end mark, a prompt does not.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> rows = [{"task": name, "text": f"Say {n} words"} for name in ("ada", "bob") for n in range(5)]
>>> data = bp.load_tasks(bp.table(rows), backbone.tokenizer)
>>> prompts = PromptTexts.of(bp.table(rows), backbone, data)
>>> prompts.text(0, prompt_ids(data.train.document(0), backbone.tokenizer)).startswith("Say ")
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.encode import encoder
from bora_pyro.data.options import DataOptions
from bora_pyro.data.readers import open_source
from bora_pyro.data.tables import Source, read_rows
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.options.field import with_changes

# Rows that are tokenised at one time.
_ROWS = 1000


def prompt_ids(document: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens of a prompt, (tokens,): those of its document without the end mark."""
    ends = len(document) > 1 and int(document[-1]) == tokenizer.eos_token_id
    return document[:-1] if ends else document


def check_prompts(backbone: Backbone, data: TaskData) -> None:
    """Check that documents can be read as prompts.

    Raises:
        InputError: they are prompts with completions, chats, questions, or pieces of long documents; or one leaves the base no
            room to write.
    """
    tokenizer = tokenizer_of(backbone, "read and write texts with")
    for split in (data.train, data.validation, data.test):
        if split.observed is not None or split.correct is not None or split.document_index is not None:
            raise InputError(
                "the documents are completions, chats, questions or pieces of texts; a fit from rewards needs prompts alone, "
                "each a text of the table"
            )
        for number in range(len(split) if backbone.context is not None else 0):
            length = len(prompt_ids(split.document(number), tokenizer))
            if length >= (backbone.context or 0):
                raise InputError(
                    f"a prompt of task {shown(data.tasks[int(split.task[number])])} has {length} tokens, and the base reads "
                    f"{backbone.context}, the new ones included; give prompts of {(backbone.context or 0) - 1} tokens or fewer"
                )


@dataclass(frozen=True)
class PromptTexts:
    """The text of each prompt by its task's index and its tokens.

    Attributes:
        texts: the texts.
    """

    texts: Mapping[tuple[int, bytes], str]

    @classmethod
    def of(
        cls, source: Source, backbone: Backbone, data: TaskData, options: DataOptions | None = None, **changes: Any
    ) -> PromptTexts:
        """Read the table again, and find the texts of the prompts in the data.

        Args:
            source: the table that ``load_tasks`` read.
            backbone: the base, with a tokenizer.
            data: what ``load_tasks`` returned.
            options: its options.
            changes: single options.

        Raises:
            InputError: a prompt was cut, because it has more than ``max_tokens`` tokens; two prompts of a task differ as texts
                and have the same tokens; the table is not that of the data; or as for `check_prompts`.
        """
        check_prompts(backbone, data)
        options, tokenizer = with_changes(options or DataOptions(), changes), tokenizer_of(backbone)
        index = {task: d for d, task in enumerate(data.tasks)}
        encode = encoder(tokenizer, longest := min(options.max_tokens, backbone.context or options.max_tokens))
        found: dict[tuple[int, bytes], str] = {}
        rows = [row for row in _rows(source, options) if row["task"] in index]
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            encoded = encode({name: [row[name] for row in part] for name in ("task", "text")})
            for ids, number, cut in zip(encoded["input_ids"], encoded["row"], encoded["cut"], strict=True):
                task, text = part[number]["task"], part[number]["text"]
                if cut:
                    raise InputError(
                        f"the prompt {shown(text)} of task {shown(task)} has more than {longest} tokens, its end mark included, "
                        "and would be cut; raise max_tokens, or shorten it"
                    )
                key = (index[task], _key(np.asarray(ids, dtype=np.int64)))
                if (other := found.setdefault(key, text)) != text:
                    raise InputError(
                        f"the prompts {shown(other)} and {shown(text)} of task {shown(task)} have the same tokens, so the model "
                        "cannot tell them apart; leave one of them out"
                    )
        for split in (data.train, data.validation, data.test):
            for number, d in enumerate(split.task.tolist()):
                if (d, _key(split.document(number).numpy())) not in found:
                    raise InputError(
                        f"a prompt of task {shown(data.tasks[d])} is not in the table; give the table that load_tasks has read"
                    )
        ends = tokenizer.eos_token_id
        return cls({(d, _without_end(key, ends)): text for (d, key), text in found.items()})

    def text(self, task: int, ids: Tensor) -> str:
        """The text of a prompt by the index of its task and its tokens, (tokens,) without the end mark."""
        return self.texts[task, _key(ids.numpy())]


def _rows(source: Source, options: DataOptions) -> Iterator[dict[str, str]]:
    raw = open_source(source, options, hub_split=options.hub_split)
    return read_rows(raw, options.columns)[1]


def _key(ids: np.ndarray) -> bytes:
    return ids.astype(np.int64).tobytes()


def _without_end(key: bytes, end: int | None) -> bytes:
    ids = np.frombuffer(key, dtype=np.int64)
    return key[: -ids.itemsize] if len(ids) > 1 and ids[-1] == end else key
