"""What ArviZ, xarray and the plots read: the shrinkage of a fit, and how well fits predict held-out documents.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, num_tasks=2, max_train_documents=2, max_eval_documents=2)
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

A container is ArviZ's: ``InferenceData`` with ArviZ 0.23, ``xarray.DataTree`` with 1.x. It holds summaries and not the adapters
themselves, whose entries go into the millions. A point estimate is one chain with one draw; a fit whose guide has a spread gives
as many draws as are asked for, in one chain. There is no r-hat and no effective sample size: draws of a guide are independent of
each other by construction, so that both would look perfect however far the guide is from the posterior.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.diagnostics.containers import as_container, by_latent, by_module, of_layers, stack_draws, tau_array
from bora_pyro.diagnostics.deviations import (
    PosteriorPooling,
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
from bora_pyro.model import Weights
from bora_pyro.predict.posterior import Posterior

#: The splits whose documents :func:`held_out` scores: the test documents, or the training documents for ``arviz.loo``.
SPLITS = ("test", "train")


def shrinkage(fitted: Fitted, data: TaskData, *, draws: int | None = None, seed: int = 0, token_budget: int = 4096) -> Any:
    """How far each task's adapter lies from Θ, how much of that its data speak for, and how well it predicts.

    The group ``posterior`` has, after ``chain`` and ``draw``:

    =====================  ============================  ==========================================================
    variable               dimensions                    what
    =====================  ============================  ==========================================================
    distance               task                          ‖θ_d − Θ‖ over all latents
    rms_deviation          task, layer, module, factor   root mean square of the entries of θ_d − Θ
    delta_w_deviation      task, layer, module           ‖ΔW_d − ΔW_Θ‖_F, whatever the gauge of (B, A)
    delta_w_norm           task, layer, module           ‖ΔW_d‖_F
    tau                    module, factor (task, layer)  the prior's precision; with task or layer where it varies so
    effective_parameters   task                          γ_d = Σ h/(h + τ): entries that the task's data determine
    pooling_factor         layer, module, factor         Gelman & Pardoe's λ: 1 is complete pooling
    =====================  ============================  ==========================================================

    h is the diagonal of the empirical Fisher information of the task's training documents at the estimate, and 1/(h + τ) the
    posterior variance of an entry in the Laplace approximation; both γ and λ stand on it (:mod:`bora_pyro.diagnostics.deviations`
    has the formulas and their limits). ``module`` is the kind of layer (``q_proj``), ``factor`` the latent (``A`` and ``B`` of
    LoRA); what a module lacks is NaN. The two ΔW variables are left out where an adapter's change is no low-rank product.

    With ``draws`` the last two are in the group ``constant_data``, for no draw has one of its own: γ is that of the posterior's
    centre, and λ is taken from the draws themselves, without Laplace
    (:class:`bora_pyro.diagnostics.deviations.PosteriorPooling`). τ is then another one in each draw where it is random, and the
    same in all where it is not. The distance of a draw is far above that of the posterior's centre, which
    :meth:`Fitted.deviation_norms` gives, and nearly the same in all tasks: its square is ‖E[δ]‖² and the variances of all entries
    together, of which most are known no better than the prior knows them. There is therefore one more variable, ``displacement``
    (task): the component of a draw's deviation along that of the centre, which is as far as the centre on average, and spread as
    one direction is (:func:`bora_pyro.diagnostics.deviations.displacements`); and ``constant_data`` has ``centre_rms_deviation``,
    the root mean squares of the centre.

    The groups ``log_likelihood`` and ``constant_data`` are those of :func:`held_out`.

    Args:
        fitted: the fitted model.
        data: the data of the fit.
        draws: K, how many draws of the posterior; None looks at the estimate alone (of a guide with a spread, its centre). One
            draw is held at a time: memory grows with K by the summaries only.
        seed: of the draws; :class:`~bora_pyro.predict.posterior.Posterior` of the same seed has the same ones.
        token_budget: tokens of a batch, padding included, where gradients are taken.

    Returns:
        The container.

    Raises:
        InputError: draws of a point estimate, or fewer than two.
    """
    model, centre = fitted.model, fitted.sites()
    states = _states(fitted, draws, seed, least=2)
    theta, centre_delta = model.weights_given(centre)[0], deviations(fitted)
    fisher = diagonal_fisher(model, theta, data.train, token_budget=token_budget)
    tau = {name: model.prior.precision(name, start, centre) for name, start in model.starts.items()}
    gamma = torch.stack([effective_parameters(fisher[name], tau[name]) for name in theta]).sum(0)
    summaries, scores, pooling = [], [], PosteriorPooling()
    for sites in states:
        weights = model.weights_given(sites)
        delta = deviations(fitted, weights)
        summaries.append(_summaries(fitted, sites, weights, delta))
        scores.append(_log_likelihood(fitted, data.test, weights[0]))
        if draws is not None:
            pooling.add(delta)
            summaries[-1]["displacement"] = _by_task(displacements(delta, centre_delta))
    if draws is None:
        factors = {name: pooling_factor(value, fisher[name], tau[name]) for name, value in delta.items()}
    else:
        factors = pooling.factors()
    posterior, constant = stack_draws(summaries), _constant(fitted, data, "test")
    (posterior if draws is None else constant).update(
        {
            "effective_parameters": _draw(draws, _by_task(gamma)),
            "pooling_factor": _draw(draws, by_latent(factors, ("layer",))),
        }
    )
    if draws is not None:
        constant["centre_rms_deviation"] = _rms(centre_delta)
    groups = {"posterior": posterior.assign_coords(task=fitted.tasks)}
    return as_container(groups | _scored(scores, constant, "test"), fitted)


def held_out(fitted: Fitted, data: TaskData, *, draws: int | None = None, split: str = "test", seed: int = 0) -> Any:
    """How well a fit predicts the test documents: what :func:`compare_priors` compares, without the gradients of ``shrinkage``.

        >>> import bora_pyro as bp
        >>> from bora_pyro.guides import normal_guide
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> few = {"num_tasks": 2, "max_train_documents": 2, "max_eval_documents": 1}
        >>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, **few)
        >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
        >>> fitted = bp.fit(model, data, guide=normal_guide(model), epochs=1)
        >>> dict(held_out(fitted, data, draws=3, split="train").log_likelihood["documents"].sizes)
        {'chain': 1, 'draw': 3, 'document': 4}

    The group ``log_likelihood`` has ``documents`` (chain, draw, document), the log-likelihood of each test document in nats,
    with the coordinate ``document_task``, the name of its task. The group ``constant_data`` has ``train_documents`` and
    ``test_documents`` (task), ``document_task``, ``document_tokens`` (predicted tokens) and ``document_checksum`` (document),
    and ``parameters``, the number of entries of one task's adapter. With ``draws`` there is a group ``posterior`` too, with
    ``distance`` (chain, draw, task), since ``arviz.loo`` and ``arviz.compare`` want one.

    Which documents are honest for what: the test documents, which no part of the fit has seen, for how well the fit predicts
    new documents; their mean density over the draws, as :func:`compare_priors` takes it, is a score as it stands. The training
    documents, for ``arviz.loo(container, var_name="documents")`` and ``arviz.compare``, which estimate from draws that have seen
    a document how well it would be predicted without it: given test documents they would take away once more what was never
    there, and given training documents the density as it stands says how well the fit remembers. ``arviz.loo`` also takes the
    draws for those of the posterior, and weighs whole documents: where its Pareto k̂ are high, as they are for documents of many
    tokens under a posterior of many dimensions, its estimate is to be left alone. Documents that were left out are the better
    judge wherever there are some.

    Args:
        fitted: the fitted model.
        data: the data of the fit.
        draws: K, how many draws of the posterior; None scores the estimate alone (of a guide with a spread, its centre).
        split: "test", or "train" for ``arviz.loo``.
        seed: of the draws, as for :func:`shrinkage`.

    Raises:
        InputError: draws of a point estimate, fewer than one, or no such split.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; it can be {' or '.join(SPLITS)}{nearest(str(split), SPLITS)}")
    documents, scores, reach = getattr(data, split), [], []
    for sites in _states(fitted, draws, seed, least=1):
        weights = fitted.model.weights_given(sites)
        scores.append(_log_likelihood(fitted, documents, weights[0]))
        reach.append(xr.Dataset({"distance": _by_task(distances(deviations(fitted, weights)))}))
    groups = {} if draws is None else {"posterior": stack_draws(reach).assign_coords(task=fitted.tasks)}
    return as_container(groups | _scored(scores, _constant(fitted, data, split), split), fitted)


