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
themselves, whose entries go into the millions. A point estimate is one chain with one draw.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.deviations import (
    delta_w_deviations,
    delta_w_norms,
    deviations,
    effective_parameters,
    pooling_factor,
    root_mean_square,
)
from bora_pyro.document_gradients import diagonal_fisher
from bora_pyro.errors import InputError
from bora_pyro.evaluate import evaluate
from bora_pyro.fitted import Fitted


def shrinkage(fitted: Fitted, data: TaskData, *, token_budget: int = 4096) -> Any:
    """How far each task's adapter lies from Θ, how much of that its data speak for, and how well it predicts.

    The group ``posterior`` has, after ``chain`` and ``draw``:

    =====================  ============================  ==========================================================
    variable               dimensions                    what
    =====================  ============================  ==========================================================
    distance               task                          ‖θ_d − Θ‖ over all latents
    rms_deviation          task, layer, module, factor   root mean square of the entries of θ_d − Θ
    delta_w_deviation      task, layer, module           ‖ΔW_d − ΔW_Θ‖_F, whatever the gauge of (B, A)
    delta_w_norm           task, layer, module           ‖ΔW_d‖_F
    effective_parameters   task                          γ_d = Σ h/(h + τ): entries that the task's data determine
    pooling_factor         layer, module, factor         Gelman & Pardoe's λ: 1 is complete pooling
    tau                    module, factor (task, layer)  the prior's precision; with task or layer where it varies so
    =====================  ============================  ==========================================================

    h is the diagonal of the empirical Fisher information of the task's training documents at the estimate, and 1/(h + τ) the
    posterior variance of an entry in the Laplace approximation; both γ and λ stand on it (:mod:`bora_pyro.deviations` has the
    formulas and their limits). ``module`` is the kind of layer (``q_proj``), ``factor`` the latent (``A`` and ``B`` of LoRA);
    what a module lacks is NaN. The two ΔW variables are left out where an adapter's change is no low-rank product.

    The groups ``log_likelihood`` and ``constant_data`` are those of :func:`held_out`.

    Args:
        fitted: the fitted model.
        data: the data of the fit.
        token_budget: tokens of a batch, padding included, where gradients are taken.

    Returns:
        The container.
    """
    return _container({"posterior": _posterior(fitted, data, token_budget), **_held_out(fitted, data)}, fitted)


def held_out(fitted: Fitted, data: TaskData) -> Any:
    """How well a fit predicts the test documents: what :func:`compare_priors` compares, without the gradients of ``shrinkage``.

    The group ``log_likelihood`` has ``documents`` (chain, draw, document), the log-likelihood of each test document in nats,
    with the coordinate ``document_task``, the name of its task. The group ``constant_data`` has ``train_documents`` and
    ``test_documents`` (task), ``document_task``, ``document_tokens`` (predicted tokens) and ``document_checksum`` (document),
    and ``parameters``, the number of entries of one task's adapter.
    """
    return _container(_held_out(fitted, data), fitted)


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

    Args:
        containers: results of :func:`held_out` or :func:`shrinkage` by the name of the fit, on the same test documents.

    Returns:
        The table; its index is the names.

    Raises:
        InputError: fewer than two fits, no test documents, or different ones.
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


def _posterior(fitted: Fitted, data: TaskData, token_budget: int) -> xr.Dataset:
    model, theta = fitted.model, fitted.weights()[0]
    fisher = diagonal_fisher(model, theta, data.train, token_budget=token_budget)
    delta = deviations(fitted)
    sites = fitted.sites()
    tau = {name: model.prior.precision(name, start, sites) for name, start in model.starts.items()}
    arrays = {
        "distance": xr.DataArray(fitted.deviation_norms().cpu().double().numpy(), dims="task"),
        "rms_deviation": _by_latent({name: root_mean_square(value) for name, value in delta.items()}, ("task", "layer")),
        "effective_parameters": xr.DataArray(
            torch.stack([effective_parameters(fisher[name], tau[name]) for name in delta]).sum(0).cpu().numpy(), dims="task"
        ),
        "pooling_factor": _by_latent(
            {name: pooling_factor(value, fisher[name], tau[name]) for name, value in delta.items()}, ("layer",)
        ),
        "tau": _tau({name: _of_layers(value, delta[name]) for name, value in tau.items()}),
    }
    for variable, measure in (("delta_w_deviation", delta_w_deviations), ("delta_w_norm", delta_w_norms)):
        try:
            norms = measure(fitted)
        except InputError:  # the adapter's change is no low-rank product: the other variables stand without these
            break
        arrays[variable] = _by_module(norms, ("task", "layer"))
    return _draw(xr.Dataset(arrays).assign_coords(task=fitted.tasks))


