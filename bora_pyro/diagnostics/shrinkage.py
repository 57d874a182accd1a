"""The shrinkage of a fit and its scores on held-out documents, as containers for ArviZ, xarray and the plots.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> few = {"num_tasks": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2}
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
>>> fits = {}
>>> for tau in (10.0, 1000.0):
...     model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=tau))
...     fits[f"tau {tau:g}"] = bp.fit(model, data, epochs=1)
>>> container = shrinkage(fits["tau 10"], data)
>>> dict(container.posterior["rms_deviation"].sizes)
{'chain': 1, 'draw': 1, 'task': 2, 'layer': 4, 'module': 2, 'factor': 2}
>>> table = compare_priors({name: held_out(fitted, data) for name, fitted in fits.items()})
>>> table.index.tolist() in (["tau 10", "tau 1000"], ["tau 1000", "tau 10"])
True

A container is an ArviZ container: ``InferenceData`` with ArviZ 0.23, ``xarray.DataTree`` with ArviZ 1.x. It holds summaries, not
the adapters themselves, which can have millions of entries. A point estimate is one chain with one draw. A guide with a spread
gives one chain with the requested number of draws. R-hat and the effective sample size are not reported: the draws of a guide are
independent, so both would look perfect even if the guide were far from the posterior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.data.digest import document_checksums
from bora_pyro.diagnostics.containers import as_container, blocks_of, by_latent, by_module, stack_draws, tau_array, tau_by_layer
from bora_pyro.diagnostics.deviations import (
    PosteriorPooling,
    active_entries,
    delta_w_deviations,
    delta_w_norms,
    deviations,
    displacements,
    distances,
    effective_parameters,
    pooling_factor,
    root_mean_square,
)
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides.curvature import diagonal_fisher
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.predict.posterior import Posterior

#: The splits whose documents :func:`held_out` scores: the test documents, or the training documents for ``arviz.loo``.
SPLITS = ("test", "train")


def shrinkage(fitted: Fitted, data: TaskData, *, draws: int | None = None, seed: int = 0, token_budget: int = 4096) -> Any:
    """Measure how far each task's adapter lies from Θ, how far its data determine that, and how well it predicts.

    The group ``posterior`` has these variables. Each has the dimensions ``chain`` and ``draw`` first:

    =====================  ============================  ==========================================================
    variable               dimensions                    meaning
    =====================  ============================  ==========================================================
    distance               task                          ‖θ_d − Θ‖ over all latents
    rms_deviation          task, layer, module, factor   root mean square of the entries of θ_d − Θ
    delta_w_deviation      task, layer, module           ‖ΔW_d − ΔW_Θ‖_F, which does not depend on the basis of (B, A)
    delta_w_norm           task, layer, module           ‖ΔW_d‖_F
    tau                    module, factor (task, layer)  precision of the prior; task and layer only if it varies over them
    effective_parameters   task                          γ_d = Σ h/(h + τ): entries that the task's data determine
    pooling_factor         layer, module, factor         Gelman & Pardoe's λ: 1 is complete pooling
    =====================  ============================  ==========================================================

    h is the diagonal of the empirical Fisher information of the task's training documents at the estimate. In the Laplace
    approximation 1/(h + τ) is the posterior variance of an entry; γ and λ are computed from it
    (:mod:`bora_pyro.diagnostics.deviations` has the formulas and their limits). ``module`` is the kind of layer, for instance
    ``q_proj``, and ``layer`` the number of the block. ``factor`` is the latent: ``A`` and ``B`` for LoRA. Entries are NaN where a
    module lacks a layer or a latent. The two ΔW variables are missing if the adapter is not a product of two low-rank matrices.

    With ``draws`` the container differs in four ways:

    - ``effective_parameters`` and ``pooling_factor`` are in the group ``constant_data``, because they describe all draws
      together. γ is computed at the posterior's centre. λ is computed from the draws, without the Laplace approximation
      (:class:`bora_pyro.diagnostics.deviations.PosteriorPooling`).
    - ``tau`` varies over the draws if the prior's τ is random.
    - ``posterior`` also has ``displacement`` (task), the component of a draw's deviation along the deviation of the posterior's
      centre (:func:`bora_pyro.diagnostics.deviations.displacements`). Use it in place of ``distance``: the squared distance of a
      draw is ‖E[δ]‖² plus the variances of all entries. The data determine few of the entries, so the distance is nearly the
      same in all tasks, and far above the distance of the centre (:meth:`Fitted.deviation_norms`).
    - ``constant_data`` also has ``centre_rms_deviation`` (task, layer, module, factor), the ``rms_deviation`` of the centre.

    The groups ``log_likelihood`` and ``constant_data`` are otherwise those of :func:`held_out`.

    Args:
        fitted: the fitted model.
        data: the data of the fit.
        draws: K, the number of draws of the posterior, at least 2. None uses the estimate alone (the centre of a guide with a
            spread). Only one draw is in memory at a time; the summaries of all draws are kept.
        seed: seed of the draws. :class:`~bora_pyro.predict.posterior.Posterior` with the same seed has the same draws.
        token_budget: tokens of a batch, padding included, for the gradients of the Fisher information.

    Returns:
        The container.

    Raises:
        InputError: if ``draws`` is given for a point estimate, or is below 2.
    """
    model, centre = fitted.model, fitted.sites()
    sites_by_draw = _sites_by_draw(fitted, draws, seed, minimum=2)
    theta, centre_delta = model.weights_given(centre)[0], deviations(fitted)
    fisher = diagonal_fisher(model, theta, data.train, token_budget=token_budget)
    tau = {name: model.prior.precision(name, start, centre) for name, start in model.starts.items()}
    gamma = torch.stack([effective_parameters(fisher[name], tau[name]) for name in theta]).sum(0)
    summaries, scores, pooling = [], [], PosteriorPooling()
    for sites in sites_by_draw:
        weights = model.weights_given(sites)
        delta = deviations(fitted, weights)
        summaries.append(_summaries(fitted, sites, weights, delta))
        scores.append(_log_likelihood(fitted, data.test, weights[0]))
        if draws is not None:
            pooling.add(delta)
            summaries[-1]["displacement"] = _by_task(displacements(delta, centre_delta))
    if draws is None:
        factors = {
            name: pooling_factor(value, fisher[name], tau[name], active_entries(model, name)) for name, value in delta.items()
        }
    else:
        found = {name: active_entries(model, name) for name in theta}
        factors = pooling.factors({name: active for name, active in found.items() if active is not None})
    posterior, constant = stack_draws(summaries), _constant(fitted, data, "test")
    (posterior if draws is None else constant).update(
        {
            "effective_parameters": _as_draw(draws, _by_task(gamma)),
            "pooling_factor": _as_draw(draws, by_latent(factors, ("layer",), blocks_of(model))),
        }
    )
    if draws is not None:
        constant["centre_rms_deviation"] = _rms(model, centre_delta)
    groups = {"posterior": posterior.assign_coords(task=fitted.tasks)}
    return as_container(groups | _document_groups(scores, constant, "test"), fitted)


def held_out(fitted: Fitted, data: TaskData, *, draws: int | None = None, split: str = "test", seed: int = 0) -> Any:
    """Score a fit on the test documents, as input of :func:`compare_priors`. It needs no gradients, unlike :func:`shrinkage`.

        >>> import bora_pyro as bp
        >>> from bora_pyro.guides import normal_guide
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> few = {"num_tasks": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 1}
        >>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
        >>> fitted = bp.fit(model, data, guide=normal_guide(model), epochs=1)
        >>> dict(held_out(fitted, data, draws=3, split="train").log_likelihood["documents"].sizes)
        {'chain': 1, 'draw': 3, 'document': 4}

    The group ``log_likelihood`` has ``documents`` (chain, draw, document), the log-likelihood of each document in nats, with the
    coordinate ``document_task``, the name of its task. The group ``constant_data`` has ``train_documents`` and
    ``test_documents`` (task), ``document_task``, ``document_tokens`` (predicted tokens) and ``document_checksum`` (document),
    and ``parameters``, the number of entries of one task's adapter that no mask leaves out. With ``draws`` there is also a group
    ``posterior`` with ``distance`` (chain, draw, task), because ``arviz.loo`` and ``arviz.compare`` need one.

    Which split to use:

    - ``test`` for the prediction of new documents. No part of the fit has seen them. :func:`compare_priors` scores each by the
      mean of its density over the draws, and this score needs no correction.
    - ``train`` for ``arviz.loo(container, var_name="documents")`` and ``arviz.compare`` only. Both start from the density of
      documents that the fit has seen, and estimate the density without them. With test documents they would correct for an
      effect that is not there. Without this correction the density of a training document measures memory, not prediction.

    ``arviz.loo`` assumes that the draws come from the posterior, and it reweights whole documents. Its Pareto k̂ is high for
    documents of many tokens under a posterior of many dimensions; do not use its estimate then. Prefer the test documents
    wherever there are some. ArviZ 1.x needs 25 draws or more for it.

    Args:
        fitted: the fitted model.
        data: the data of the fit.
        draws: K, the number of draws, at least 1. None scores the estimate alone (the centre of a guide with a spread).
        split: "test", or "train" for ``arviz.loo``.
        seed: seed of the draws, as for :func:`shrinkage`.

    Raises:
        InputError: if ``draws`` is given for a point estimate or is below 1, or if the split is unknown.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; it can be {' or '.join(SPLITS)}{nearest(str(split), SPLITS)}")
    documents, scores, distance = getattr(data, split), [], []
    for sites in _sites_by_draw(fitted, draws, seed, minimum=1):
        weights = fitted.model.weights_given(sites)
        scores.append(_log_likelihood(fitted, documents, weights[0]))
        distance.append(xr.Dataset({"distance": _by_task(distances(deviations(fitted, weights)))}))
    groups = {} if draws is None else {"posterior": stack_draws(distance).assign_coords(task=fitted.tasks)}
    return as_container(groups | _document_groups(scores, _constant(fitted, data, split), split), fitted)


