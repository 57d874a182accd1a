"""The prior of the adapter of an unknown task, and draws from it.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> model, theta = unknown_draws(bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1), 3)
>>> theta["q_proj.lora_B"].shape
torch.Size([3, 4, 256, 2])
"""

from __future__ import annotations

import math

import torch
from pyro import poutine

from bora_pyro.errors import InputError
from bora_pyro.inference.adapt import given_model
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Given


def unknown_draws(fitted: Fitted, draws: int, *, seed: int = 0) -> tuple[BoRA, Weights]:
    """Adapters of unknown tasks, drawn from :func:`prior_of_unknown`.

    Args:
        fitted: the fitted model.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        A model whose tasks are the draws, and their θ, (draws, layers, *shape) by name of the latent.

    Raises:
        InputError: if τ is 0 or infinite, so that there is no prior of an unknown task.
    """
    if math.isinf(fitted.tau()):
        raise InputError("tau is inf, one adapter for all tasks, so a text of no task has the same likelihood; leave unknown out")
    model = given_model(fitted, draws)
    if not all(bool((model.prior.precision(name, start) > 0).all()) for name, start in model.starts.items()):
        raise InputError("tau is 0, so that tasks are independent and there is no prior of an unknown one; leave unknown out")
    assert isinstance(model.prior, Given)
    model.prior = prior_of_unknown(fitted, model.prior)
    with torch.no_grad(), poutine.seed(rng_seed=seed):
        return model, model.weights()


@torch.no_grad()
def prior_of_unknown(fitted: Fitted, prior: Given) -> Given:
    """The prior of the adapter of an unknown task, limited to the spread of the known tasks' deviations.

    In a point estimate 1/√τ can be ten times the root mean square of the estimated deviations. Draws that wide would give every
    text a lower likelihood than any task does. Each latent therefore gets the larger one of τ and 1/(mean squared deviation).

    Args:
        fitted: the fitted model.
        prior: Θ and τ of the fit.
    """
    squares = dict.fromkeys(prior.centres, 0.0)
    for index in torch.arange(len(fitted.tasks)).split(64):
        theta, mean = fitted.weights_of()(index)
        for name in squares:
            squares[name] += float((theta[name] - mean[name]).double().square().sum())
    precisions = {}
    for name, tau in prior.tau.items():
        numbers = int(fitted.model.tensors.active(name, len(fitted.tasks)).sum())
        precisions[name] = tau.clamp(min=numbers / squares[name] if squares[name] else math.inf)
    return Given(prior.centres, precisions, penalty=prior.penalty)
