"""How well methods predict the adapter of a task that they were not fitted to: each task is left out in turn.

>>> from bora_pyro.predict.generators import Mean, Ridge
>>> random = torch.Generator().manual_seed(0)
>>> vectors = torch.randn((8, 3), generator=random)  # eight tasks, whose adapters are linear in their vectors
>>> latents = vectors @ torch.randn((3, 6), generator=random)
>>> methods = {"mean": Mean, "ridge": Ridge}
>>> found = leave_one_out(methods, vectors, latents, layout=Layout({"q_proj.lora_B": (2, 3)}))
>>> errors = {name: float((value - latents).norm()) for name, value in found.items()}
>>> errors["ridge"] < 1e-4 * errors["mean"]
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.predict.generators.base import Method
from bora_pyro.predict.generators.generator import LEAST_TASKS, Generator
from bora_pyro.predict.generators.layout import Layout
from bora_pyro.predict.generators.space import Space


def leave_one_out(
    methods: Mapping[str, Callable[[], Method]],
    vectors: Tensor,
    latents: Tensor,
    *,
    layout: Layout,
    draws: Tensor | None = None,
    components: int | None = None,
    seed: int = 0,
    on_task: Callable[[int], object] = lambda d: None,
) -> dict[str, Tensor]:
    """Predict the adapter of each task by the methods, fitted to all other tasks.

    All statistics are of the other tasks alone: the mean and the scales of the adapters, their basis, and the mean and the scale
    of the vectors.

    Args:
        methods: functions that return a method to fit, by name.
        vectors: (D, hidden), the vectors.
        latents: (D, P), the adapters.
        layout: the latents of an adapter.
        draws: (D, K, P), draws of each task's adapter; None: the adapters alone.
        components: as for ``Generator.fit``.
        seed: seed of the fits.
        on_task: called with the index of each task after its fits.

    Returns:
        The predictions of each method, (D, P) float32.

    Raises:
        InputError: there are fewer than ``LEAST_TASKS`` tasks, or all tasks but one have the same adapter.
    """
    tasks = len(latents)
    check_tasks(tasks)
    found = {name: torch.empty_like(latents) for name in methods}
    for d in range(tasks):
        others = torch.arange(tasks) != d
        space = Space.of(latents[others], layout, components=components)
        for name, make in methods.items():
            generator = Generator.fit(
                make(),
                vectors[others],
                latents[others],
                layout=layout,
                draws=None if draws is None else draws[others],
                space=space,
                seed=seed,
            )
            found[name][d] = generator.flat(vectors[d])
        on_task(d)
    return found


def check_tasks(tasks: int) -> None:
    """Raise ``InputError`` if there are too few tasks for a generator."""
    if tasks < LEAST_TASKS:
        raise InputError(f"the run has {tasks} tasks, and a generator learns from {LEAST_TASKS} or more; fit more tasks")
