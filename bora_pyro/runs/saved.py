"""Read a finished run back: the fitted model with its guide, and the data with the split of the run.

    >>> import tempfile
    >>> from bora_pyro.runs.map_fit import run_map_fit
    >>> options = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2, "epochs": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metrics = run_map_fit(MapFitConfig(output_dir=f"{folder}/run", **options), quiet=True)
    ...     run = load_run(f"{folder}/run")
    >>> abs(run.fitted.evaluate(run.data.test)["test_perplexity"] / metrics["test_perplexity"] - 1) < 1e-6
    True

The base model and the documents are not in the run folder. They are read from the places that ``config.yaml`` names.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from bora_pyro.data import ByRecord, TaskData
from bora_pyro.errors import InputError, nearest
from bora_pyro.files.tensors import not_a_number
from bora_pyro.guides import GUIDES, GuideBuilder, ensemble_guide, guide_options, make_parameters
from bora_pyro.inference.continuation import check_same
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.route_fit import routed_model
from bora_pyro.model import BoRA
from bora_pyro.predict.posterior import Posterior
from bora_pyro.priors import FrozenAdapters, Given, RandomPrecision, with_shared
from bora_pyro.priors.frozen import GIVEN as FROZEN
from bora_pyro.priors.given import MEAN
from bora_pyro.runs.added_tasks import read_additions, with_additions
from bora_pyro.runs.build import build_run
from bora_pyro.runs.checks import check_data, read_metrics
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.federated import FederatedConfig, FederationOptions
from bora_pyro.runs.config.federated_client import FederatedClientConfig
from bora_pyro.runs.config.groups import CENTRE
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.meta_fit import MetaFitConfig
from bora_pyro.runs.config.posterior_fit import FIXED, PosteriorFitConfig
from bora_pyro.runs.config.reward_fit import RewardFitConfig
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.description import is_described
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.kinds import ADAPTATION, AROUND_A_FIT, KINDS, kind_of
from bora_pyro.runs.layout import CONFIG, FIT
from bora_pyro.runs.results import SAMPLE, sample_of

C = TypeVar("C")

# Prefixes of the tensors in posterior.safetensors that are no sample sites: an adapter's fixed tensors, what a prior has learned,
# and the tensors of a guide with a spread.
_FIXED, _LEARNED, _GUIDE = "fixed.", "tau.", "guide."
# Prefixes of the model's own state: buffers and masks.
_STATE = ("buffers/", "masks/")
# How far a fixed tensor that is built again may be from the one of the fit, relative to its largest number: a decomposition of a
# weight is rounded otherwise on another machine.
_TOLERANCE = 1e-3


@dataclass
class SavedRun:
    """A finished run.

    Attributes:
        folder: the run folder.
        config: the configuration of the fit, with the device on which the run was opened. For a posterior fit it is the
            configuration of the MAP fit, for an adaptation that of the fit that it began from.
        fitted: the model and its guide at the stored state.
        data: the documents, split as in ``split.json``.
        metrics: content of ``metrics.json``.
        posterior_config: the configuration of a posterior fit; None for other runs.
        meta_config: the configuration of a meta-fit, of which ``config`` is the part that a MAP fit has too; None for other runs.
        adapted: whether the tasks were adapted from another fit, whose Θ and τ are the prior.
        federated_config: the configuration of a federated fit, or of a client of one, as ``meta_config``; None for other runs.
        reward_config: the configuration of a fit from rewards, as ``meta_config``; None for other runs. Its documents are the
            prompts.
    """

    folder: RunFolder
    config: MapFitConfig
    fitted: Fitted
    data: TaskData
    metrics: dict[str, Any]
    posterior_config: PosteriorFitConfig | None = None
    meta_config: MetaFitConfig | None = None
    adapted: bool = False
    federated_config: FederationOptions | None = None
    reward_config: RewardFitConfig | None = None

    def posterior(self, *, seed: int = 0) -> Posterior:
        """The posterior of the run.

        Args:
            seed: seed of its draws.

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
        """Whether the run is a point estimate."""
        return isinstance(self.fitted.guide, AutoDelta)

    @property
    def centre(self) -> str:
        """What ``fitted.weights()`` are, in words."""
        if self.is_point:
            return "the MAP estimate"
        return "the best member" if isinstance(self.config, EnsembleConfig) else "the posterior's mean"

    @property
    def scores(self) -> list[dict[str, Any]]:
        """The numbers of each task in ``metrics.json``, in the order of the tasks."""
        return list(self.metrics["tasks"].values())


