"""The arms of ``compare_peers.py`` that this library trains: BoRA with a τ, and one A for all tasks (``hydra``)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from peer_names import with_names
from peer_options import BORA, NAMED
from peer_outcome import Outcome, folder_bytes, one

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides import map_guide
from bora_pyro.inference.fit import NonFiniteLossError, fit
from bora_pyro.inference.fitted import tau_by_group
from bora_pyro.inference.options import FitOptions
from bora_pyro.model import BoRA
from bora_pyro.options.field import part_of
from bora_pyro.priors import ByLatent, HierarchicalNormal, Independent, LearnedPrecision, Pooled, Prior, prior_from_tau
from bora_pyro.runs.config.map_fit import MapFitConfig


def prior_of(arm: str) -> Prior:
    """The prior of an arm of this library.

    >>> prior_of("bora_inf"), prior_of("bora_100_task_id"), prior_of("hydra")
    (Pooled(), HierarchicalNormal(tau=100), ByLatent({'lora_A': Pooled()}, other=Independent()))
    """
    if arm == "hydra":
        return ByLatent({"lora_A": Pooled()}, other=Independent())
    text = arm.removeprefix(BORA).removesuffix(NAMED)
    return LearnedPrecision() if text == "learned" else prior_from_tau(float(text))


def fit_ours(arm: str, template: BoRA, data: TaskData, config: MapFitConfig) -> Outcome:
    """Fit an arm of this library."""
    own = with_names(data, template.backbone) if arm.endswith(NAMED) else data
    model = BoRA(template.backbone, data.num_tasks, adapter=template.adapter, prior=prior_of(arm), seed=config.seed)
    guide, start = map_guide(model), time.perf_counter()
    try:
        fitted = fit(model, own, part_of(config, FitOptions), guide=guide)
    except NonFiniteLossError as error:
        fitted = error.fitted
    seconds = time.perf_counter() - start
    theta, centre = fitted.weights()
    perplexity, tau = fitted.validation_perplexity, tau_by_group(model, fitted.sites())
    assert perplexity is not None  # there are validation documents
    adapters = [one(theta, d) for d in range(1 if isinstance(model.prior, Pooled) else data.num_tasks)]
    if isinstance(model.prior, HierarchicalNormal | LearnedPrecision):
        adapters.append(centre)
    return Outcome(
        arm,
        model,
        theta,
        perplexity,
        parameters=sum(parameter.numel() for parameter in guide.parameters()),
        adapter_bytes=sum(folder_bytes(model, weights) for weights in adapters),
        tokens=len(fitted.history) * data.train.num_tokens,
        seconds=seconds,
        epoch=fitted.best_epoch,
        averaged=float(fitted.averaged),
        data=None if own is data else own,
        more={f"tau_{factor}": geometric_mean(tau, model, f"lora_{factor}") for factor in "AB"},
    )


def geometric_mean(tau: Mapping[str, Any], model: BoRA, latent: str) -> float:
    """The geometric mean of τ over the entries of one kind of latent."""
    logs = weight = 0.0
    for name, value in tau.items():
        if name.endswith(latent):
            values = torch.tensor(value, dtype=torch.float64).flatten()
            logs += float(values.log().mean()) * model.starts[name].numel()
            weight += model.starts[name].numel()
    return math.exp(logs / weight) if weight and not math.isinf(logs) else (math.inf if logs > 0 else 0.0)
