"""Build the model and the data that a configuration describes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from bora_pyro.adapters import ADAPTERS, Adapter
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.sharding import shard_base
from bora_pyro.backbone.texts import check_token_ids
from bora_pyro.data import ByRecord, DataOptions, TaskData, load_tasks
from bora_pyro.data.splitters import Splitter
from bora_pyro.data.tables import check_source
from bora_pyro.errors import InputError
from bora_pyro.exchange.save import check_exportable
from bora_pyro.inference.callbacks import load_states
from bora_pyro.inference.continuation import Continuation
from bora_pyro.inference.processes import Processes
from bora_pyro.likelihoods import LIKELIHOODS, Likelihood
from bora_pyro.model import BoRA
from bora_pyro.options.field import part_of
from bora_pyro.options.members import build_member
from bora_pyro.priors import PRIORS, GroupedNormal, LearnedPrecision, Prior, prior_from_tau, with_shared
from bora_pyro.routers import GATED_ROUTERS, ROUTERS
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.device import find_device
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.plan import Plan
from bora_pyro.runs.progress import print_data
from bora_pyro.runs.start import Start, begin_at, read_start, stored_start

__all__ = ["build", "build_run", "find_device"]


def build(plan: Plan) -> tuple[BoRA, TaskData, Continuation, Start | None]:
    """Build the model and the data of a fit, and check the checkpoint that it continues from.

    Args:
        plan: the plan of the fit.

    Returns:
        The model before the fit, the data, the place of the checkpoints (``fit`` does not check the checkpoint again), and the
        adapter that the fit starts from, if there is one.

    Raises:
        InputError: something in the configuration or the data cannot be used, or the checkpoint belongs to another fit.
    """
    split = None if plan.standing.split is None else ByRecord(plan.standing.split)
    model, data = build_run(plan.config, quiet=plan.quiet, split=split, team=plan.team, device=plan.device)
    if plan.config.export_adapters:
        check_can_export(model.backbone)
    if plan.standing.checkpoint is not None:  # an adapter that refuses it does so before anything is written
        load_states(model.adapter.callbacks(), plan.standing.checkpoint.group("callbacks"))
    start = begin(plan.config, model, data, folder=plan.folder if plan.config.resume else None, quiet=plan.quiet)
    checkpoints = plan.standing.continuation(plan.folder, data, model.backbone, plan.options, processes=plan.team.size)
    return model, data, checkpoints, start


def build_run(
    config: MapFitConfig,
    *,
    quiet: bool = False,
    split: Splitter | None = None,
    team: Processes | None = None,
    prior: Prior | None = None,
    device: torch.device | None = None,
    seed: int | None = None,
    new_tasks: bool = False,
    least_tasks: int = 2,
    regroup: Callable[[TaskData], TaskData] | None = None,
) -> tuple[BoRA, TaskData]:
    """Build the model before the fit, and the tokenised data.

    Args:
        config: the checked configuration.
        quiet: show no notes.
        split: the way to split, for example by the record of an earlier run; default: as the configuration says.
        team: the processes of the fit. They share the layers of the base model if the configuration asks for it. Without them
            this process loads the whole base model.
        prior: replaces the prior of the configuration.
        device: the device, if it is known already; default: that of the configuration.
        seed: seed of the adapter's start; default: that of the configuration. New tasks have the adapter of the fit that they
            were adapted from.
        new_tasks: the tasks are not those of the fit; options of the adapter that name tasks name others.
        least_tasks: the least number of tasks in the data.
        regroup: what makes the tasks of the fit of those in the data; default: they are the same.

    Raises:
        InputError: something in the configuration or the data cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.router in GATED_ROUTERS:
        raise InputError(
            f"router {config.router} is fitted to the adapters of a finished run; fit that, then give it to bora route-fit"
        )
    check_source(config.data)  # before a base model is downloaded for documents that do not exist
    likelihood = _likelihood(config)
    backbone = _load_backbone(config, device, team)
    reading: dict[str, Any] = {"reads_options": likelihood.reads_options, "least_tasks": least_tasks, "regroup": regroup}
    data = _load_data(config, backbone, split, **reading, quiet=quiet)
    adapter = adapter_of(config).for_tasks(None if new_tasks else data.tasks)
    router = build_member("router", ROUTERS, config.router, config.router_option or (), usual={"tasks": len(data.tasks)})
    model = BoRA(
        backbone,
        len(data.tasks),
        adapter=adapter,
        prior=prior or with_shared(_prior(config, data.task_groups, least_tasks), (*adapter.shared, *router.shared)),
        likelihood=likelihood.with_task_weights(data.task_weights),
        router=router,
        seed=config.seed if seed is None else seed,
    )
    return model, data