def compare_priors(containers: Mapping[str, Any]) -> pd.DataFrame:
    """Compare fits on held-out documents, in a table like that of ``arviz.compare``.

    The columns are ``rank``, 0 for the best fit; ``elpd``, the sum of the documents' log predictive densities in nats, higher is
    better; ``elpd_diff``, the best elpd minus this one; ``se`` and ``dse``, the standard errors of ``elpd`` and ``elpd_diff``
    (√n times the sample standard deviation over the n documents); ``elpd_per_token``; ``perplexity``, exp(−elpd_per_token); and
    ``scale``, always ``log``. For answers among options, ``elpd_per_question`` takes the place of the two about tokens.

    The scores are those of documents that were left out of the fit, so no estimate such as ``arviz.loo`` is needed. There is no
    column of model weights, because this library has no mixture of fits under different priors. The standard errors assume
    independent documents. Documents of one task share an adapter, so with few tasks the standard errors are too small.

    ``arviz.plot_compare`` of ArviZ 1.x expects the other sign of ``elpd_diff``, ``table.assign(elpd_diff=-table["elpd_diff"])``,
    and that of ArviZ 0.23 another name for the score, ``table.rename(columns={"elpd": "elpd_loo"})``.

    For a container with draws, the predictive density of a document is the mean over the draws of the density of the whole
    document. The expected logarithm of this mean grows with the number of draws, so compare fits with the same number of draws.

    Args:
        containers: results of :func:`held_out` or :func:`shrinkage` on the same test documents, by name of the fit.

    Returns:
        The table, best fit first. Its index is the names.

    Raises:
        InputError: if there are fewer than two fits, no test documents, different ones, or scores of training documents.
    """
    if len(containers) < 2:
        raise InputError(f"{len(containers)} fit given; give two or more to compare")
    tokens = _check_same_documents(containers)
    scores = {name: _log_predictive(container) for name, container in containers.items()}
    of_answers = any(container["constant_data"].attrs.get("observation") == "question" for container in containers.values())
    best = max(scores, key=lambda name: scores[name].sum())
    rows = []
    for score in scores.values():
        elpd, difference = float(score.sum()), scores[best] - score
        of_tokens = {"elpd_per_token": elpd / tokens, "perplexity": float(np.exp(-elpd / tokens))}
        rows.append(
            {
                "elpd": elpd,
                "elpd_diff": float(difference.sum()),
                "se": _standard_error(score),
                "dse": _standard_error(difference),
                **({"elpd_per_question": elpd / len(score)} if of_answers else of_tokens),
                "scale": "log",
            }
        )
    table = pd.DataFrame(rows, index=pd.Index(scores)).sort_values("elpd", ascending=False, kind="stable")
    table.insert(0, "rank", range(len(table)))
    return table