def load_run(path: str | Path, *, device: str = "auto", trust_remote_code: bool = False) -> SavedRun:
    """Read a finished run back.

    Args:
        path: the run folder, a fit's ``output_dir``.
        device: the device of the model, which may differ from that of the fit.
        trust_remote_code: let a base model run code of its own. The configuration of the run does not decide this, because a run
            folder may come from anybody.

    Raises:
        InputError: there is no run, or it is not finished or damaged; the base model or the documents are missing or have
            changed; or the base model has code that may not run.
    """
    folder = RunFolder.open(path)
    metrics = read_metrics(folder)
    tensors, metadata = folder.load_tensors("posterior"), folder.load_metadata("posterior")
    kind, guide_name = kind_of(folder), str(metadata.get("guide"))
    given, own = kind == ADAPTATION, _parsed(KINDS[kind], folder, CONFIG)
    posterior, meta = _if(own, PosteriorFitConfig), _if(own, MetaFitConfig)
    routed, federated = _if(own, RouteFitConfig), _if(own, FederationOptions)
    config = _config_of_fit(folder, kind, own)
    # a named device gets the whole model
    device_map = config.device_map if device == "auto" else None
    config = dataclasses.replace(config, device=device, device_map=device_map, threads=None, trust_remote_code=trust_remote_code)
    if guide_name not in GUIDES and not isinstance(config, EnsembleConfig):
        raise InputError(
            f"the run in {folder.path} was fitted with guide {metadata.get('guide')!r}; known are {', '.join(GUIDES)}"
            f"{nearest(guide_name, GUIDES)}"
        )
    centred = not given and routed is None and config.start_as == CENTRE
    prior = _given(tensors, config.penalty if centred else metadata.get("penalty", "normal")) if given or centred else None
    # new tasks have the adapter of the fit that they were adapted from
    seed = folder.read_config(FIT).get("seed") if given else None
    how: dict[str, Any] = {"prior": prior, "seed": seed, "new_tasks": given}
    if isinstance(federated, FederatedClientConfig):
        how["least_tasks"] = 1
    if isinstance(federated, FederatedConfig):
        how["regroup"] = federated.regroup
    model, data = build_run(config, quiet=True, split=ByRecord(folder.read_split()), **how)
    if routed is not None:
        data = with_additions(data, read_additions(folder), model.backbone)
        adapters = FrozenAdapters.from_state(tensors, scale=routed.with_gates().gate_scale or 1.0)
        _check_adapters(folder, model, adapters, num_tasks=data.num_tasks)
        model = routed_model(model, adapters, routed.build_router(), likelihood=routed.build_likelihood())
    if posterior is not None and posterior.tau != FIXED:
        sampled_tau(model, posterior.tau)
    check_data(folder, data, metrics, metadata)
    check_same(metadata, data, model.backbone, what=f"the posterior in {folder.path}", remedy="fit again")
    build_guide: GuideBuilder
    if isinstance(config, EnsembleConfig):
        build_guide = partial(ensemble_guide, members=config.members)
    else:
        options: Sequence[str] = () if posterior is None else posterior.guide_option or ()
        options = options if meta is None else [f"positivity={meta.positivity}"]
        build_guide = partial(GUIDES[guide_name], **guide_options(guide_name, options))
    guide = _restored(folder, model, tensors, build_guide)
    _check_model(folder, model, metadata)
    fitted = Fitted(
        model,
        guide,
        data.tasks,
        history=folder.read_log(),
        best_epoch=metrics.get("best_epoch") or 0,
        averaged=bool(metrics.get("averaged")),
        validation_score=metrics.get(measure := f"validation_{model.likelihood.measure.name}"),
        global_mean_score=metrics.get(f"{measure}_global_mean"),
        seconds=metrics.get("fit_seconds") or 0.0,
        documents=data.train.documents_per_task,
        chat_template=data.chat_template,
    )
    others: dict[str, Any] = {"federated_config": federated, "reward_config": _if(own, RewardFitConfig)}
    return SavedRun(folder, config, fitted, data, metrics, posterior, meta, adapted=given, **others)


