"""Adapters to pool, made without a fit."""

from __future__ import annotations

from pathlib import Path

import torch

from bora_pyro import save_peft
from bora_pyro.exchange.load import PeftAdapter, read_peft
from tests.tiny import of_task, random_weights, tiny_bora

DOCUMENTS = [float(number) for number in (4, 6, 9, 14, 22, 35, 60, 100, 170, 300, 500, 900)]
TAU, INFORMATION = 40.0, 1.5


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def adapter_of(backbone, changes, *, name, scaling=1.0, gauge=None):
    """The adapter of rank r with these products B A, whose factors are given by path as (out, r) and (r, in)."""
    factors, rank = {}, 0
    for path, (b, a) in changes.items():
        rank = a.shape[0]
        g = torch.eye(rank, dtype=torch.float64) if gauge is None else gauge
        factors[path] = {"lora_A": (g @ a).float(), "lora_B": (b @ torch.linalg.inv(g) / scaling).float()}
    return PeftAdapter(Path(name), "", rank, scaling * rank, factors)


def simulated(backbone, *, rank=8, seed=0, gauges=True):
    """Adapters with a known hierarchy: one frame, and a gauge and a scale of each task's own; and Θ, θ_d as ΔW by path."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(DOCUMENTS, dtype=torch.float64)[:, None, None]
    estimates, truths, means = [{} for _ in DOCUMENTS], {}, {}
    for slot in backbone.slots:
        for path in slot.paths:
            frame = torch.linalg.qr(normal(generator, slot.in_features, rank)).Q.mT
            mean = normal(generator, slot.out_features, rank)
            truth = mean + normal(generator, len(DOCUMENTS), *mean.shape) / TAU**0.5
            seen = truth + normal(generator, *truth.shape) / (INFORMATION * counts).sqrt()
            truths[path], means[path] = truth @ frame, mean @ frame
            for d in range(len(DOCUMENTS)):
                estimates[d][path] = (seen[d], frame)
    adapters = {}
    for d, changes in enumerate(estimates):
        gauge = normal(generator, rank, rank) + 3 * torch.eye(rank) if gauges else None
        scaling = (0.5, 2.0, 1.0)[d % 3] if gauges else 2.0
        adapters[f"task {d}"] = adapter_of(backbone, changes, name=f"task {d}", scaling=scaling, gauge=gauge)
    return adapters, truths, means


def apart(backbone, ranks=(2, 3, 2), seed=0):
    """Adapters that share no start."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for d, rank in enumerate(ranks):
        changes = {
            path: (normal(generator, slot.out_features, rank), normal(generator, rank, slot.in_features))
            for slot in backbone.slots
            for path in slot.paths
        }
        adapters[f"task {d}"] = adapter_of(backbone, changes, name=f"task {d}", scaling=1.5)
    return adapters


def common_start(tmp_path, tasks=4):
    """Adapters of one BoRA model, written and read: one start, so that their entries can be compared."""
    model = tiny_bora("opt", targets=["q_proj", "fc1"], tasks=tasks)
    weights = random_weights(model)
    for d in range(tasks):
        save_peft(tmp_path / f"task-{d}", model, of_task(weights, d))
    return model, weights, {f"task-{d}": read_peft(tmp_path / f"task-{d}") for d in range(tasks)}
