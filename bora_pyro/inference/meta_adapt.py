"""Adapting a meta-fit to new tasks: the same inner steps from the same global point (ABMLL).

>>> import bora_pyro as bp
>>> from bora_pyro.inference.meta_fit import meta_fit
>>> from bora_pyro.priors import AmortisedNormal
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
>>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
>>> fitted = meta_fit(bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2), prior=AmortisedNormal()), data, epochs=1, inner_steps=2)
>>> new = meta_adapt(fitted, {"cleo": ["cleo prefers document 1"], "silence": []}, InnerOptions(steps=2))
>>> new.tasks, [bool(norm) for norm in new.deviation_norms()]  # no documents: the prior itself
(['cleo', 'silence'], [True, False])
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

import torch

from bora_pyro.data.tables import Source
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import NormalGuide, TaskNormalGuide, make_parameters, normal_guide, task_normal_guide
from bora_pyro.guides.task_normal import LOC, RAW_SCALE
from bora_pyro.inference.adapt import given_model, new_task_data
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.inner_steps import InnerOptions, InnerSteps, amortised_prior
from bora_pyro.model import BoRA


def meta_adapt(
    fitted: Fitted,
    data: TaskData | Mapping[str, Sequence[str]] | Source,
    options: InnerOptions | None = None,
    *,
    seed: int = 0,
) -> Fitted:
    """The posteriors of new tasks after K inner steps from the global point of a meta-fit.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data = bp.load_tasks(bp.table(table), backbone.tokenizer)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1), prior=bp.AmortisedNormal())
        >>> fitted = bp.meta_fit(model, data, epochs=1, inner_steps=1)
        >>> prior = bp.meta_adapt(fitted, {"cleo": ["cleo prefers document 1"]}, InnerOptions(steps=0))
        >>> float(prior.deviation_norms()[0])
        0.0

    The result has the form of :func:`~bora_pyro.adapt` with the guide ``normal``: tasks under the prior ``Given`` with the mean
    μ₀ and the precision σ₀⁻² of each entry. The steps themselves are those of the fit, in μ_d and the raw scale. With K = 0, or
    without documents, a task's posterior is the prior, and its adapter is μ₀.

    All tasks of a call share passes of the base. A task's gradient does not depend on the other tasks, but its draws do, as all
    draws come from one seeded stream.

    Args:
        fitted: what :func:`~bora_pyro.inference.meta_fit.meta_fit` returned, or ``load_run`` of its folder.
        data: the new tasks, in every form that :func:`~bora_pyro.adapt` reads.
        options: the inner steps; default: ``InnerOptions()``. Give those of the fit (`inner_options`), which it was fitted for.
        seed: seed of the draws.

    Raises:
        InputError: the fit is no meta-fit; there is no task; or a text has no token.
    """
    if not isinstance(fitted.guide, TaskNormalGuide):
        raise InputError("the fit is no meta-fit, which alone has inner steps; use adapt")
    prior, begin = amortised_prior(fitted.model.prior), time.perf_counter()
    data = new_task_data(fitted, data)
    model = copy.copy(fitted.model)
    model.num_tasks, model.tensors = len(data.tasks), fitted.model.tensors.for_new_tasks()
    model.likelihood = fitted.model.likelihood.with_task_weights(data.task_weights)
    inner = InnerSteps(model, task_normal_guide(model, scale=1.0, positivity=prior.positivity), options or InnerOptions())
    of_fit, shared = dict(fitted.guide.named_parameters()), {id(parameter) for parameter in inner.shared}
    with torch.no_grad():
        for name, value in inner.guide.named_parameters():
            if id(value) in shared:
                value.copy_(of_fit[name])
    inner.all_tasks(data.train, seed=seed)
    given = given_model(fitted, len(data.tasks))
    given.likelihood = model.likelihood
    guide, score = _whitened(given, inner), None
    adapted = Fitted(given, guide, data.tasks, documents=data.train.documents_per_task, chat_template=data.chat_template)
    if data.validation.num_tokens:
        (scores,) = evaluate(given, data.validation, adapted.weights()[0])
        score = scores.value()
    adapted.validation_score, adapted.seconds = score, time.perf_counter() - begin
    return adapted


@torch.no_grad()
def _whitened(model: BoRA, inner: InnerSteps) -> NormalGuide:
    """The tasks' posteriors as a guide of the whitened deviations z_d = (θ_d − μ₀)/σ₀, which the prior ``Given`` samples."""
    guide = normal_guide(model, scale=1.0)
    make_parameters(guide, model)
    for name in inner.latents:
        site, unit = f"theta.{name}_decentered", model.prior.precision(name, model.starts[name]).sqrt()
        centre = inner.guide.get(LOC, f"prior_mean.{name}")
        scale = inner.guide.scale_of(inner.guide.get(RAW_SCALE, f"theta.{name}"))
        guide.get(LOC, site).data.copy_((inner.guide.get(LOC, f"theta.{name}") - centre) * unit)
        guide.get("log_scale", site).data.copy_((scale * unit).log())
    return guide
