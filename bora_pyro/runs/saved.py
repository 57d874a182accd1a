"""A finished run, read back: the fitted model with its guide, and the data as the run split them.

    >>> import tempfile
    >>> from bora_pyro.runs.map_fit import run_map_fit
    >>> options = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2, "epochs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metrics = run_map_fit(MapFitConfig(output_dir=f"{folder}/run", **options), quiet=True)
    ...     run = load_run(f"{folder}/run")
    >>> abs(run.fitted.evaluate(run.data.test)["test_perplexity"] / metrics["test_perplexity"] - 1) < 1e-6
    True

Everything comes from the run folder but two things that a run does not copy: the base model and the documents, which are read
from where ``config.yaml`` says they are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError, nearest
from bora_pyro.files.tensors import not_a_number
from bora_pyro.guides import GUIDES, make_parameters
from bora_pyro.inference.continuation import check_same
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.predict.posterior import Posterior
from bora_pyro.priors import Given, RandomPrecision, with_shared
from bora_pyro.priors.given import MEAN
from bora_pyro.runs.build import build_run
from bora_pyro.runs.checks import check_data, read_metrics
from bora_pyro.runs.config.adapt import NEW_DOCUMENTS, AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.posterior_fit import FIXED, PosteriorFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG, FIT
from bora_pyro.runs.results import GIVEN

# What stands in posterior.safetensors beside the sample sites: an adapter's fixed tensors, what a prior has learned, and the
# tensors of a guide that is more than a point.
_FIXED, _LEARNED, _GUIDE = "fixed.", "tau.", "guide."


@dataclass
class SavedRun:
    """What a fit left, as the objects that it had.

    Attributes:
        folder: the run folder.
        config: the configuration of the fit, with the device on which the run was opened.
        fitted: the model and its guide at the stored state.
        data: the documents, split as in ``split.json``.
        metrics: what ``metrics.json`` holds.
        posterior_config: the options of the posterior fit, None for a MAP fit; ``config`` is then that of the MAP fit around
            which it was made.
        adapted: its tasks were adapted from another fit, of which ``config`` is; Θ and τ are that one's.
    """

    folder: RunFolder
    config: MapFitConfig
    fitted: Fitted
    data: TaskData
    metrics: dict[str, Any]
    posterior_config: PosteriorFitConfig | None = None
    adapted: bool = False

    def posterior(self, *, seed: int = 0) -> Posterior:
        """The run's posterior, to draw and to predict from.

        Raises:
            InputError: the run is a point estimate.
        """
        if self.is_point:
            how = (
                "adapt with --guide normal"
                if self.adapted
                else f"fit one around it with scripts/posterior_fit.py {self.folder.path}"
            )
            raise InputError(f"the run in {self.folder.path} is a point estimate and has no posterior; {how}")
        return Posterior(self.fitted, seed=seed)

    @property
    def is_point(self) -> bool:
        """Whether the run is a point estimate, MAP, and no posterior."""
        return isinstance(self.fitted.guide, AutoDelta)

    @property
    def scores(self) -> list[dict[str, Any]]:
        """What ``metrics.json`` holds of each task, in the order of the tasks."""
        return list(self.metrics["tasks"].values())


def load_run(path: str | Path, *, device: str = "auto", trust_remote_code: bool = False) -> SavedRun:
    """Read a finished run back.

    Args:
        path: the run folder, a fit's ``output_dir``.
        device: where the model goes; the fit may have been on another one.
        trust_remote_code: let a base model that brings code of its own run it; that the fit was allowed to says nothing here,
            for a run folder may come from anybody.

    Raises:
        InputError: no run, an unfinished one, or a damaged one; a base model or documents that are gone or have changed, or a
            base model with code that is not to run.
    """
    folder = RunFolder.open(path)
    metrics = read_metrics(folder)
    tensors, metadata = folder.load_tensors("posterior"), folder.load_metadata("posterior")
    given = metadata.get("prior") == GIVEN
    config, posterior = _read_config(folder) if not given else (_read_adaptation(folder), None)
    # a device that is named holds all of the model
    device_map = config.device_map if device == "auto" else None
    config = dataclasses.replace(config, device=device, device_map=device_map, threads=None, trust_remote_code=trust_remote_code)
    if metadata.get("guide") not in GUIDES:
        raise InputError(
            f"the run in {folder.path} was fitted with guide {metadata.get('guide')!r}; known are {', '.join(GUIDES)}"
            f"{nearest(str(metadata.get('guide')), GUIDES)}"
        )
    prior = _given(tensors, metadata.get("penalty", "normal")) if given else None
    model, data = build_run(config, quiet=True, split_record=folder.read_split(), prior=prior)
    if posterior is not None and posterior.tau != FIXED:
        sampled_tau(model, posterior.tau)
    check_data(folder, data, metrics, metadata)
    check_same(metadata, data, model.backbone, what=f"the posterior in {folder.path}", remedy="fit again")
    guide = _restored(folder, model, tensors, metadata["guide"])
    _check_model(folder, model, metadata)
    fitted = Fitted(
        model,
        guide,
        data.tasks,
        history=folder.read_log(),
        best_epoch=metrics.get("best_epoch") or 0,
        validation_perplexity=metrics.get("validation_perplexity"),
        seconds=metrics.get("fit_seconds") or 0.0,
        documents=data.train.documents_per_task,
        chat_template=data.chat_template,
    )
    return SavedRun(folder, config, fitted, data, metrics, posterior, adapted=given)


def _read_config(folder: RunFolder) -> tuple[MapFitConfig, PosteriorFitConfig | None]:
    """The configuration of the MAP fit, and that of the posterior around it; younger keys than the run have their defaults."""
    fit = folder.path / FIT
    try:
        if not fit.is_file():
            return parse_config(MapFitConfig, ["--config", str(folder.path / CONFIG)]), None
        posterior = parse_config(PosteriorFitConfig, ["--config", str(folder.path / CONFIG)])
        return parse_config(MapFitConfig, ["--config", str(fit)]), posterior
    except InputError as error:
        raise InputError(str(error).removeprefix("--config ")) from None


def _read_adaptation(folder: RunFolder) -> MapFitConfig:
    """The configuration of the fit that tasks were adapted from, with the documents of the new tasks."""
    try:
        config = parse_config(MapFitConfig, ["--config", str(folder.path / FIT)])
        new = parse_config(AdaptConfig, ["--config", str(folder.path / CONFIG)])
    except InputError as error:
        raise InputError(str(error).removeprefix("--config ")) from None
    data: dict[str, Any] = {name: getattr(new, name) for name in ("data", *NEW_DOCUMENTS)}
    limits: dict[str, Any] = {
        "token_budget": new.token_budget,
        "num_tasks": None,
        "max_eval_documents": None,
        "streaming": False,
        "task_weights": None,
    }
    return dataclasses.replace(config, **data, **limits)


def _given(tensors: dict[str, Tensor], penalty: str) -> Given:
    """The prior of new tasks, as their run folder has it."""
    means = {name.removeprefix(MEAN): value for name, value in tensors.items() if name.startswith(MEAN)}
    precisions = {name: tensors[f"{_LEARNED}{name}"] for name in means if f"{_LEARNED}{name}" in tensors}
    return Given(means, precisions, penalty=penalty)


def sampled_tau(model: BoRA, hyperprior: str, fitted: Fitted | None = None) -> dict[str, Tensor]:
    """Give a model a prior whose τ is a random variable, and the sites of a fit under it: θ and Θ as they were, τ begun there.

    Args:
        model: the BoRA model, whose prior is replaced; what an adapter shares stays shared.
        hyperprior: as for :class:`~bora_pyro.priors.RandomPrecision`.
        fitted: the fit under the former prior; its τ, by latent (by layer where it varies so), is where the new one begins.

    Raises:
        InputError: the fit has independent tasks, or one adapter for all: there is no τ to be unsure of.
    """
    precisions: dict[str, Tensor] = {}
    theta, mean = ({}, {}) if fitted is None else fitted.weights()
    for name, start in model.starts.items() if fitted is not None else ():
        tau = model.prior.precision(name, start, fitted.sites() if fitted else None)
        if name.rpartition(".")[-1] not in model.adapter.shared:
            if not bool(((tau > 0) & tau.isfinite()).all()):
                raise InputError(
                    f"tau of the fit is {tau.flatten()[0].item():g}, a limit: there is none to be unsure of; use --tau fixed"
                )
            precisions[name] = tau.log().mean().exp()
    model.prior = with_shared(RandomPrecision(hyperprior), model.adapter.shared)
    sites = model.sites_given(theta, mean) if fitted is not None else {}
    for name, tau in precisions.items():
        sites[f"precision.{name}"] = tau
        sites[f"theta.{name}_decentered"] = tau.sqrt() * (theta[name] - mean[name])
    return sites


def _restored(folder: RunFolder, model: BoRA, tensors: dict[str, Tensor], kind: str) -> AutoGuide:
    """The guide at the stored values of the sample sites; the adapter's and the prior's own tensors are put back as well."""
    fixed, learned, state, sites = (
        {name: value.to(model.backbone.device) for name, value in tensors.items() if _group(name) == group}
        for group in (_FIXED, _LEARNED, _GUIDE, "")
    )
    with torch.no_grad(), poutine.seed(rng_seed=0):
        # a prior that learns makes its tensors when it is first sampled
        trace = prune_subsample_sites(poutine.trace(model.weights).get_trace())
        own = {name: value for name, value in model.prior.state().items() if _group(name) == _LEARNED}
        _check_shapes(folder, {f"{_FIXED}{name}": value for name, value in model.fixed.items()}, fixed)
        _check_shapes(folder, own, _finite_where_shared(learned) if isinstance(model.prior, Given) else learned)
        _check_shapes(folder, {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}, sites)
        _check_values(folder, model, trace, learned | sites)
        model.fixed |= {name.removeprefix(_FIXED): value for name, value in fixed.items()}
        model.prior.load_state(learned)
        guide = GUIDES[kind](model, sites)
        make_parameters(guide, model)
        if kind != "map":
            _check_shapes(folder, {f"{_GUIDE}{name}": value for name, value in guide.state_dict().items()}, state)
            guide.load_state_dict({name.removeprefix(_GUIDE): value for name, value in state.items()})
    return guide


def _finite_where_shared(learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a given prior has, as finite as what is learned: the τ of latents that tasks share is infinite, and rightly so."""
    return {
        name: value if name.startswith(MEAN) or not value.is_floating_point() else value.masked_fill(value == math.inf, 1.0)
        for name, value in learned.items()
    }