def build_without_documents(config: MapFitConfig) -> BoRA:
    """Build the model of one task, for a server that has no documents: it has the adapter's start and the prior.

    Args:
        config: the checked configuration. Its options of the documents are not read.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone, adapter = _load_backbone(config, None, None), adapter_of(config)
    return BoRA(
        backbone,
        1,
        adapter=adapter,
        prior=with_shared(_prior(config, None, least_tasks=1), adapter.shared),
        likelihood=_likelihood(config),
        router=build_member("router", ROUTERS, config.router, config.router_option or (), usual={"tasks": 1}),
        seed=config.seed,
    )


def adapter_of(config: MapFitConfig) -> Adapter:
    """The adapter of a configuration, before it knows the tasks.

    Raises:
        InputError: there is no such adapter, or its options are not allowed.
    """
    usual = {"rank": config.rank, "alpha": config.alpha}
    return build_member("adapter", ADAPTERS, config.adapter, config.adapter_option or (), usual=usual)


def begin(
    config: MapFitConfig, model: BoRA, data: TaskData, *, folder: RunFolder | None = None, quiet: bool = False
) -> Start | None:
    """Let the model begin at the adapter of ``start_from``, if one is given.

    Args:
        config: the configuration of the fit.
        model: the model; it changes.
        data: the documents; notes about the adapter are added to theirs.
        folder: the run folder of a fit that is resumed, which has a copy of the adapter.
        quiet: show no notes.

    Raises:
        InputError: the adapter does not belong to the model, or has changed since the run began.
    """
    if config.start_from is None:
        return None
    start = (None if folder is None else stored_start(folder, model)) or read_start(config.start_from, model)
    begin_at(model, start, config)
    data.notes.extend(start.notes)
    for note in () if quiet else start.notes:
        print(f"note: {note}", file=sys.stderr)
    return start


def check_can_export(backbone: Backbone) -> None:
    """Check before a fit that its adapters can be written as PEFT folders, so that nobody learns it when the fit is done.

    Raises:
        InputError: PEFT would read the folders otherwise; the message names the layers and what to do.
    """
    try:
        check_exportable(backbone)
    except InputError as error:
        raise InputError(f"{error}, or give --export_adapters false and export merged bases (export-adapters --merged)") from None


def _likelihood(config: MapFitConfig) -> Likelihood:
    usual = {"unit": config.likelihood_unit} | ({} if config.option_score is None else {"option_score": config.option_score})
    return build_member("likelihood", LIKELIHOODS, config.likelihood, config.likelihood_option or (), usual=usual)


def _prior(config: MapFitConfig, task_groups: list[str] | None, least_tasks: int = 2) -> Prior:
    prior = _prior_of(config, task_groups)
    if least_tasks < prior.least_tasks:  # the other tasks that share it are elsewhere
        prior.least_tasks = least_tasks
    return prior


def _prior_of(config: MapFitConfig, task_groups: list[str] | None) -> Prior:
    if config.prior is not None:
        return build_member("prior", PRIORS, config.prior, config.prior_option or (), usual={"groups": task_groups})
    if task_groups is not None:
        tau, tau_group = (None if isinstance(value, str) else float(value) for value in (config.tau, config.tau_group))
        return GroupedNormal(task_groups, tau, tau_group, per=config.tau_per, start=config.tau_start)
    if isinstance(config.tau, str):
        return LearnedPrecision(config.tau_per, config.tau_start)
    return prior_from_tau(config.tau, config.prior_form, penalty=config.penalty)


def _load_backbone(config: MapFitConfig, device: torch.device | None, team: Processes | None) -> Backbone:
    sharded = config.shard_base and team is not None
    if sharded and team is not None and team.size == 1:
        raise InputError("shard_base is true, but there is one process; start several with torchrun, or leave it out")
    device = device or find_device(config.device)
    backbone = Backbone.from_pretrained(
        config.base_model,
        targets=config.targets,
        layers=config.layers,
        precision=getattr(torch, config.precision),
        device="cpu" if sharded else device,
        quantization=config.quantization,
        device_map=config.device_map,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
    if sharded and team is not None:
        shard_base(backbone, device)
        team.sharded_base = True
    return backbone


def _load_data(
    config: MapFitConfig,
    backbone: Backbone,
    split: Splitter | None,
    *,
    reads_options: bool,
    least_tasks: int,
    regroup: Callable[[TaskData], TaskData] | None,
    quiet: bool,
) -> TaskData:
    options, notes = part_of(config, DataOptions), list(backbone.notes)
    if not reads_options:  # the options then only serve the accuracy (`questions`)
        options.options_column = None
    if backbone.context is not None and options.max_tokens > backbone.context:
        notes.append(f"max_tokens {options.max_tokens} is more than the base model reads; {backbone.context} is used")
        options.max_tokens = backbone.context
    assert backbone.tokenizer is not None
    how: dict[str, Any] = {"split": split, "task_weights": config.task_weights, "least_tasks": least_tasks}
    data = load_tasks(config.data, backbone.tokenizer, options, **how)
    data = data if regroup is None else regroup(data)
    check_token_ids(backbone, data.train, data.validation, data.test)
    data.notes[:0] = notes
    if not quiet:
        print_data(data)
    return data
