"""Conversion of pooled adapters to a fitted model, so that the diagnostics, scores and plots of a fit can be used.

>>> import tempfile
>>> from pathlib import Path
>>> import bora_pyro as bp
>>> from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
>>> from bora_pyro.exchange.pooling.folder import read_adapters
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> with tempfile.TemporaryDirectory() as folder:
...     for seed, task in enumerate(["ada", "bo"]):  # each adapter starts from another A
...         model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed)
...         _ = bp.save_peft(Path(folder, task), model, {name: value + 0.01 for name, value in model.starts.items()})
...     adapters = read_adapters(folder)
>>> fitted = pooled_fit(bp.pool(adapters, backbone, FixedShrinkage(1.0)))
>>> fitted.tasks, fitted.deviation_norms()  # shrunk to Θ completely
(['ada', 'bo'], tensor([0., 0.]))
"""

from __future__ import annotations

import torch
from pyro import poutine
from torch.nn.functional import pad

from bora_pyro.adapters import Adapter, FrozenALoRA, LoRA
from bora_pyro.exchange.pooling.pool import Pooled, in_frame, shrink
from bora_pyro.guides import make_parameters, map_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import LearnedPrecision
from bora_pyro.priors.learned import BOUNDS


def pooled_fit(pooled: Pooled, *, shrunk: bool = True) -> Fitted:
    """Make a MAP fit whose weights are the adapters, with the estimated hierarchy as its prior.

    In the space ``delta_w`` the model is LoRA with a fixed A. A is the common basis Vᵀ and B is B'_d, so the hierarchical Normal
    is on ΔW. B has D x layers x out x R entries. R can be as large as the sum of the tasks' ranks. Bases of lower rank are padded
    with zeros. τ is that of :class:`~bora_pyro.exchange.pooling.hierarchy.Hierarchy`, clipped to the bounds of a learned τ.

    Args:
        pooled: the result of :func:`~bora_pyro.exchange.pooling.pool.pool`.
        shrunk: True uses the adapters after shrinkage towards Θ, without truncation to a lower rank. False uses the adapters
            as they were given.
    """
    backbone, tasks = pooled.backbone, len(pooled.tasks)
    adapter, theta, mean, fixed = _in_frame(pooled, shrunk) if pooled.frames else _entrywise(pooled, shrunk)
    prior = LearnedPrecision()
    taus = {f"{name}.lora_B" if pooled.frames else name: found.tau for name, found in pooled.groups.items()}
    prior.load_state({f"tau.{name}": torch.tensor(min(max(tau, BOUNDS[0]), BOUNDS[1])) for name, tau in taus.items()})
    model = BoRA(backbone, tasks, adapter=adapter, prior=prior)
    theta, mean, fixed = ({name: value.to(backbone.device) for name, value in part.items()} for part in (theta, mean, fixed))
    model.fixed |= fixed
    guide = map_guide(model, model.sites_given(theta, mean))
    with poutine.seed(rng_seed=0):
        make_parameters(guide, model)
    return Fitted(model, guide, pooled.tasks)


def _in_frame(pooled: Pooled, shrunk: bool) -> tuple[Adapter, Weights, Weights, Weights]:
    given, rank = list(pooled.adapters.values()), max(1, *(number for of_slot in pooled.frames.values() for number in of_slot))
    theta: Weights = {}
    mean: Weights = {}
    fixed: Weights = {}
    for slot in pooled.backbone.slots:
        values, bases = [], []
        for path in slot.paths:
            changes, basis = in_frame(given, path)
            tasks_and_mean = shrink(changes, pooled.groups[slot.name])
            if not shrunk:
                tasks_and_mean[:-1] = changes
            more = rank - basis.shape[1]
            values.append(pad(tasks_and_mean, (0, more)).float())
            bases.append(pad(basis.mT, (0, 0, 0, more)).float())
        stacked = torch.stack(values, 1)
        theta[f"{slot.name}.lora_B"], mean[f"{slot.name}.lora_B"] = stacked[:-1], stacked[-1]
        fixed[f"{slot.name}.lora_A"] = torch.stack(bases)
    return FrozenALoRA(rank=rank), theta, mean, fixed


def _entrywise(pooled: Pooled, shrunk: bool) -> tuple[Adapter, Weights, Weights, Weights]:
    first = next(iter(pooled.adapters.values()))
    factors = pooled.factors if shrunk else {task: adapter.factors for task, adapter in pooled.adapters.items()}
    theta: Weights = {}
    mean: Weights = {}
    for slot in pooled.backbone.slots:
        for name in ("lora_A", "lora_B"):
            of_tasks = [torch.stack([of_task[path][name] for path in slot.paths]) for of_task in factors.values()]
            theta[f"{slot.name}.{name}"] = torch.stack(of_tasks)
            mean[f"{slot.name}.{name}"] = torch.stack([pooled.mean[path][name] for path in slot.paths])
    return LoRA(first.rank, first.alpha), theta, mean, {}
