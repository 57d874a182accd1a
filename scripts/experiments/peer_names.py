"""The documents of ``compare_peers.py`` with the name of their task as a first line."""

from __future__ import annotations

from itertools import chain

import torch

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.batch import IGNORED
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError


def with_names(data: TaskData, backbone: Backbone) -> TaskData:
    """The documents with the name of their task as a first line, which is read and not predicted.

    Raises:
        InputError: a document and its name are longer than the context of the base.
    """
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    names = [tokenizer(f"{name}\n", add_special_tokens=False)["input_ids"] for name in data.tasks]

    def named(split: TokenSplit) -> TokenSplit:
        documents, observed = [], []
        for n, d in enumerate(split.task.tolist()):
            ids, labels = split.document(n).tolist(), split.labels(n)
            documents.append([ids[0], *names[d], *ids[1:]])
            observed.append([False] * (1 + len(names[d])) + (labels[1:] != IGNORED).tolist())
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        if backbone.context is not None and len(lengths) and int(lengths.max()) > backbone.context:
            raise InputError(
                f"a document with the name of its task has {int(lengths.max())} tokens, but the base reads {backbone.context}; "
                "give a smaller max_tokens"
            )
        return TokenSplit(
            torch.tensor([*chain.from_iterable(documents)], dtype=torch.int64), lengths, task=split.task,
            characters=split.characters, num_tasks=split.num_tasks, pad_token_id=split.pad_token_id,
            observed=torch.tensor([*chain.from_iterable(observed)], dtype=torch.bool),
        )  # fmt: skip

    train, validation, test = (named(split) for split in (data.train, data.validation, data.test))
    assert (train.num_tokens, test.num_tokens) == (data.train.num_tokens, data.test.num_tokens)  # names are not predicted
    return TaskData(data.tasks, train, validation, test)