def compare_priors(containers: Mapping[str, Any]) -> pd.DataFrame:
    """Compare fits by the held-out documents: a table in the manner of ``arviz.compare``, best first.

    The columns: ``rank``; ``elpd``, the sum of the documents' log predictive densities in nats (higher is better);
    ``elpd_diff``, by how much it is below the best one's; ``se`` and ``dse``, the standard errors of the two, √n times the
    sample standard deviation over the n documents, for the difference that of the paired differences; ``elpd_per_token``;
    ``perplexity``, exp(−elpd_per_token); ``scale``.

    ``arviz.loo`` is not what is wanted here: it estimates from the training data how a model would predict a document left
    out, for want of documents that were left out. Here there are some, and their score is exact. There are no model weights: a
    mixture of fits under different priors is no model that this library has. The standard errors take documents as exchangeable;
    those of one task share an adapter, so with few tasks they are on the small side.

    ArviZ 1.x plots the table as it is. ArviZ 0.23 wants another name for the score::

        az.plot_compare(table.rename(columns={"elpd": "elpd_loo"}))

    Of a container with draws the density of a document is the mean over the draws of the whole document's density. On average its
    logarithm rises with the number of draws, so give fits that are to be compared the same number.

    Args:
        containers: results of :func:`held_out` or :func:`shrinkage` by the name of the fit, on the same test documents.

    Returns:
        The table; its index is the names.

    Raises:
        InputError: fewer than two fits, no test documents, different ones, or training documents.
    """
    if len(containers) < 2:
        raise InputError(f"{len(containers)} fit given; give two or more to compare")
    tokens = _same_documents(containers)
    scores = {name: _log_predictive(container) for name, container in containers.items()}
    best = max(scores, key=lambda name: scores[name].sum())
    rows = []
    for score in scores.values():
        elpd, difference = float(score.sum()), scores[best] - score
        rows.append(
            {
                "elpd": elpd,
                "elpd_diff": float(difference.sum()),
                "se": _standard_error(score),
                "dse": _standard_error(difference),
                "elpd_per_token": elpd / tokens,
                "perplexity": float(np.exp(-elpd / tokens)),
                "scale": "log",
            }
        )
    table = pd.DataFrame(rows, index=pd.Index(scores)).sort_values("elpd", ascending=False, kind="stable")
    table.insert(0, "rank", range(len(table)))
    return table


