"""Fits with decreasing τ, from one shared adapter to independent adapters. Each fit starts from the result of the one before.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> path = warm_path(bp.BoRA(backbone, 2), data, [1, 100, float("inf")], epochs=1)
>>> [point.tau for point in path], path[0].validation_perplexity >= path[-1].validation_perplexity
([inf, 100.0, 1.0], True)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.priors import Prior, prior_from_tau


@dataclass(frozen=True)
class WarmPoint:
    """The result for one τ of the path.

    Attributes:
        tau: τ.
        validation_perplexity: perplexity of the state that was kept; None if there are no validation documents.
        test_perplexity: perplexity of the same state; None if there are no test documents.
        seconds: time of the fit with this τ.
        seconds_so_far: time of all fits of the path up to this one.
        fitted: the fit.
    """

    tau: float
    validation_perplexity: float | None
    test_perplexity: float | None
    seconds: float
    seconds_so_far: float
    fitted: Fitted


def warm_path(
    model: BoRA,
    data: TaskData,
    taus: Iterable[float],
    *,
    epochs: int,
    first_epochs: int | None = None,
    make_prior: Callable[[float], Prior] = prior_from_tau,
    on_point: Callable[[WarmPoint], None] | None = None,
    **fit_options: Any,
) -> list[WarmPoint]:
    """Fit the same model with one τ after the other, from the largest to the smallest. Each fit starts from θ and Θ of the last.

    :func:`~bora_pyro.inference.fit.fit` keeps the best state, and the initial state is one of the candidates. The validation
    perplexity therefore never rises along the path. Where it stops falling, less sharing no longer helps. The weights θ and Θ are
    passed on, not the whitened deviations √τ (θ_d − Θ) of the non-centred form, whose values depend on τ. The last τ has had the
    passes of the whole path. Compare it with fits that have as many passes.

    Args:
        model: the model. Its prior is replaced by that of each τ; its adapter, likelihood and start stay the same.
        data: tokenised tasks.
        taus: values of τ, from 0 (independent tasks) to inf (one shared adapter), in any order.
        epochs: largest number of passes over the training documents for each τ.
        first_epochs: the same for the first τ, which has no fit to start from; default: ``epochs``.
        make_prior: returns the prior for a τ; default: :func:`~bora_pyro.priors.prior_from_tau`.
        on_point: called after the fit with each τ.
        **fit_options: further options of :func:`~bora_pyro.inference.fit.fit`: ``learning_rate``, ``token_budget``, ``seed``, ...

    Returns:
        One point for each τ, the largest τ first.

    Raises:
        InputError: there are fewer than two different τ, a τ is negative or not a number, or ``fit`` raises it.
    """
    path = sorted({float(tau) for tau in taus}, reverse=True)
    if len(path) < 2:
        raise InputError(f"taus has {len(path)} value{'s' * (not path)}; give two or more, for example inf, 1000, 100, 10, 0")
    priors = [make_prior(tau) for tau in path]  # before the first fit, so that a wrong τ is found at once
    points: list[WarmPoint] = []
    for tau, prior in zip(path, priors, strict=True):
        model_at_tau = copy.copy(model)
        model_at_tau.prior = prior
        sites = model_at_tau.sites_given(*points[-1].fitted.weights()) if points else None
        passes = epochs if points or first_epochs is None else first_epochs
        fitted = fit(model_at_tau, data, guide=map_guide(model_at_tau, sites), epochs=passes, **fit_options)
        (test,) = evaluate(model_at_tau, data.test, fitted.weights()[0])
        before = points[-1].seconds_so_far if points else 0.0
        point = WarmPoint(tau, fitted.validation_perplexity, test.perplexity(), fitted.seconds, before + fitted.seconds, fitted)
        points.append(point)
        if on_point is not None:
            on_point(point)
    return points
