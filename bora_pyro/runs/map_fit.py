"""One MAP fit from a configuration to a run folder: what ``scripts/map_fit.py`` does.

>>> from bora_pyro.runs.config.map_fit import MapFitConfig
>>> config = MapFitConfig(output_dir="runs/speeches", tau=1000, epochs=4)
>>> metrics = run_map_fit(config)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.data.chat import load_chat_template, same_chat_template
from bora_pyro.errors import InputError, shown
from bora_pyro.inference.memory import estimate_memory, resident_bytes
from bora_pyro.inference.processes import is_first, processes
from bora_pyro.runs.build import build_run, find_device
from bora_pyro.runs.checks import stored_result
from bora_pyro.runs.config.map_fit import DATA, MODEL, PRIOR, MapFitConfig
from bora_pyro.runs.fitting import FIT_OPTIONS, fit_into, resumes, start_tracking
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results import metrics_of, write_adapters, write_posterior
from bora_pyro.runs.resume import Standing, resume, say_nothing_is_left
from bora_pyro.runs.trackers import check_packages


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
        config, standing = resume(config)
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


def _create_folder(config: MapFitConfig, data: TaskData, standing: Standing) -> RunFolder:
    folder = RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=bool(config.resume))
    folder.remove_metrics()
    if standing.steps_left:
        # how the run came to its folder is no part of it: read back, its configuration neither deletes nor resumes anything
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False, "resume": False})
    if standing.split is None:
        folder.write_split(data.split_record)
    return folder


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