def _states(fitted: Fitted, draws: int | None, seed: int, *, least: int) -> Iterator[dict[str, Tensor]]:
    """The sample sites of each draw, made when it is asked for; without draws those of the estimate."""
    if draws is None:
        return iter([fitted.sites()])
    posterior = Posterior(fitted, seed=seed)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < least:
        raise InputError(f"draws is {draws!r}; give a whole number from {least} up, or None for the estimate alone")
    return map(posterior.sites, range(draws))


def _summaries(fitted: Fitted, sites: Mapping[str, Tensor], weights: tuple[Weights, Weights], delta: Weights) -> xr.Dataset:
    """What a container keeps of one draw."""
    model = fitted.model
    tau = {name: model.prior.precision(name, start, sites) for name, start in model.starts.items()}
    arrays = {
        "distance": _by_task(distances(delta)),
        "rms_deviation": _rms(delta),
        "tau": tau_array({name: of_layers(value, delta[name]) for name, value in tau.items()}),
    }
    for variable, measure in (("delta_w_deviation", delta_w_deviations), ("delta_w_norm", delta_w_norms)):
        try:
            norms = measure(fitted, weights)
        except InputError:  # the adapter's change is no low-rank product: the other variables stand without these
            break
        arrays[variable] = by_module(norms, ("task", "layer"))
    return xr.Dataset(arrays)


