"""Gradients of single documents: what the data say of a task's adapter, one document at a time.

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

import torch
from pyro import poutine

from bora_pyro.data.batches import Batch, TokenSplit
from bora_pyro.model import BoRA, Weights


def document_gradients(model: BoRA, theta: Weights, batch: Batch) -> Weights:
    """∇ log p(w_n | θ_d) of each document with respect to its own task's weights, without the scale of the mini-batch.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        batch: the documents, on the model's device.

    Returns:
        (rows, layers, *shape) by name of the latent.
    """
    rows = {name: value.detach().index_select(0, batch.task).requires_grad_() for name, value in theta.items()}
    logits = model.backbone.logits(batch.input_ids, model.change(rows, torch.arange(len(batch.task), device=batch.task.device)))
    trace = poutine.trace(model.likelihood).get_trace(logits, batch)
    log_likelihood = sum(site["fn"].log_prob(site["value"]).sum() for site in map(trace.nodes.get, trace.observation_nodes))
    return dict(zip(rows, torch.autograd.grad(log_likelihood, list(rows.values())), strict=True))


def diagonal_fisher(model: BoRA, theta: Weights, split: TokenSplit, *, token_budget: int = 4096) -> Weights:
    """The diagonal of the empirical Fisher information, Σ_n (∇ log p(w_n | θ_d))² over each task's documents.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        split: the documents.
        token_budget: tokens of a batch, padding included.

    Returns:
        h: (D, layers, *shape) by name; 0 for a task without documents.
    """
    fisher = {name: torch.zeros(value.shape, device=value.device) for name, value in theta.items()}
    for batch in split.batches(token_budget=token_budget):
        on_device = batch.to(model.backbone.device)
        for name, gradient in document_gradients(model, theta, on_device).items():
            fisher[name].index_add_(0, on_device.task, gradient.square())
    return fisher
