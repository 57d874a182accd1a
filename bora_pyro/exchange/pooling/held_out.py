"""Choice of the shrinkage of independently trained adapters by documents that none of them was trained on.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import bora_pyro as bp
    >>> from bora_pyro.exchange.pooling.folder import read_adapters
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for task in ("ada", "bo"):
    ...         _ = bp.save_peft(Path(folder, task), model, model.starts)  # an adapter that changes nothing yet
    ...     adapters = read_adapters(folder)
    >>> documents = TokenSplit.from_documents([[0, 5, 6], [0, 7, 8, 9]], task=[0, 1], num_tasks=2)
    >>> found = held_out_shrinkage(adapters, backbone, documents, shares=(0.0, 0.5, 1.0))
    >>> found.share, list(found.perplexities)  # no share improves the perplexity, so the adapters are not shrunk
    (0.0, [0.0, 0.5, 1.0])

The estimators of :mod:`bora_pyro.exchange.pooling.hierarchy` make assumptions about the noise and the differences of the tasks.
This module makes none: it measures whether the adapters predict better when they are closer to Θ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.columns import Columns
from bora_pyro.data.counts import Counts
from bora_pyro.data.tables import read_documents
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.names import AdapterNames
from bora_pyro.exchange.pooling.fitted import pooled_fit
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
from bora_pyro.exchange.pooling.pool import pool
from bora_pyro.inference.evaluate import evaluate

#: The shares of the way to Θ that are tried by default.
SHARES = tuple(n / 10 for n in range(11))


@dataclass(frozen=True)
class HeldOut:
    """The perplexity of held-out documents for several amounts of shrinkage.

    Attributes:
        share: the share of the way to Θ with the lowest perplexity.
        perplexities: the perplexity of all documents, by share.
    """

    share: float
    perplexities: dict[float, float]


def held_out_shrinkage(
    adapters: Mapping[str, PeftAdapter],
    backbone: Backbone,
    documents: TokenSplit,
    *,
    space: str = "delta_w",
    shares: Sequence[float] = SHARES,
    same_base: bool = True,
) -> HeldOut:
    """Compute the perplexity for several shares of the way to Θ.

    A share is the same for all tasks and layers. The shrunk adapters are not truncated to a lower rank.

    Args:
        adapters: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.
        backbone: the base of the adapters.
        documents: documents of the tasks; task d is that of adapter d. They must not be the training documents, which the
            adapters predict best without shrinkage.
        space: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.
        shares: the shares to try, each from 0 to 1.
        same_base: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.

    Raises:
        InputError: as for :func:`~bora_pyro.exchange.pooling.pool.pool`, or if there are no documents.
    """
    if not len(documents):
        raise InputError("there are no documents to judge the shrinkage by")
    fitted = pooled_fit(pool(adapters, backbone, FixedShrinkage(0), space=space, same_base=same_base))
    theta, mean = fitted.weights()
    perplexities: dict[float, float] = {}
    for share in shares:
        shrunk = {name: (1 - share) * value + share * mean[name] for name, value in theta.items()}
        [scores] = evaluate(fitted.model, documents, shrunk)
        perplexity = scores.perplexity()
        assert perplexity is not None  # every document has tokens
        perplexities[share] = perplexity
    return HeldOut(min(perplexities, key=lambda share: perplexities[share]), perplexities)


def read_held_out(
    source: str,
    backbone: Backbone,
    tasks: Sequence[str],
    *,
    names: AdapterNames | None = None,
    task_column: str = "task",
    text_column: str = "text",
    max_tokens: int = 256,
) -> tuple[TokenSplit, Counts]:
    """Read and tokenise the documents of some tasks from a table. Rows of other tasks are left out.

    Args:
        source: as for :func:`~bora_pyro.data.read_table`.
        backbone: the base, with its tokenizer.
        tasks: names of the adapters' folders.
        names: the names of the tasks in these folders, if known. The table may use the name of a task or of its folder.
        task_column: column with the name of the task.
        text_column: column with the text.
        max_tokens: longer documents are truncated.

    Returns:
        The documents, and counts of what was read and left out.

    Raises:
        InputError: if the table cannot be read or has no document of these tasks, the folder of a task is not known, or the base
            has no tokenizer.
    """
    tokenizer = tokenizer_of(backbone)
    read = read_documents(source, Columns.given(task_column=task_column, text_column=text_column))
    table = read.table
    task_index = {task: d for d, task in enumerate(tasks)}
    folders = (names or AdapterNames(tuple(tasks))).folders_of(table["task"], among=tasks)
    rows = [(folders[name], text) for name, text in zip(table["task"], table["text"], strict=True)]
    own = [(task, text) for task, text in rows if task in task_index]
    if not own:
        raise InputError(f"{source} has no document of {', '.join(tasks[:3])}{', ...' if len(tasks) > 3 else ''}")
    documents = datasets.Dataset.from_dict({"task": [task for task, _ in own], "text": [text for _, text in own]})
    longest = max_tokens if backbone.context is None else min(max_tokens, backbone.context)
    done = tokenise(documents, tokenizer, task_index=task_index, max_tokens=longest)
    left_out = {**read.left_out, "of other tasks": len(rows) - len(own), "without a token to predict": done.num_dropped}
    count = sum(number > 0 for number in done.split.documents_per_task)
    return done.split, Counts(read.rows, count, {"held out": done.num_documents}, {"held out": done.split.num_tokens}, left_out)