def _rms(delta: Weights) -> xr.DataArray:
    return by_latent({name: root_mean_square(value) for name, value in delta.items()}, ("task", "layer"))


def _by_task(values: Tensor) -> xr.DataArray:
    return xr.DataArray(values.cpu().double().numpy(), dims="task")


def _log_likelihood(fitted: Fitted, split: TokenSplit, theta: Weights) -> xr.Dataset:
    (scores,) = evaluate(fitted.model, split, theta)
    return xr.Dataset({"documents": ("document", scores.log_likelihood.numpy())})


def _constant(fitted: Fitted, data: TaskData, split: str) -> xr.Dataset:
    """What the documents of a split are, and how many there are of each task."""
    documents: TokenSplit = getattr(data, split)
    return xr.Dataset(
        {
            "train_documents": ("task", data.train.documents_per_task),
            "test_documents": ("task", data.test.documents_per_task),
            "document_task": ("document", np.array([fitted.tasks[d] for d in documents.task.tolist()], dtype=np.str_)),
            "document_tokens": ("document", documents.predicted.numpy()),
            "document_checksum": ("document", _checksums(documents)),
            "parameters": sum(start.numel() for start in fitted.model.starts.values()),
        },
        coords={"task": fitted.tasks, "document": np.arange(len(documents))},
    )


def _scored(scores: list[xr.Dataset], constant: xr.Dataset, split: str) -> dict[str, xr.Dataset]:
    """The groups on the documents of a split, of which the draws have these scores."""
    documents = constant[["document", "document_task"]].set_coords("document_task").coords
    log_likelihood = stack_draws(scores).assign_coords(documents).assign_attrs(split=split)
    return {"log_likelihood": log_likelihood, "constant_data": constant}


def _draw(draws: int | None, array: xr.DataArray) -> xr.DataArray:
    """A summary of the whole posterior: of an estimate, its one draw; of draws, as it is."""
    return array.expand_dims(chain=[0], draw=[0]) if draws is None else array


def _checksums(split: TokenSplit) -> np.ndarray:
    """A number for each document that is another one for another document, as far as 32 bits go."""
    sums = (zlib.crc32(split.document(n).numpy().tobytes()) for n in range(len(split)))
    if split.observed is not None:  # equal tokens of which others are predicted make another document
        sums = (zlib.crc32(split.labels(n).numpy().tobytes(), one) for n, one in enumerate(sums))
    return np.fromiter(sums, dtype=np.int64, count=len(split))


def _same_documents(containers: Mapping[str, Any]) -> int:
    """The number of predicted tokens of the test documents, once it is clear that all fits have the same ones."""
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
    """The log predictive density of each document, over the draws: (documents,)."""
    values = container["log_likelihood"]["documents"].transpose("chain", "draw", "document").values
    draws = values.reshape(-1, values.shape[-1])
    return np.logaddexp.reduce(draws, axis=0) - np.log(len(draws))


def _standard_error(values: np.ndarray) -> float:
    """Of a sum over documents: √n times their sample standard deviation; NaN for a single one."""
    return float(np.sqrt(len(values)) * values.std(ddof=1)) if len(values) > 1 else float("nan")
