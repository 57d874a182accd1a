"""How far to shrink independently trained adapters, by documents that none of them was trained on.

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
    >>> found.share, list(found.perplexities)  # nothing is gained, so nothing is shrunk
    (0.0, [0.0, 0.5, 1.0])

The estimators of :mod:`bora_pyro.exchange.pooling.hierarchy` suppose how noise and differences are made; this asks whether the
adapters predict better nearer to Θ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.tables import read_table
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import PeftAdapter
from bora_pyro.exchange.names import AdapterNames
from bora_pyro.exchange.pooling.fitted import pooled_fit
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
from bora_pyro.exchange.pooling.pool import pool
from bora_pyro.inference.evaluate import evaluate

#: The shares of the way to Θ that are tried.
SHARES = tuple(n / 10 for n in range(11))


@dataclass(frozen=True)
class HeldOut:
    """What documents say of the shrinkage.

    Attributes:
        share: the share of the way to Θ at which they are predicted best.
        perplexities: of all documents, by share.
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
    """Try shares of the way to Θ, the same for all tasks and layers, none of the adapters cut to a lower rank.

    Args:
        adapters: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.
        backbone: their base.
        documents: documents of the tasks, in the order of the adapters; not those that they were trained on, which are predicted
            best by the adapters as they are.
        space: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.
        shares: what to try, each from 0 to 1.
        same_base: as for :func:`~bora_pyro.exchange.pooling.pool.pool`.

    Raises:
        InputError: as for :func:`~bora_pyro.exchange.pooling.pool.pool`; or no documents.
    """
    if not len(documents):
        raise InputError("there are no documents to judge the shrinkage by")
    fitted = pooled_fit(pool(adapters, backbone, FixedShrinkage(0), space=space, same_base=same_base))
    theta, mean = fitted.weights()
    perplexities: dict[float, float] = {}
    for s in shares:
        shrunk = {name: (1 - s) * value + s * mean[name] for name, value in theta.items()}
        [scores] = evaluate(fitted.model, documents, shrunk)
        perplexity = scores.perplexity()
        assert perplexity is not None  # a document has tokens
        perplexities[s] = perplexity
    return HeldOut(min(perplexities, key=lambda s: perplexities[s]), perplexities)


def read_held_out(
    source: str,
    backbone: Backbone,
    tasks: Sequence[str],
    *,
    names: AdapterNames | None = None,
    task_column: str = "task",
    text_column: str = "text",
    max_tokens: int = 256,
) -> TokenSplit:
    """The documents of a table that are of some tasks; other rows are passed over.

    Args:
        source: as for :func:`~bora_pyro.data.read_table`.
        backbone: the base, with its tokenizer.
        tasks: names of the adapters' folders.
        names: what is known of the tasks in them; a task of the table has its name, or that of its folder.
        task_column: column with the name of the task.
        text_column: column with the text.
        max_tokens: longer documents are cut.

    Raises:
        InputError: the table cannot be read, or has no document of these tasks; a task whose folder is not known; the base
            has no tokenizer.
    """
    tokenizer = tokenizer_of(backbone)
    table, _ = read_table(source, task_column=task_column, text_column=text_column)
    place = {task: d for d, task in enumerate(tasks)}
    folders = (names or AdapterNames(tuple(tasks))).folders_of(table["task"], among=tasks)
    rows = [(folders[name], text) for name, text in zip(table["task"], table["text"], strict=True)]
    own = [(task, text) for task, text in rows if task in place]
    if not own:
        raise InputError(f"{source} has no document of {', '.join(tasks[:3])}{', ...' if len(tasks) > 3 else ''}")
    documents = datasets.Dataset.from_dict({"task": [task for task, _ in own], "text": [text for _, text in own]})
    longest = max_tokens if backbone.context is None else min(max_tokens, backbone.context)
    return tokenise(documents, tokenizer, task_index=place, max_tokens=longest).split