def _sites_by_draw(fitted: Fitted, draws: int | None, seed: int, *, minimum: int) -> Iterator[dict[str, Tensor]]:
    """The sample sites of each draw, made one at a time; if ``draws`` is None, those of the estimate."""
    if draws is None:
        return iter([fitted.sites()])
    posterior = Posterior(fitted, seed=seed)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < minimum:
        raise InputError(f"draws is {draws!r}; give a whole number from {minimum} up, or None for the estimate alone")
    return map(posterior.sites, posterior.numbers(draws))


def _summaries(fitted: Fitted, sites: Mapping[str, Tensor], weights: tuple[Weights, Weights], delta: Weights) -> xr.Dataset:
    """The variables of one draw that a container keeps."""
    model = fitted.model
    tau = {name: model.prior.precision(name, start, sites) for name, start in model.starts.items()}
    arrays = {
        "distance": _by_task(distances(delta)),
        "rms_deviation": _rms(model, delta),
        "tau": tau_array({name: tau_by_layer(value, delta[name]) for name, value in tau.items()}, blocks_of(model)),
    }
    for variable, measure in (("delta_w_deviation", delta_w_deviations), ("delta_w_norm", delta_w_norms)):
        try:
            norms = measure(fitted, weights)
        except InputError:  # the adapter is not a product of two low-rank matrices: leave these variables out
            break
        arrays[variable] = by_module(norms, ("task", "layer"), blocks_of(model))
    return xr.Dataset(arrays)


