"""Fit the gates of a router over finished adapters (MeteoRA): a text then needs no task.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano", targets=["v_proj"])
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> fitted = bp.fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2)), data, epochs=1)
>>> routed = route_fit(fitted, data, MeteoRA(k=1), epochs=2)
>>> routed.weights()[0]["v_proj.gate"].shape, routed.evaluate(data.test)["test_perplexity"] > 1
(torch.Size([2, 4, 256]), True)

The model has the adapters of the fit as given values. Its only sample sites are the gates, which have a Normal prior. MAP finds
them with the same loop and AdamW as everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.guides import map_guide
from bora_pyro.inference.callbacks import Callback, FitLoop
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.likelihoods import CausalLM, LabelledGates
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import FrozenAdapters
from bora_pyro.routers import ByTask, MeteoRA
from bora_pyro.routers.meteora import GATE


class CycleDraws(Callback):
    """The steps read the adapters at the centre and in each draw of their posterior, in turn.

    Epochs are scored with the adapters at the centre.
    """

    name = "cycle_draws"

    def after_step(self, loop: FitLoop) -> None:
        prior = frozen(loop.model)
        number = (loop.step_number + 1) % (prior.num_draws + 1)
        prior.choose(number - 1 if number else None)

    def after_epoch(self, loop: FitLoop) -> None:
        frozen(loop.model).choose(None)


def frozen(model: BoRA) -> FrozenAdapters:
    """The prior of a routed model.

    Raises:
        InputError: the model is no routed one.
    """
    if not isinstance(model.prior, FrozenAdapters):
        raise InputError(f"{model} has no gates over finished adapters; give what route_fit returns")
    return model.prior


def check_routable(model: BoRA) -> None:
    """Check that gates can be fitted over the adapters of a model.

    Raises:
        InputError: it observes answers among options; it has another router than :class:`ByTask`; or its base recomputes layers
            in the backward pass.
    """
    model.likelihood.check_texts("route_fit")
    if not isinstance(model.router, ByTask):
        raise InputError(f"the adapters are read by {model.router} already; give the run of the adapters themselves")
    if model.backbone.gradient_checkpointing:
        raise InputError(
            "gradient_checkpointing is true: gates of layers that are computed again would be counted twice; leave it out"
        )


def routed_model(
    model: BoRA, prior: FrozenAdapters, router: MeteoRA | None = None, *, likelihood: LabelledGates | None = None
) -> BoRA:
    """A model of given adapters and gates: the base, the layers and the adapter of another model.

    Args:
        model: the model of the adapters; it does not change.
        prior: the adapters of all tasks, and the prior of the gates.
        router: the router; default: ``MeteoRA()``.
        likelihood: what the gates are fitted to; default: ``LabelledGates()``.

    Raises:
        InputError: as for :func:`check_routable`; there is one task; or k is larger than the number of tasks.
    """
    router, num_tasks = router or MeteoRA(), len(next(iter(prior.theta.values())))
    check_routable(model)
    if num_tasks < 2:
        raise InputError(f"{num_tasks} adapter given; gates choose among two or more")
    router.check_tasks(num_tasks)
    new = copy.copy(model)
    new.num_tasks, new.prior, new.router, new.likelihood = num_tasks, prior, router, likelihood or LabelledGates()
    new.factor = None  # the adapters do not change
    new.tensors = model.tensors.with_latents_of(router, model.backbone)
    new.starts = new.tensors.latents
    return new


def by_task_model(model: BoRA) -> BoRA:
    """A routed model whose gates are left out: each document is read by the adapter of its own task.

    Its weights are those of the adapters alone, ``FrozenAdapters.theta``.
    """
    new = copy.copy(model)
    new.router, new.likelihood = ByTask(), CausalLM()
    return new


def route_fit(
    fitted: Fitted,
    data: TaskData,
    router: MeteoRA | None = None,
    options: FitOptions | None = None,
    *,
    gate_weight: float = 50.0,
    token_weight: float = 1.0,
    gate_scale: float = 1.0,
    draws: Sequence[Weights] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Fitted:
    """Fit gates over the adapters of a fit, which do not change, by MAP.

    Args:
        fitted: the fit of the adapters; the centre of its guide is used.
        data: documents of the same tasks. The gates learn from the training documents. The validation perplexity of the routed
            model chooses the epoch.
        router: k, the temperature and the execution; default: ``MeteoRA()``.
        options: options of the fit; default: ``FitOptions()``.
        gate_weight: weight of the task of each token, per token.
        token_weight: weight of the text itself, per token.
        gate_scale: standard deviation of the gates' prior.
        draws: draws of θ of all tasks, such as ``posterior.draw(k)``. The steps read them in turn with the centre, so that one
            set of gates fits them all.
        on_step: called after each step with the report of the epoch so far.
        on_epoch: called after each epoch with its report.
        changes: single options, for example ``epochs=3``.

    Returns:
        The fit of the gates. Its weights are the adapters and the gates.

    Raises:
        InputError: as for :func:`routed_model` and ``fit``; or the documents are of other tasks.
    """
    if data.tasks != fitted.tasks:
        raise InputError(f"the documents are of {len(data.tasks)} tasks that are not those of the fit; give those of the fit")
    theta, means = fitted.weights()
    prior = FrozenAdapters(theta, means, scale=gate_scale, draws=draws)
    model = routed_model(fitted.model, prior, router, likelihood=LabelledGates(gate_weight, token_weight))
    return _fit(model, data, options, fitted.chat_template, on_step=on_step, on_epoch=on_epoch, **changes)


def add_adapters(
    routed: Fitted,
    adapters: Mapping[str, Weights],
    data: TaskData,
    options: FitOptions | None = None,
    **changes: Any,
) -> Fitted:
    """Add adapters to a routed model: each gets a row of gates, which is fitted alone. All other gates stay as they are.

    The rows of the new tasks compete with the old ones, so they learn from documents of all tasks.

    Args:
        routed: what :func:`route_fit` returned.
        adapters: the adapter of each new task by its name, (layers, *shape) by name of the latent, of the same kind.
        data: documents of the old tasks and of the new ones, in this order.
        options: options of the fit.
        changes: single options.

    Raises:
        InputError: no adapter is given, or one of an old task, or of other latents or shapes; the documents are of other tasks;
            or as for :func:`route_fit`.
    """
    model, prior = routed.model, frozen(routed.model)
    if not adapters or (known := [name for name in adapters if name in routed.tasks]):
        what = f"task {shown(known[0])} has an adapter already" if adapters else "no adapter is given"
        raise InputError(f"{what}; give adapters of new tasks by their names")
    names = [*routed.tasks, *adapters]
    if data.tasks != names:
        raise InputError(f"the documents are of the tasks {shown(data.tasks)}; give those of {shown(names)}, in this order")
    if prior.num_draws:
        raise InputError("the gates were fitted over draws, which a new adapter does not have; fit the gates without draws")
    weights, _ = routed.weights()
    theta = {}
    for name, value in prior.theta.items():
        for task, own in adapters.items():
            if name not in own or own[name].shape != value.shape[1:]:
                raise InputError(f"the adapter of task {shown(task)} has no {name!r} of shape {tuple(value.shape[1:])}")
        theta[name] = torch.cat([value, torch.stack([own[name] for own in adapters.values()]).to(value)])
    if masked := model.tensors.masks_by_task:
        raise InputError(f"each task has a mask of its own for {masked[0]!r}, which a task that is added does not have")
    of_all = copy.copy(model)
    of_all.num_tasks = len(names)
    of_all.prior = FrozenAdapters(theta, prior.centres, scale=prior.scale, rows=gates_of(weights))
    return _fit(of_all, data, options, routed.chat_template, **changes)


def _fit(model: BoRA, data: TaskData, options: FitOptions | None, chat_template: str | None, **more: Any) -> Fitted:
    callbacks = [CycleDraws()] if frozen(model).num_draws else []
    fitted = fit(model, data, options, guide=map_guide(model), callbacks=callbacks, **more)
    frozen(model).choose(None)
    fitted.chat_template = chat_template
    return fitted


def gates_of(weights: Mapping[str, Tensor]) -> Weights:
    """The gates among the weights of a routed model, (D, layers, in) by name."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[-1] == GATE}
