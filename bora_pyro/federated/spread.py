"""Clients whose documents are a skewed mixture of the tasks: each task's documents are spread by proportions from a Dirichlet.

>>> from bora_pyro.data import TokenSplit
>>> split = TokenSplit.from_documents([[0, n + 5] for n in range(12)], task=[0, 1, 2] * 4, num_tasks=3)
>>> data = spread(TaskData(["ada", "bob", "cleo"], split, split, split), 2, 0.5)
>>> data.tasks, sum(data.train.documents_per_task)
(['client 1', 'client 2'], 12)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.assign import task_generator
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, shown

#: The concentrations at which a Dirichlet can be drawn in float64. At the lower one a task is at one client.
BOUNDS = (1e-3, 1e6)
# Proportions are drawn so often until each client has a training document.
_TRIES = 100


def spread(data: TaskData, clients: int, concentration: float, *, seed: int = 0) -> TaskData:
    """Give the documents of each task to clients, and make one task of what a client has.

    For each task d, proportions p_d ~ Dirichlet(concentration · 1) over the clients are drawn, and each document of the task is
    at a client that is drawn by p_d. Training, validation and test documents have the same proportions. With a small
    concentration a client has few of the tasks, and clients differ in size; with a large one all are alike. It is the usual way
    to simulate clients whose documents differ (Hsu, Qi & Brown, 2019, arXiv 1909.06335, draw the proportions of tasks at each
    client; Yurochkin et al., 2019, arXiv 1905.12022, those of clients for each task, as here).

    If a client has no training document, all proportions are drawn again.

    Args:
        data: the documents by task.
        clients: number of clients.
        concentration: the concentration of the Dirichlet, within ``BOUNDS``.
        seed: seed of the draws.

    Returns:
        The same documents with a task for each client, ``client 1``, ... A note has the smallest and largest number of training
        documents. There are no task weights and no groups of tasks.

    Raises:
        InputError: the data has task weights; an argument is not allowed; or no draw gives each client a training document.
    """
    if isinstance(clients, bool) or not isinstance(clients, int) or clients < 2:
        raise InputError(f"clients is {shown(clients)}; give a whole number from 2 up to spread documents over")
    if not BOUNDS[0] <= concentration <= BOUNDS[1]:
        raise InputError(f"dirichlet is {concentration:g}; give a number between {BOUNDS[0]:g} and {BOUNDS[1]:g}")
    if data.task_weights is not None:
        raise InputError("the tasks have weights, and a client has documents of several tasks; leave task_weights out")
    splits = (data.train, data.validation, data.test)
    for attempt in range(_TRIES):
        generators = [task_generator(seed, task, "clients", str(attempt)) for task in data.tasks]
        proportions = [generator.dirichlet([concentration] * clients) for generator in generators]
        chosen = [_clients_of(split, proportions, generators) for split in splits]
        counts = torch.bincount(chosen[0], minlength=clients)
        if bool((counts > 0).all()):
            break
    else:
        raise InputError(
            f"none of {_TRIES} draws gives each of {clients} clients one of the {data.train.num_documents} training documents; "
            f"give fewer clients, or a larger dirichlet than {concentration:g}"
        )
    names = [f"client {n + 1:0{len(str(clients))}}" for n in range(clients)]  # sorted as numbers are
    parts = [
        split.replace(task=own[split.document_of], num_tasks=clients) if len(split) else split.replace(num_tasks=clients)
        for split, own in zip(splits, chosen, strict=True)
    ]
    note = (
        f"the documents of {data.num_tasks} tasks are spread over {clients} clients by Dirichlet({concentration:g}): "
        f"{int(counts.min())} to {int(counts.max())} training documents at a client, {mixed(data.train, chosen[0], clients):.1f} "
        "tasks at a client on average"
    )
    return replace(
        data, tasks=names, train=parts[0], validation=parts[1], test=parts[2], notes=[*data.notes, note], task_groups=None
    )


def mixed(split: TokenSplit, clients: Tensor, number: int) -> float:
    """The mean number of tasks of which a client has documents.

    Args:
        split: the documents by task.
        clients: the client of each document, (documents,).
        number: number of clients.
    """
    pairs = torch.stack([clients, split.task[split.first_pieces]], 1).unique(dim=0)
    return len(pairs) / number


def _clients_of(split: TokenSplit, proportions: Sequence[np.ndarray], generators: Sequence[np.random.Generator]) -> Tensor:
    """The client of each document, (documents,), in the order of ``first_pieces``."""
    tasks = split.task[split.first_pieces]
    found = torch.zeros_like(tasks)
    for d, (own, generator) in enumerate(zip(proportions, generators, strict=True)):
        places = (tasks == d).nonzero()[:, 0]
        found[places] = torch.from_numpy(generator.choice(len(own), size=len(places), p=own))
    return found