def _rms(model: BoRA, delta: Weights) -> xr.DataArray:
    values = {name: root_mean_square(value, active_entries(model, name)) for name, value in delta.items()}
    return by_latent(values, ("task", "layer"), blocks_of(model))


def _by_task(values: Tensor) -> xr.DataArray:
    return xr.DataArray(values.cpu().double().numpy(), dims="task")


def _log_likelihood(fitted: Fitted, split: TokenSplit, theta: Weights) -> xr.Dataset:
    (scores,) = evaluate(fitted.model, split, theta)
    return xr.Dataset({"documents": ("document", split.sum_by_document(scores.log_likelihood).numpy())})


def _constant(fitted: Fitted, data: TaskData, split: str) -> xr.Dataset:
    """The group ``constant_data``: the documents of a split, and the number of documents of each task."""
    documents: TokenSplit = getattr(data, split)
    names = [fitted.tasks[d] for d in documents.task[documents.first_pieces].tolist()]
    return xr.Dataset(
        {
            "train_documents": ("task", data.train.documents_per_task),
            "test_documents": ("task", data.test.documents_per_task),
            "document_task": ("document", np.array(names, dtype=np.str_)),
            "document_tokens": ("document", documents.sum_by_document(documents.predicted).numpy()),
            "document_checksum": ("document", document_checksums(documents)),
            "parameters": int(sum(fitted.model.tensors.active(name, len(fitted.tasks)).max() for name in fitted.model.starts)),
        },
        coords={"task": fitted.tasks, "document": np.arange(documents.num_documents)},
        attrs={"observation": fitted.model.likelihood.measure.observation},
    )


def _document_groups(scores: list[xr.Dataset], constant: xr.Dataset, split: str) -> dict[str, xr.Dataset]:
    """The groups ``log_likelihood``, from the scores of each draw, and ``constant_data``."""
    documents = constant[["document", "document_task"]].set_coords("document_task").coords
    log_likelihood = stack_draws(scores).assign_coords(documents).assign_attrs(split=split)
    return {"log_likelihood": log_likelihood, "constant_data": constant}


def _as_draw(draws: int | None, array: xr.DataArray) -> xr.DataArray:
    """A summary of all draws together. If ``draws`` is None, it gets the dimensions chain and draw of the single estimate."""
    return array.expand_dims(chain=[0], draw=[0]) if draws is None else array


def _check_same_documents(containers: Mapping[str, Any]) -> int:
    """Check that all fits have the same test documents, and return the number of their predicted tokens."""
    for name, container in containers.items():
        if container["log_likelihood"].attrs.get("split", "test") != "test":
            raise InputError(f"{name!r} has scores of its training documents; compare by held_out(fitted, data, split='test')")
    (first, reference), *others = ((name, container["constant_data"]) for name, container in containers.items())
    if not reference.sizes["document"]:
        raise InputError("there are no test documents to compare fits by; split the data so that some tasks have some")
    for name, constant in others:
        for variable in ("document_task", "document_tokens", "document_checksum"):
            if not np.array_equal(constant[variable].values, reference[variable].values):
                raise InputError(
                    f"{name!r} and {first!r} have different test documents; compare fits on the same data, split with the same "
                    "seed, tokenizer and max_tokens"
                )
    return int(reference["document_tokens"].sum())


def _log_predictive(container: Any) -> np.ndarray:
    """The logarithm of each document's mean density over the draws: (documents,)."""
    values = container["log_likelihood"]["documents"].transpose("chain", "draw", "document").values
    return np.logaddexp.reduce(draws := values.reshape(-1, values.shape[-1]), axis=0) - np.log(len(draws))


def _standard_error(values: np.ndarray) -> float:
    """Standard error of a sum over n documents: √n times their sample standard deviation; NaN for one document."""
    return float(np.sqrt(len(values)) * values.std(ddof=1)) if len(values) > 1 else float("nan")