def _group(name: str) -> str:
    """The beginning of a tensor's name that says whose it is; empty for a sample site."""
    return next((group for group in (_FIXED, _LEARNED, _GUIDE) if name.startswith(group)), "")


def _check_shapes(folder: RunFolder, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    what, remedy = f"the posterior in {folder.path}", "run the fit again, or restore its config.yaml"
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(f"{what} has no {missing[0]!r}, which its config.yaml asks for; {remedy}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise InputError(
            f"{what} has {unknown[0]!r}, which its config.yaml does not ask for{nearest(unknown[0], expected)}; {remedy}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise InputError(f"{what} has {name!r} of shape {tuple(found[name].shape)}, expected {tuple(value.shape)}; {remedy}")
        if found[name].dtype != value.dtype:
            given, expected_type = (str(tensor.dtype).removeprefix("torch.") for tensor in (found[name], value))
            raise InputError(f"{what} has {name!r} of type {given}, expected {expected_type}; {remedy}")
        if problem := not_a_number(found[name]):
            raise InputError(f"{what} has {name!r} with {problem}; {remedy}")


def _check_values(folder: RunFolder, model: BoRA, trace: poutine.Trace, found: dict[str, Tensor]) -> None:
    """Refuse a τ that is no precision, and a site outside the support of its distribution."""
    for name, value in found.items():
        if name in trace.nodes:
            valid = trace.nodes[name]["fn"].support.check(value)
        elif name.startswith(MEAN):
            continue
        else:  # τ: what is learned is never 0, what is given may be
            valid = value >= 0 if isinstance(model.prior, Given) else value > 0
        if not bool(valid.all()):
            raise InputError(
                f"the posterior in {folder.path} has {name!r} with values that it cannot have (the least is {value.min():g}); "
                "run the fit again"
            )


def _check_model(folder: RunFolder, model: BoRA, metadata: dict[str, str]) -> None:
    """Refuse a posterior of another model than its configuration asks for, where the shapes are the same."""
    asked = _without_learned(repr(model))
    found = _without_learned(metadata.get("model", asked))  # older runs may not say it
    if found != asked:
        raise InputError(
            f"the posterior in {folder.path} is of {found[:200]}, its config.yaml asks for {asked}; "
            "restore its config.yaml, or run the fit again"
        )


def _without_learned(model: str) -> str:
    """A model as it prints itself, but for what a fit finds out or begins from: it may be rounded otherwise elsewhere."""
    return re.sub(r"(LearnedPrecision\(per='\w+'|Given\(\d+ latents), [^)]*\)", r"\1)", model)