def _held_out(fitted: Fitted, data: TaskData) -> dict[str, xr.Dataset]:
    theta, _ = fitted.weights()
    (scores,) = evaluate(fitted.model, data.test, theta)
    names = [fitted.tasks[d] for d in scores.task.tolist()]
    documents = {"document": np.arange(len(names)), "document_task": ("document", np.array(names, dtype=np.str_))}
    log_likelihood = xr.Dataset({"documents": ("document", scores.log_likelihood.numpy())}, coords=documents)
    constant = xr.Dataset(
        {
            "train_documents": ("task", data.train.documents_per_task),
            "test_documents": ("task", data.test.documents_per_task),
            "document_task": documents["document_task"],
            "document_tokens": ("document", scores.tokens.numpy()),
            "document_checksum": ("document", _checksums(data.test)),
            "parameters": sum(value[0].numel() for value in theta.values()),
        },
        coords={"task": fitted.tasks, "document": documents["document"]},
    )
    return {"log_likelihood": _draw(log_likelihood), "constant_data": constant}


def _draw(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset as one draw of one chain."""
    return dataset.expand_dims(chain=[0], draw=[0])


def _container(groups: Mapping[str, xr.Dataset], fitted: Fitted) -> Any:
    """The groups as the installed ArviZ holds them."""
    tree = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={"inference_library": "bora_pyro", "model": repr(fitted.model)}), **groups}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        import arviz  # here, for it takes seconds
    return arviz.InferenceData.from_datatree(tree) if hasattr(arviz, "InferenceData") else tree


def _by_latent(values: Mapping[str, Tensor], dims: tuple[str, ...]) -> xr.DataArray:
    """(*dims) by ``<module>.<latent>`` -> (*dims, module, factor); NaN where a module lacks a layer or a latent."""
    modules = list(dict.fromkeys(name.partition(".")[0] for name in values))
    by_factor: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        module, _, latent = name.partition(".")
        by_factor.setdefault(latent.removeprefix("lora_"), {})[module] = value
    arrays = [_by_module(of_module, dims).reindex(module=modules) for of_module in by_factor.values()]
    return xr.concat(arrays, _names("factor", by_factor), join="outer").transpose(*dims, "module", "factor")


def _by_module(values: Mapping[str, Tensor], dims: tuple[str, ...]) -> xr.DataArray:
    """(*dims) by name of the module -> (*dims, module)."""
    arrays = [xr.DataArray(value.cpu().double().numpy(), dims=dims) for value in values.values()]
    if "layer" in dims:
        arrays = [array.assign_coords(layer=np.arange(array.sizes["layer"])) for array in arrays]
    return xr.concat(arrays, _names("module", values), join="outer").transpose(*dims, "module")


def _names(dim: str, names: Iterable[str]) -> xr.Variable:
    """A coordinate of plain text, which netCDF takes."""
    return xr.Variable(dim, np.array(list(names), dtype=np.str_))


def _of_layers(tau: Tensor, deviation: Tensor) -> Tensor:
    """τ of each task and layer, (D or 1, layers or 1): the geometric mean where it varies within a layer."""
    whole = tau.reshape([1] * (deviation.dim() - tau.dim()) + [*tau.shape])
    entries = whole.flatten(2).double()
    return entries[..., 0] if entries.shape[2] == 1 else entries.log().mean(2).exp()


def _tau(values: Mapping[str, Tensor]) -> xr.DataArray:
    """τ with those of the dimensions task and layer over which some latent's varies."""
    tasks, layers = (max(value.shape[dim] for value in values.values()) for dim in (0, 1))
    if layers == 1:
        values = {name: value[:, :1] for name, value in values.items()}
    array = _by_latent({name: value.expand(tasks, max(layers, 1)) for name, value in values.items()}, ("task", "layer"))
    return array.squeeze([dim for dim, size in (("task", tasks), ("layer", layers)) if size == 1], drop=True)


def _checksums(split: TokenSplit) -> np.ndarray:
    """A number for each document that is another one for another document, as far as 32 bits go."""
    return np.array([zlib.crc32(split.document(n).numpy().tobytes()) for n in range(len(split))], dtype=np.int64)


def _same_documents(containers: Mapping[str, Any]) -> int:
    """The number of predicted tokens of the test documents, once it is clear that all fits have the same ones."""
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
