"""One fit that relaxes τ: from one shared adapter towards independent ones, each τ begun where the last one ended.

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
    """Where the path stands after one τ.

    Attributes:
        tau: τ.
        validation_perplexity: of the state that was kept; None where there is no validation document.
        test_perplexity: of the same state; None where there is no test document.
        seconds: of this τ's fit.
        seconds_so_far: of all fits of the path up to here.
        fitted: the fit itself.
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
    """Fit the same model under one τ after the other, from the largest down; θ and Θ are handed on.

    The state that a τ begins with counts among those of which :func:`~bora_pyro.inference.fit.fit` keeps the best, so that the
    validation perplexity never rises along the path: where it stops falling, less sharing no longer pays. What is handed on are
    the weights. The whitened deviations √τ (θ_d − Θ) of the non-centred form are another number under another τ. The last τ has
    had all passes of the path: compare it with fits that have as many.

    Args:
        model: the model; its prior is replaced by that of each τ, its adapter, likelihood and start stay.
        data: tokenised tasks.
        taus: values of τ, from 0 (independent tasks) to inf (one shared adapter), in any order.
        epochs: passes over the training documents at each τ, at most.
        first_epochs: at the first τ, which has no fit to start from; default: as at the others.
        make_prior: the prior of a τ; default: :func:`~bora_pyro.priors.prior_from_tau`.
        on_point: called after each τ.
        **fit_options: further options of :func:`~bora_pyro.inference.fit.fit`: ``learning_rate``, ``token_budget``, ``seed``, ...

    Returns:
        One point a τ, the largest τ first.

    Raises:
        InputError: fewer than two different τ, one that is no precision, or what ``fit`` raises.
    """
    path = sorted({float(tau) for tau in taus}, reverse=True)
    if len(path) < 2:
        raise InputError(f"taus has {len(path)} value{'s' * (not path)}; a path needs two or more, such as inf, 1000, 100, 10, 0")
    priors = [make_prior(tau) for tau in path]  # all before the first fit: a τ that cannot be used is found now
    points: list[WarmPoint] = []
    for tau, prior in zip(path, priors, strict=True):
        under = copy.copy(model)
        under.prior = prior
        sites = under.sites_given(*points[-1].fitted.weights()) if points else None
        passes = epochs if points or first_epochs is None else first_epochs
        fitted = fit(under, data, guide=map_guide(under, sites), epochs=passes, **fit_options)
        (test,) = evaluate(under, data.test, fitted.weights()[0])
        before = points[-1].seconds_so_far if points else 0.0
        point = WarmPoint(tau, fitted.validation_perplexity, test.perplexity(), fitted.seconds, before + fitted.seconds, fitted)
        points.append(point)
        if on_point is not None:
            on_point(point)
    return points
