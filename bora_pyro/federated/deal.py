"""Which client has which tasks.

>>> deal(["ada", "bob", "cleo"], "task")
{'ada': ['ada'], 'bob': ['bob'], 'cleo': ['cleo']}
>>> {client: len(tasks) for client, tasks in deal(["ada", "bob", "cleo"], 2).items()}
{'client 1': 2, 'client 2': 1}
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bora_pyro.errors import InputError, shown

#: A client for each task.
TASK = "task"


def deal(tasks: Sequence[str], clients: int | str = TASK, *, seed: int = 0) -> dict[str, list[str]]:
    """Give each task to one client.

    Args:
        tasks: the names of all tasks.
        clients: ``task``: each task is a client with the name of the task. A number N: the tasks are shuffled and dealt to N
            clients in turn, so that their numbers differ by one at most.
        seed: seed of the shuffle.

    Returns:
        The tasks of each client, by the name of the client, in the order of ``tasks``.

    Raises:
        InputError: ``clients`` is neither ``task`` nor a number from 1 to the number of tasks.
    """
    if clients == TASK:
        return {task: [task] for task in tasks}
    if not isinstance(clients, int) or isinstance(clients, bool) or not 1 <= clients <= len(tasks):
        raise InputError(
            f"clients is {shown(clients)}; give task (a client for each task), or a number from 1 to {len(tasks)}, the number of "
            "tasks"
        )
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed)).tolist()
    return {f"client {n + 1}": [tasks[d] for d in sorted(order[n::clients])] for n in range(clients)}
