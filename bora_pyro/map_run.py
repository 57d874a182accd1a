"""One MAP fit from a configuration to a run folder: what ``scripts/map_fit.py`` does.

>>> from bora_pyro.config import MapFitConfig
>>> config = MapFitConfig(output_dir="runs/speeches", tau=1000, epochs=4)
>>> metrics = run_map_fit(config)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bora_pyro.adapters import ADAPTERS, Adapter
from bora_pyro.backbone import Backbone
from bora_pyro.config import AUTO, DATA, MODEL, PRIOR, MapFitConfig
from bora_pyro.data import TaskData, load_tasks
from bora_pyro.data.chat import load_chat_template, same_chat_template
from bora_pyro.data.tables import check_source
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.fit import FitStopped, fit
from bora_pyro.fitted import Fitted
from bora_pyro.likelihoods import CausalLM
from bora_pyro.memory import estimate_memory, resident_bytes
from bora_pyro.model import BoRA
from bora_pyro.priors import LearnedPrecision, Prior, prior_from_tau, with_shared
from bora_pyro.processes import Processes, is_first, processes
from bora_pyro.progress import Progress
from bora_pyro.resuming import Standing, say_nothing_is_left, take_up
from bora_pyro.run_checks import stored_result
from bora_pyro.run_folder import RunFolder
from bora_pyro.run_results import metrics_of, write_adapters, write_posterior
from bora_pyro.sharded_base import shard_base
from bora_pyro.signals import StopSignals
from bora_pyro.trackers import Tracking, check_packages, track

#: Options of a configuration that ``fit`` takes by the same name.
FIT_OPTIONS = (
    "epochs", "warmup", "token_budget", "accumulate", "gradient_clip", "patience", "seed", "checkpoint_every",
    "checkpoint_minutes", "keep_checkpoints", "task_subsampling", "task_memory",
)  # fmt: skip
#: Options of a configuration that ``load_tasks`` takes by the same name.
DATA_OPTIONS = (
    "task_column", "text_column", "prompt_column", "completion_column", "messages_column", "chat_template", "group_column",
    "split_column", "streaming", "num_tasks", "long_documents", "max_train_documents", "max_eval_documents", "seed",
    "small_tasks", "task_weights",
)  # fmt: skip


class RunStopped(Exception):
    """A run was stopped by a signal, its state saved; ``exit_code`` is what a shell expects of such a program."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_map_fit(config: MapFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load, fit, evaluate, and leave a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        What ``metrics.json`` holds; nothing in other processes than the first of several.

    Raises:
        InputError: something in the configuration or the data cannot be used. Nothing is written before the data, the
            base model and the options have been found to fit together.
        RunStopped: Ctrl-C or SIGTERM has come; the state of the fit is saved.
    """
    # a run keeps the template itself: its file may be edited, or stay behind
    template = load_chat_template(config.chat_template)
    config = dataclasses.replace(config, resume=resumes(config.output_dir, config.resume), chat_template=template)
    RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=bool(config.resume))
    check_packages(config.trackers)
    standing = Standing()
    if config.resume:
        _check_same_fit(config, RunFolder.open(config.output_dir).read_config())
        config, standing = take_up(config)
    device, quiet = find_device(config.device), quiet or not is_first()
    process = resident_bytes(device)
    with processes(device) as team:
        model, data = build_run(config, quiet=quiet, team=team, split_record=standing.split)
        standing.check(data, model.backbone, config, processes=team.size)
        if not standing.steps_left:
            if not quiet:
                say_nothing_is_left(standing)
            stored = stored_result(RunFolder(Path(config.output_dir)), data)
            if stored is not None and standing.split is not None:
                return {} if team.rank else stored
        memory = estimate_memory(
            model,
            data,
            token_budget=config.token_budget,
            task_subsampling=config.task_subsampling,
            task_memory=config.task_memory,
            accumulate=config.accumulate,
            processes=team.size,
            process=process,
        )
        if not quiet:
            print(f"memory: {memory}", file=sys.stderr)
        rate = config.learning_rate * (float(config.tau) if config.scale_learning_rate_with_tau else 1.0)
        with (
            team.first(lambda: _create_folder(config, data, standing)) or RunFolder(Path(config.output_dir)) as folder,
            start_tracking(config, folder, quiet=quiet) as tracking,
        ):
            options = {name: getattr(config, name) for name in FIT_OPTIONS} | {"learning_rate": rate, "processes": team}
            if not standing.steps_left:
                options["epochs"] = standing.epochs
            fitted = fit_into(folder, model, data, quiet=quiet, tracking=tracking, **options)
            if team.rank:
                fitted.help_evaluate(data.test, team)
                return {}
            write_adapters(folder, fitted, config.base_model)
            write_posterior(folder, fitted, data, "map")
            metrics = metrics_of(config, fitted, data, processes=team) | {"predicted_memory_bytes": memory.total}
            tracking.conclude(metrics, fitted.history)
            folder.write_metrics(metrics)
    return metrics


def resumes(output_dir: str, resume: bool | str) -> bool:
    """Whether a fit goes on with the run in its folder: as it is told, and with ``auto`` where there is one."""
    return RunFolder.holds_run(output_dir) if resume == AUTO else bool(resume)


def _create_folder(config: MapFitConfig, data: TaskData, standing: Standing) -> RunFolder:
    folder = RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=bool(config.resume))
    folder.remove_metrics()
    if standing.steps_left:
        # how the run came to its folder is no part of it: read back, its configuration neither deletes nor resumes anything
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False, "resume": False})
    if standing.split is None:
        folder.write_split(data.split_record)
    return folder


def build_run(
    config: MapFitConfig,
    *,
    quiet: bool = False,
    split_record: Mapping[str, Any] | None = None,
    team: Processes | None = None,
    prior: Prior | None = None,
) -> tuple[BoRA, TaskData]:
    """The model and the tokenised data that a configuration describes, nothing fitted yet.

    Args:
        config: the checked configuration.
        quiet: show no notes.
        split_record: split as an earlier run's ``split.json`` says, instead of anew.
        team: the processes of the fit, which hold the base in parts where the configuration says so; a run that is read holds
            it whole.
        prior: instead of the configuration's.

    Raises:
        InputError: something in the configuration or the data cannot be used.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_source(config.data)  # before a base is fetched for documents that are not there
    sharded = config.shard_base and team is not None
    if sharded and team is not None and team.size == 1:
        raise InputError("shard_base is true, but there is one process; start several with torchrun, or leave it out")
    backbone = Backbone.from_pretrained(
        config.base_model,
        targets=config.targets,
        precision=getattr(torch, config.precision),
        device="cpu" if sharded else find_device(config.device),
        quantization=config.quantization,
        device_map=config.device_map,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
    if sharded and team is not None:
        shard_base(backbone, find_device(config.device))
        team.lockstep = True
    data = _load_data(config, backbone, quiet=quiet, split_record=split_record)
    adapter = _adapter(config)
    model = BoRA(
        backbone,
        len(data.tasks),
        adapter=adapter,
        prior=prior or with_shared(_prior(config), adapter.shared),
        likelihood=CausalLM(config.likelihood_unit, task_weights=data.task_weights),
        seed=config.seed,
    )
    return model, data


def _check_same_fit(config: MapFitConfig, stored: dict[str, Any]) -> None:
    """Refuse to go on with a run on other data, another model or another prior; how it is optimised may change."""
    if same_chat_template(config.chat_template, stored.get("chat_template")):  # older runs have the name of its file
        stored = stored | {"chat_template": config.chat_template}
    for field in dataclasses.fields(config):
        if field.metadata["line_only"]:
            continue
        name, value = field.name, getattr(config, field.name)
        if (field.metadata["group"] in (DATA, MODEL, PRIOR) or name == "seed") and value != stored.get(name, value):
            raise InputError(
                f"{name} is {shown(value, characters=300)}, but the run in {config.output_dir} has "
                f"{shown(stored[name], characters=300)}; resume it with "
                f"--config {config.output_dir}/config.yaml --resume true, or give another --output_dir"
            )


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator where there is one.

    Raises:
        InputError: torch has no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if ":" not in name and name != "cpu" and "LOCAL_RANK" in os.environ:
        name = f"{name}:{os.environ['LOCAL_RANK']}"  # a device for each process of this machine
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fewer = ", or start fewer processes" if "LOCAL_RANK" in os.environ else ""
        raise InputError(f"device {name!r} is not available here; use --device auto, or --device cpu{fewer}") from error
    return torch.device(name)


def _adapter(config: MapFitConfig) -> Adapter:
    if config.adapter not in ADAPTERS:
        raise InputError(
            f"adapter {config.adapter!r} is not known; it is one of {', '.join(ADAPTERS)}{nearest(config.adapter, ADAPTERS)}"
        )
    return ADAPTERS[config.adapter](rank=config.rank, alpha=config.alpha)


def _prior(config: MapFitConfig) -> Prior:
    if isinstance(config.tau, str):
        return LearnedPrecision(config.tau_per, config.tau_start)
    return prior_from_tau(config.tau, config.prior_form, penalty=config.penalty)


def _load_data(config: MapFitConfig, backbone: Backbone, *, quiet: bool, split_record: Mapping[str, Any] | None) -> TaskData:
    max_tokens, notes = config.max_tokens, []
    if backbone.context is not None and max_tokens > backbone.context:
        notes.append(f"max_tokens {max_tokens} is more than the base model reads; {backbone.context} is used")
        max_tokens = backbone.context
    assert backbone.tokenizer is not None
    data = load_tasks(
        config.data,
        backbone.tokenizer,
        max_tokens=max_tokens,
        split_record=split_record,
        **{name: getattr(config, name) for name in DATA_OPTIONS},
    )
    data.notes[:0] = notes
    if not quiet:
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
    return data


def start_tracking(config: Any, folder: RunFolder, *, quiet: bool) -> Tracking:
    """The trackers that a configuration names, in the first process; none in the others."""
    names = config.trackers if is_first() else None
    return track(names, folder.path, folder.read_config() if names else {}, resume=config.resume, quiet=quiet)


def fit_into(
    folder: RunFolder, model: BoRA, data: TaskData, *, quiet: bool, tracking: Tracking | None = None, **options: Any
) -> Fitted:
    """Fit with a progress bar, a line of ``metrics.jsonl`` an epoch, and checkpoints; ``options`` are those of ``fit``."""
    bar, tracking = Progress(0, epochs=options.get("epochs"), enabled=not quiet), tracking or Tracking()

    def show(report: dict[str, Any]) -> None:
        bar.total_steps = int(report["total"])
        bar.update(
            int(report["step"]),
            loss=report["loss"],
            tokens_per_second=report["training_tokens_per_second"],
            epoch=int(report["epoch"]),
            validation_perplexity=report.get("validation_perplexity"),
            tau=_newest_tau(model, report),
        )

    def step(report: dict[str, Any]) -> None:
        tracking.step(report)
        show(report)

    def record(report: dict[str, Any]) -> None:
        if is_first():
            folder.cut_log(int(report["epoch"]) - 1)
            folder.log(report)
        tracking.epoch(report)
        show(report)

    with bar, StopSignals(quiet=quiet or not is_first()) as stop:
        try:
            fitted = fit(model, data, checkpoints=folder.checkpoints, stop=stop, on_step=step, on_epoch=record, **options)
        except FitStopped as stopped:
            raise RunStopped(f"{stopped}; go on with --resume true", stop.exit_code) from None
        team = options.get("processes")
        if stop() and (team is None or team.size == 1):  # of several, each would have to know of it
            raise RunStopped("stopped after the last step; --resume true evaluates what was fitted", stop.exit_code)
        return fitted


def _newest_tau(model: BoRA, report: Mapping[str, Any]) -> float | None:
    """The learned τ that was newest at a step, its geometric mean as ``Fitted.tau`` has it; None where none is learned."""
    if not (path := report.get("tau_path")):
        return None
    sizes = {name: model.starts[name].numel() for name in path[-1]["tau"]}
    taus = {name: value if isinstance(value, list) else [value] for name, value in path[-1]["tau"].items()}
    logs = (sizes[name] * sum(map(math.log, values)) / len(values) for name, values in taus.items())
    return math.exp(sum(logs) / sum(sizes.values()))