def _config_of_fit(folder: RunFolder, kind: str, own: Any) -> MapFitConfig:
    """The configuration of the fit. Options that are newer than the run have their defaults."""
    if kind == ADAPTATION:
        return _read_adaptation(folder, own)
    if kind in AROUND_A_FIT:
        return _parsed(MapFitConfig, folder, FIT)
    config: MapFitConfig = own if isinstance(own, MapFitConfig) else own.map_fit
    return config


def _if(config: Any, cls: type[C]) -> C | None:
    """A configuration, if it is one of a class."""
    return config if isinstance(config, cls) else None


def _parsed(cls: type[C], folder: RunFolder, name: str) -> C:
    """The configuration in a file of a run."""
    try:
        return parse_config(cls, ["--config", str(folder.path / name)])
    except InputError as error:
        raise InputError(str(error).removeprefix("--config ")) from None


def _check_adapters(folder: RunFolder, model: BoRA, adapters: FrozenAdapters, *, num_tasks: int) -> None:
    """Check that the stored adapters are those of the model's tasks and layers."""
    found = {name: value.shape for name, value in adapters.theta.items()}
    if found != {name: (num_tasks, *start.shape) for name, start in model.starts.items()}:
        raise InputError(
            f"the adapters in {folder.path} are of other tasks, layers or ranks than its fit.yaml says; restore it, or fit again"
        )


def _read_adaptation(folder: RunFolder, new: AdaptConfig) -> MapFitConfig:
    """Configuration of the fit that the tasks were adapted from, with the documents of the new tasks."""
    config = _parsed(MapFitConfig, folder, FIT)
    limits: dict[str, Any] = {
        "token_budget": new.token_budget,
        "num_tasks": None,
        "max_eval_documents": None,
        "streaming": False,
        "task_weights": None,
        "task_group_column": None,
    }
    return dataclasses.replace(config, data=new.data, **new.documents, **limits)


def _given(tensors: dict[str, Tensor], penalty: str) -> Given:
    """The prior of new tasks, from their run folder."""
    means = {name.removeprefix(MEAN): value for name, value in tensors.items() if name.startswith(MEAN)}
    precisions = {name: tensors[f"{_LEARNED}{name}"] for name in means if f"{_LEARNED}{name}" in tensors}
    return Given(means, precisions, penalty=penalty)


def sampled_tau(model: BoRA, hyperprior: str, fitted: Fitted | None = None) -> dict[str, Tensor]:
    """Replace the prior of a model by one whose τ is a random variable.

    Args:
        model: the BoRA model. Latents that its adapter shares between tasks stay shared.
        hyperprior: see :class:`~bora_pyro.priors.RandomPrecision`.
        fitted: a fit under the former prior.

    Returns:
        The sites of the fit under the new prior: θ and Θ are unchanged, and the new τ of each latent starts at the geometric mean
        of the old one. Empty without a fit.

    Raises:
        InputError: τ of the fit is 0 or infinite, or the prior's centre is given.
    """
    if isinstance(model.prior, Given):
        raise InputError("the centre of the fit's prior is given, and a random tau needs a Theta to infer; use --tau fixed")
    if model.prior.groups:
        raise InputError(
            f"the fit has {len(model.prior.groups)} groups of tasks, which a random tau does not have; use --tau fixed"
        )
    precisions: dict[str, Tensor] = {}
    shared = (*model.adapter.shared, *model.router.shared)
    theta, mean = ({}, {}) if fitted is None else fitted.weights()
    for name, start in model.starts.items() if fitted is not None else ():
        tau = model.prior.precision(name, start, fitted.sites() if fitted else None)
        if name.rpartition(".")[-1] not in shared:
            if not bool(((tau > 0) & tau.isfinite()).all()):
                raise InputError(
                    f"tau of the fit is {tau.flatten()[0].item():g}, a limit: there is none to be unsure of; use --tau fixed"
                )
            precisions[name] = tau.log().mean().exp()
    model.prior = with_shared(RandomPrecision(hyperprior), shared)
    sites = model.sites_given(theta, mean) if fitted is not None else {}
    for name, tau in precisions.items():
        sites[f"precision.{name}"] = tau
        sites[f"theta.{name}_decentered"] = tau.sqrt() * (theta[name] - mean[name])
    return sites


