"""What a fit of an arm of ``compare_peers.py`` gives, whichever library trained it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bora_pyro.data.tasks import TaskData
from bora_pyro.exchange.save import save_peft
from bora_pyro.model import BoRA, Weights


@dataclass
class Outcome:
    """The adapters of an arm and how they were found.

    Attributes:
        arm: the name of the arm.
        model: a model of this library whose adapters ``theta`` has; its prior does not matter.
        theta: the weights of all tasks, (D, layers, *shape).
        validation: validation perplexity of these weights.
        parameters: number of trained parameters.
        adapter_bytes: bytes of the adapters as PEFT folders.
        tokens: predicted tokens of all training steps.
        seconds: training and validation.
        epoch: the epoch that was kept, a mean over tasks where each has its own.
        averaged: the share of the tasks whose kept state is a mean of steps.
        more: further columns.
        data: the documents, if they differ from those of the other arms.
    """

    arm: str
    model: BoRA
    theta: Weights | None
    validation: float
    parameters: int = 0
    adapter_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: float = 0.0
    averaged: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)
    data: TaskData | None = None


def one(theta: Weights, d: int) -> Weights:
    """The weights of one task."""
    return {name: value[d] for name, value in theta.items()}


def folder_bytes(model: BoRA, weights: Weights) -> int:
    """The bytes of an adapter as a PEFT folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_peft(Path(folder), model, weights)
        return sum(file.stat().st_size for file in Path(folder).iterdir())
