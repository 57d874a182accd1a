"""Gradients of single documents with respect to their task's adapter, and the Fisher information that they give.

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> gradients = document_gradients(model, theta, split.batches()[0])
>>> gradients["q_proj.lora_B"].shape  # (documents, layers, out, r)
torch.Size([2, 4, 256, 2])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pyro import poutine
from torch import Tensor

from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights


def document_gradients(model: BoRA, theta: Weights, batch: Batch) -> Weights:
    """∇ log p(w_n | θ_d) of each document with respect to the weights of its own task.

    The gradients contain neither the scale of the mini-batch nor the weight of the task. A piece of a long document has the
    gradient of its own part; `gradients_of` adds the pieces up. A question has that of its normalised log-probability
    log p(answer | prompt; θ_d), to which all its options contribute.

    Args:
        model: the BoRA model.
        theta: θ by name: (D, layers, *shape) for all tasks, or one row for each task that the batch names.
        batch: the documents, on the model's device.

    Returns:
        (documents, layers, *shape) by name of the latent, in the order of ``batch.first_rows``.

    Raises:
        InputError: the router lets the adapters of all tasks read a document.
    """
    rows, log_likelihood = own_rows(model, theta, batch)
    # a layer may be out of use for short documents, such as an expert that no token chose: its gradient is 0
    gradients = torch.autograd.grad(log_likelihood, list(rows.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(rows, gradients, strict=True))


def own_rows(model: BoRA, theta: Weights, batch: Batch) -> tuple[Weights, Tensor]:
    """A copy of θ of its task for each document, (rows, layers, *shape) by name, and log p(batch | θ) as a function of them.

    Raises:
        InputError: the router lets the adapters of all tasks read a document.
    """
    if model.router.reads_all_tasks:
        raise InputError(f"{model.router} lets the adapters of all tasks read a document; give a router by task")
    own = batch.row[batch.first_rows]
    rows = {name: value.detach().index_select(0, own).requires_grad_() for name, value in theta.items()}
    trace = poutine.trace(model.likelihood).get_trace(model, rows, replace(batch, own_rows=True))
    observed = map(trace.nodes.get, trace.observation_nodes)
    return rows, torch.stack([site["fn"].log_prob(site["value"]).sum() for site in observed]).sum()


def gradients_of(model: BoRA, theta: Weights, split: TokenSplit, *, token_budget: int = 4096) -> Iterator[tuple[Tensor, Weights]]:
    """Yield `document_gradients` of all documents of a split, some at a time, with their tasks, (documents,).

    The gradient of a long document that was split is the sum over its pieces: log p(w_n | θ_d) is the sum of theirs.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        split: the documents.
        token_budget: tokens of a batch, padding included.
    """
    device = model.backbone.device
    if split.correct is not None:  # all options of a question are in one batch
        for batch in split.batches(token_budget=token_budget):
            batch = batch.to(device)
            yield batch.task[batch.first_rows], document_gradients(model, theta, batch)
        return
    pieces = torch.bincount(split.document_of)[split.document_of] if len(split) else torch.zeros(0)
    for batch in split.batches(token_budget=token_budget, documents=(pieces == 1).nonzero()[:, 0]):
        batch = batch.to(device)
        yield batch.task, document_gradients(model, theta, batch)
    for rows in _whole_documents(split, (pieces > 1).nonzero()[:, 0], token_budget):
        documents, of_row = split.document_of[rows].unique(return_inverse=True)
        place = torch.zeros(len(split), dtype=torch.int64).index_put((rows,), of_row)
        sums: Weights = {}
        for batch in split.batches(token_budget=token_budget, documents=rows):
            for name, value in document_gradients(model, theta, batch.to(device)).items():
                sums.setdefault(name, value.new_zeros((len(documents), *value.shape[1:])))
                sums[name].index_add_(0, place[batch.index].to(device), value)
        yield split.task[split.first_pieces[documents]].to(device), sums


def _whole_documents(split: TokenSplit, rows: Tensor, token_budget: int) -> Iterator[Tensor]:
    """The rows in groups that hold whole documents: as many documents as fit into a batch, or one."""
    rows = rows[split.document_of[rows].argsort(stable=True)]
    group: list[Tensor] = []
    for document in rows.split(split.document_of[rows].unique_consecutive(return_counts=True)[1].tolist()):
        longest = int(split.lengths[torch.cat([*group, document])].max())
        if group and (sum(map(len, group)) + len(document)) * longest > token_budget:
            yield torch.cat(group)
            group = []
        group.append(document)
    if group:
        yield torch.cat(group)


def _weighted(model: BoRA, task: Tensor, values: Tensor) -> Tensor:
    """The values of each document, (documents, ...), times the weight of its task."""
    weight = model.likelihood.task_weight(task)
    return values * weight.view(-1, *[1] * (values.dim() - 1))


def diagonal_fisher(model: BoRA, theta: Weights, split: TokenSplit, *, token_budget: int = 4096) -> Weights:
    """The diagonal of each task's empirical Fisher information, w_d Σ_n (∇ log p(w_n | θ_d))², with w_d the task's weight.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        split: the documents.
        token_budget: tokens of a batch, padding included.

    Returns:
        h: (D, layers, *shape) by name; 0 for a task without documents.
    """
    fisher = {name: torch.zeros(value.shape, device=value.device) for name, value in theta.items()}
    for task, gradients in gradients_of(model, theta, split, token_budget=token_budget):
        for name, gradient in gradients.items():
            fisher[name].index_add_(0, task, _weighted(model, task, gradient.square()))
    return fisher


def kronecker_fisher(
    model: BoRA, theta: Weights, split: TokenSplit | None, temperature: float = 1.0, *, token_budget: int = 4096
) -> Weights:
    """Kronecker factors of the empirical Fisher information of each task, layer and matrix: L ⊗ diag(v) / temperature.

    The gradient G_n of a document has r rows, the shorter dimension of the matrix, and n columns. With t = Σ ‖G_n‖², the factors
    are L = Σ G_n G_nᵀ / t and v = Σ diag(G_nᵀ G_n). The trace is then that of the Fisher information.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name; every latent is a matrix.
        split: the documents; None: no documents.
        temperature: the information is divided by it.
        token_budget: tokens of a batch, padding included.

    Returns:
        ``<latent>.short``, L: (D, layers, r, r), and ``<latent>.long``, v: (D, layers, n).

    Raises:
        InputError: a latent is not a matrix.
    """
    factors: Weights = {}
    for name, value in theta.items():
        if value.dim() < 4:
            raise InputError(
                f"latent {name!r} is not a matrix, (D, layers, rows, columns); use the guide laplace, which is diagonal"
            )
        r, n = sorted(value.shape[-2:])
        factors[f"{name}.short"] = value.new_zeros((*value.shape[:-2], r, r))
        factors[f"{name}.long"] = value.new_zeros((*value.shape[:-2], n))
    for task, gradients in gradients_of(model, theta, split, token_budget=token_budget) if split is not None else []:
        for name, gradient in gradients.items():
            g = gradient if gradient.shape[-2] <= gradient.shape[-1] else gradient.mT  # (documents, layers, r, n)
            factors[f"{name}.short"].index_add_(0, task, _weighted(model, task, g @ g.mT))
            factors[f"{name}.long"].index_add_(0, task, _weighted(model, task, g.square().sum(-2)))
    for name in theta:
        trace = factors[f"{name}.long"].sum(-1)[..., None, None]
        short = factors[f"{name}.short"] / (temperature * trace)
        factors[f"{name}.short"] = torch.where(trace > 0, short, 0.0)
    return factors