def _restored(folder: RunFolder, model: BoRA, tensors: dict[str, Tensor], build_guide: GuideBuilder) -> AutoGuide:
    """The guide at the stored values of the sites. Also restores the tensors of the adapter and the prior."""
    fixed, samples, learned, state, sites = (
        {name: value.to(model.backbone.device) for name, value in tensors.items() if _group(name) == group}
        for group in (_FIXED, SAMPLE, _LEARNED, _GUIDE, "")
    )
    changed = {name: value for name, value in tensors.items() if name.startswith(_STATE)}
    _check_shapes(folder, model.tensors.state(), changed)
    model.load_state(changed)
    with torch.no_grad(), poutine.seed(rng_seed=0):
        # a prior that learns creates its tensors when it is sampled for the first time
        trace = prune_subsample_sites(poutine.trace(model.weights).get_trace())
        own = {name: value for name, value in model.prior.state().items() if _group(name) == _LEARNED}
        if not fixed:
            _check_fixed(folder, model, samples)
        else:  # older runs store the tensors themselves
            _check_shapes(folder, {f"{_FIXED}{name}": value for name, value in model.fixed.items()}, fixed)
        _check_shapes(folder, own, _finite_where_shared(learned) if isinstance(model.prior, Given) else learned)
        _check_shapes(folder, {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}, sites)
        _check_values(folder, model, trace, learned | sites)
        model.fixed |= {name.removeprefix(_FIXED): value for name, value in fixed.items()}
        model.prior.load_state(learned)
        guide = build_guide(model, sites)
        make_parameters(guide, model)
        if not isinstance(guide, AutoDelta):
            _check_shapes(folder, {f"{_GUIDE}{name}": value for name, value in guide.state_dict().items()}, state)
            guide.load_state_dict({name.removeprefix(_GUIDE): value for name, value in state.items()})
    return guide


def _check_fixed(folder: RunFolder, model: BoRA, samples: dict[str, Tensor]) -> None:
    """Check that the adapter's fixed tensors, which were built again, are those of the fit."""
    own = {f"{SAMPLE}{name}": sample_of(value) for name, value in model.fixed.items()}
    _check_shapes(folder, own, samples)
    for name, value in own.items():
        if not value.numel():
            continue
        # places of entries are whole numbers: the nearest one is another entry
        limit = _TOLERANCE * float(samples[name].abs().max()) if value.is_floating_point() else 0.0
        if not bool((value - samples[name]).abs().le(limit).all()):
            raise InputError(
                f"the fixed tensor {name.removeprefix(SAMPLE)!r} of {model.adapter} is not that of the run in {folder.path}: its "
                "seed or its base is another; restore them, or run the fit again"
            )


def _finite_where_shared(learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a given prior without infinite τ, which is allowed for latents that tasks share."""
    return {
        name: value if name.startswith(MEAN) or not value.is_floating_point() else value.masked_fill(value == math.inf, 1.0)
        for name, value in learned.items()
    }


def _group(name: str) -> str:
    """The prefix of a tensor's name; empty for a sample site."""
    if name.startswith(FROZEN):
        return _LEARNED
    return next((group for group in (_FIXED, SAMPLE, _LEARNED, _GUIDE, *_STATE) if name.startswith(group)), "")


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
    """Check that τ is a precision, and that each site is in the support of its distribution."""
    for name, value in found.items():
        if name in trace.nodes:
            valid = trace.nodes[name]["fn"].support.check(value)
        elif name.startswith((MEAN, FROZEN)):
            continue
        else:  # a learned τ is never 0, a given τ may be
            valid = value >= 0 if isinstance(model.prior, Given) else value > 0
        if not bool(valid.all()):
            raise InputError(
                f"the posterior in {folder.path} has {name!r} with values that it cannot have (the least is {value.min():g}); "
                "run the fit again"
            )


def _check_model(folder: RunFolder, model: BoRA, metadata: dict[str, str]) -> None:
    """Check that the posterior is of the model in its configuration: the shapes of two different models may be the same."""
    found = metadata.get("model", "another model")
    if "description" in metadata:
        try:
            same = is_described(model, json.loads(metadata["description"]))
        except (ValueError, RecursionError):
            same = False
    else:  # older runs store repr(model): where it includes what was learned, only its adapter can be compared
        learned = "LearnedPrecision(" in found or "Given(" in found
        same = "model" not in metadata or (f", {model.adapter}, " in found if learned else found == repr(model))
    if not same:
        raise InputError(
            f"the posterior in {folder.path} is of {found[:200]}, its config.yaml asks for {model}; "
            "restore its config.yaml, or run the fit again"
        )
