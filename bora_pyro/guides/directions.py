"""The directions in weight space that documents speak of: the leading eigenvectors of their empirical Fisher information.

>>> import bora_pyro as bp
>>> from bora_pyro.data import TokenSplit
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7], [0, 8]], task=[1, 0, 0], num_tasks=2)
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> of_tasks, of_all = leading_gradients(model, theta, split, number=3)
>>> of_tasks["q_proj.lora_B"].shape, of_all["q_proj.lora_B"].shape  # (tasks, layers, number, out · r)
(torch.Size([2, 4, 3, 512]), torch.Size([4, 3, 512]))
>>> basis = orthonormal([of_all["q_proj.lora_B"]], dimensions=2, seed=0)
>>> torch.allclose(basis.mT @ basis, torch.eye(2), atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.guides.curvature import gradients_of
from bora_pyro.model import BoRA, Weights

# Rows of a lower priority count for this part of those before them, compared by their largest singular values.
_PRIORITY = 1e-3


def leading_gradients(
    model: BoRA, theta: Weights, split: TokenSplit, *, number: int, token_budget: int = 4096
) -> tuple[Weights, Weights]:
    """A few rows R for each layer whose RᵀR is close to the sum of g gᵀ over the gradients g of single documents.

    g = √w_d ∇ log p(w_n | θ_d), with w_d the weight of the task. The rows are orthogonal. They are updated batch by batch: the
    leading right singular vectors of the rows so far and of the new gradients, times their singular values (incremental singular
    value decomposition, Ross et al., 2008). So only ``number`` rows are in memory. With at most ``number`` documents they are
    exact.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name of the latent.
        split: the documents.
        number: the number of rows.
        token_budget: tokens of a batch, padding included.

    Returns:
        By name of the latent: the rows of the documents of each task, (D, layers, number, n), where n is the number of entries
        of ``shape``; and those of all documents together, (layers, number, n). Rows without a document are 0.
    """
    of_tasks = {name: value.new_zeros((*value.shape[:2], number, value[0, 0].numel())) for name, value in theta.items()}
    of_all = {name: value.new_zeros(value.shape[1:]) for name, value in of_tasks.items()}
    for task, gradients in gradients_of(model, theta, split, token_budget=token_budget):
        root = model.likelihood.task_weight(task).sqrt()
        for name, gradient in gradients.items():
            rows = (gradient.flatten(2) * root.view(-1, 1, 1)).transpose(0, 1)  # (layers, documents, n)
            of_all[name] = _leading(torch.cat([of_all[name], rows], dim=-2), number)
            for d in task.unique().tolist():
                of_tasks[name][d] = _leading(torch.cat([of_tasks[name][d], rows[:, task == d]], dim=-2), number)
    return of_tasks, of_all


def _leading(rows: Tensor, number: int) -> Tensor:
    """The orthogonal rows R whose RᵀR is closest to that of the given ones, the longest one first: (layers, number, n)."""
    wide = rows.double()
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors  # ascending
    return (vectors[..., -number:].flip(-1).mT @ wide).to(rows)


def orthonormal(rows: Sequence[Tensor], *, dimensions: int, seed: int) -> Tensor:
    """An orthonormal basis of the directions with the largest sums of squares.

    Rows of a later element fill up the basis if those before it span too little. Random directions come last.

    Args:
        rows: (layers, number, n) each, in the order of their priority.
        dimensions: k, at most n.
        seed: seed of the random directions.

    Returns:
        (layers, n, k).
    """
    layers, _, n = rows[0].shape
    noise = torch.randn((layers, dimensions, n), generator=torch.Generator().manual_seed(seed)).to(rows[0])
    parts = []
    for priority, part in enumerate((*rows, noise)):
        largest = part.double().norm(dim=-1).amax(-1)[..., None, None]
        parts.append(torch.where(largest > 0, part.double() / largest * _PRIORITY**priority, 0.0))
    return torch.linalg.svd(torch.cat(parts, dim=-2), full_matrices=False).Vh[..., :dimensions, :].mT.to(rows[0])
