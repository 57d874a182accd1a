"""A vector for each task: the mean of the frozen base's last hidden states over some of its documents.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> vector = task_vector(backbone, ["A graph is a set of nodes.", "An edge joins two nodes."])
>>> vector.shape
torch.Size([256])

This is the task vector of ICM-LoRA (Shao et al., 2025, arXiv 2501.17635), which is the input of a generator of adapters. It is
always computed with the base alone, so a task needs no adapter to have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.backbone.passes import hooks
from bora_pyro.backbone.texts import token_split
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, check_at_least, check_one_of

#: Which hidden states of a document are used: that of its last token, or the mean over its tokens.
STATES = ("last", "mean")
#: The paper's number of documents of a task.
DOCUMENTS = 30


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The vectors of some tasks, and what they were computed from.

    Attributes:
        vectors: (D, hidden) float32; zeros for a task without documents.
        documents: number of documents that were read, by task.
        tokens: number of tokens that were read, by task.
    """

    vectors: Tensor
    documents: list[int]
    tokens: list[int]


def task_vector(
    backbone: Backbone,
    documents: Sequence[str] | TokenSplit,
    *,
    states: str = "last",
    max_tokens: int | None = None,
    token_budget: int = 4096,
) -> Tensor:
    """The vector of one task, (hidden,) float32, from all of the given documents.

    Args:
        backbone: the base.
        documents: texts, or tokenised documents, whose tasks are ignored.
        states: as for :func:`task_vectors`.
        max_tokens: longer texts are cut; default: the context of the base. Tokenised documents stay as they are.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: there is no document, ``states`` is unknown, or the base has no tokenizer.
    """
    if not isinstance(documents, TokenSplit):
        texts = [documents] if isinstance(documents, str) else list(documents)
        documents = token_split(backbone, texts, task=[0] * len(texts), num_tasks=1, max_tokens=max_tokens)
    if not len(documents):
        raise InputError("there is no document; a task vector needs one or more")
    one = documents.replace(task=torch.zeros_like(documents.task), num_tasks=1)
    return task_vectors(backbone, one, documents=None, states=states, token_budget=token_budget).vectors[0]


@torch.inference_mode()
def task_vectors(
    backbone: Backbone,
    split: TokenSplit,
    *,
    documents: int | None = DOCUMENTS,
    states: str = "last",
    token_budget: int = 4096,
    seed: int = 0,
) -> TaskVectors:
    """The vectors of all tasks of a split.

    The hidden state is what the base's head reads. The start and the end mark of a document are not used: they are the same in
    all documents. In a document in pieces only the first piece is read, and in a question the prompt with the right option.

    Args:
        backbone: the base. It is called without adapters.
        split: the documents.
        documents: the largest number of documents of a task that are read, drawn at random; None: all. The draw of one task
            does not depend on the other tasks.
        states: ``last`` is the state of the last token, as in the paper: the model has then read the whole document. ``mean``
            is the mean over the tokens of the document: it averages over many more states, so it varies less between documents
            of a task, but it weighs what every text has in common.
        token_budget: tokens of a batch, padding included.
        seed: seed of the draw of the documents.

    Raises:
        InputError: ``states`` is unknown, or ``documents`` is below 1.
    """
    check_one_of("states", states, STATES)
    if documents is not None:
        check_at_least("documents", documents, 1)
    split = _whole_documents(split)
    chosen = [_some((split.task == d).nonzero()[:, 0], documents, seed) for d in range(split.num_tasks)]
    rows = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
    end = None if backbone.tokenizer is None else backbone.tokenizer.eos_token_id
    sums: Tensor | None = None
    tokens = torch.zeros(split.num_tasks, dtype=torch.int64)
    for batch in split.batches(token_budget=token_budget, documents=rows):
        lengths = batch.attention_mask.sum(-1)
        last = batch.input_ids.gather(1, lengths[:, None] - 1)[:, 0]
        # a document of a start and one token keeps that token, whatever it is
        stop = lengths - ((last == end) & (lengths > 2)).long() if end is not None else lengths
        # padding is on the right and the base is causal, so no state depends on the padding or on the other rows
        found = last_states(backbone, batch.input_ids.to(backbone.device)).float().cpu().double()
        place = torch.arange(found.shape[1])
        used = place == stop[:, None] - 1 if states == "last" else (place >= 1) & (place < stop[:, None])
        of_rows = torch.where(used[..., None], found, 0.0).sum(1) / used.sum(1, keepdim=True)
        sums = torch.zeros((split.num_tasks, found.shape[-1]), dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, batch.task, of_rows)
        tokens.index_add_(0, batch.task, stop)
    if sums is None:
        raise InputError("there is no document; a task vector needs one or more")
    counts = torch.tensor([len(of_task) for of_task in chosen])
    return TaskVectors((sums / counts.clamp(min=1)[:, None]).float().clone(), counts.tolist(), tokens.tolist())


def last_states(backbone: Backbone, input_ids: Tensor) -> Tensor:
    """The hidden states that the base's head reads, (rows, tokens, hidden), for token ids (rows, tokens) on its device."""
    if backbone.ends_with_head:
        logits = backbone.lazy_logits(input_ids)
        assert isinstance(logits, LazyLogits)
        return logits.states
    seen: list[Tensor] = []
    with hooks() as hook:  # the base does more than its head after the last state, such as a soft cap
        hook(backbone.model.get_output_embeddings(), lambda module, args, output: seen.append(args[0]))
        backbone.logits(input_ids)
    return seen[0]


def _whole_documents(split: TokenSplit) -> TokenSplit:
    """One row for each document: its first piece, or of a question the right option behind its prompt."""
    rows = split.first_pieces if split.correct is None else split.correct.nonzero()[:, 0]
    return split.replace(correct=None, document_index=None).subset(rows)


def _some(rows: Tensor, most: int | None, seed: int) -> Tensor:
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most].sort().values]
