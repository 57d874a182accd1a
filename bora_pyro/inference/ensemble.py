"""Deep ensembles (Lakshminarayanan et al., 2017): several MAP fits of the same tasks as one posterior."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro.adapters import Adapter
from bora_pyro.adapters.load_balance import LoadBalance
from bora_pyro.errors import InputError, shown
from bora_pyro.guides import EnsembleGuide, make_parameters
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.priors import Prior

#: Learned precisions in the state of a prior.
_TAU = "tau."


def ensemble(fits: Iterable[Fitted]) -> Fitted:
    """Make one posterior of several MAP fits: a mixture of their estimates with equal weights.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> models = [bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), seed=seed) for seed in (0, 1)]
        >>> fits = [bp.fit(model, data, epochs=1, seed=seed) for seed, model in enumerate(models)]
        >>> posterior = bp.Posterior(bp.ensemble(fits))
        >>> posterior.score(data.test).log_likelihood.shape  # (members, documents)
        torch.Size([2, 4])

    The draws of its :class:`~bora_pyro.predict.posterior.Posterior` are the members in their order. Its centre is the member with
    the lowest validation score. A learned τ is the geometric mean of the members' τ. The whitened deviations are converted to it,
    so that the adapters of every member stay as they are.

    Args:
        fits: two or more fits with one kind of model, guide ``map``. They are read one after another, and only the model of the
            first is kept. Its prior is copied, so the first fit does not change.

    Raises:
        InputError: there are fewer than two fits, one of them is no point estimate, or two differ in their tasks, their adapter
            or prior, or in tensors that are not learned, such as the frozen A of ``FrozenALoRA``.
    """
    first: Fitted | None = None
    best: Fitted | None = None
    weights, precisions, seconds, centre = [], [], 0.0, 0
    for number, fitted in enumerate(fits):
        if not isinstance(fitted.guide, AutoDelta):
            raise InputError(f"member {number} has the guide {type(fitted.guide).__name__}; an ensemble is made of MAP fits")
        if first is None or best is None:
            model = copy.copy(fitted.model)
            model.prior = copy.deepcopy(fitted.model.prior)
            first = best = replace(fitted, model=model)
        else:
            _check_alike(first.model, fitted, first.tasks, number)
            if _score(fitted) < _score(best):
                # without the model of this member, so that its base need not stay in memory
                best, centre = replace(fitted, model=first.model, guide=first.guide), number
        weights.append(fitted.weights())
        precisions.append({name: value for name, value in fitted.model.prior.state().items() if name.startswith(_TAU)})
        seconds += fitted.seconds
    if first is None or best is None or len(weights) < 2:
        raise InputError(f"{len(weights)} fits are given; an ensemble needs two or more")
    model, device = first.model, first.model.backbone.device
    model.prior.load_state({name: value.to(device) for name, value in _geometric_means(precisions).items()})
    on_device = (({name: value.to(device) for name, value in part.items()} for part in pair) for pair in weights)
    sites = [model.sites_given(theta, mean) for theta, mean in on_device]
    guide = EnsembleGuide(model, sites[centre], members=len(sites))
    make_parameters(guide, model)
    guide.give(sites)
    return replace(best, model=model, guide=guide, seconds=seconds)


def check_adapter(adapter: Adapter) -> None:
    """Check before its members are fitted that an ensemble can have this adapter.

    Raises:
        InputError: each member would have a bias of its own in the choice of its experts.
    """
    if any(isinstance(callback, LoadBalance) for callback in adapter.callbacks()):
        raise InputError(
            f"each member of an ensemble would have load biases of its own under {adapter}, and one model cannot have all; give "
            "balance=0"
        )


def _score(fitted: Fitted) -> float:
    return math.inf if fitted.validation_score is None else fitted.validation_score


def _geometric_means(precisions: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([of[name] for of in precisions]).log().mean(0).exp() for name in precisions[0]}


def _check_alike(model: BoRA, other: Fitted, tasks: list[str], number: int) -> None:
    """Check that a member has the kind of model and the tasks of the first one, and the same tensors that are not learned.

    Raises:
        InputError: they differ.
    """
    both, own = f"members 0 and {number}", other.model
    if other.tasks != tasks:
        task = min({*other.tasks} ^ {*tasks}, default=tasks[0])
        raise InputError(f"{both} have different tasks, or another order of them ({shown(task)}); give fits of the same tasks")
    pairs = {
        "adapters": (model.adapter, own.adapter),
        "routers": (model.router, own.router),
        "likelihoods": (model.likelihood, own.likelihood),
        "priors": (_kind(model.prior), _kind(own.prior)),
        "latents": (_shapes(model.starts), _shapes(own.starts)),
    }
    for what, (one, two) in pairs.items():
        if repr(one) != repr(two):
            raise InputError(f"{both} have different {what}: {one!r:.200} and {two!r:.200}; give fits of one kind of model")
    for of_model, of_own in ((model.fixed, own.fixed), (model.tensors.state(), own.tensors.state())):
        for name, value in of_model.items():
            if name not in of_own or not torch.equal(value.cpu(), of_own[name].cpu()):
                raise InputError(
                    f"{both} have different tensors {name!r}, which {model.adapter} does not learn, and one model cannot have "
                    "both; fold the members instead, or give an adapter that learns all of its tensors, such as lora"
                )


def _kind(prior: Prior) -> object:
    """What two priors must have in common: all of it, unless it is learned during a fit."""
    return (
        (type(prior), _shapes({name: value for name, value in prior.state().items() if name.startswith(_TAU)}))
        if prior.every
        else prior
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(tensors.items())}
