"""One MAP fit, from a configuration to a run folder.

>>> from bora_pyro.runs.config.map_fit import MapFitConfig
>>> config = MapFitConfig(output_dir="runs/speeches", tau=1000, epochs=4)
>>> metrics = run_map_fit(config)  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.inference.memory import MemoryEstimate, estimate_memory
from bora_pyro.model import BoRA
from bora_pyro.runs.build import build
from bora_pyro.runs.checks import stored_result
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.fitting import fit_into, start_tracking
from bora_pyro.runs.plan import Plan, prepare
from bora_pyro.runs.progress import latents_lines, layers_line
from bora_pyro.runs.questions import questions_of, with_accuracy
from bora_pyro.runs.results import metrics_of
from bora_pyro.runs.resume import say_nothing_is_left
from bora_pyro.runs.run import Run
from bora_pyro.runs.start import Start, write_start


def run_map_fit(config: MapFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load, fit, evaluate, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``. With several processes, only the first one returns it.

    Raises:
        InputError: something in the configuration or the data cannot be used. Nothing is written before the data, the base model
            and the options have been checked together.
        RunStopped: the process got Ctrl-C or SIGTERM; the state of the fit is saved.
    """
    with prepare(config, quiet=quiet) as plan:
        model, data, checkpoints, start = build(plan)
        config, folder, standing, team = plan.config, plan.folder, plan.standing, plan.team
        questions = [] if team.rank else questions_of(config, model.backbone, data)
        if not standing.steps_left:
            if not plan.quiet:
                say_nothing_is_left(standing)
            stored = stored_result(folder, data)
            if stored is not None and standing.split is not None:
                return {} if team.rank else stored
        memory = _memory(plan, model, data)
        team.first(lambda: _take_folder(plan, data, start))
        with (
            folder,
            start_tracking(config.trackers, folder, plan.written, resume=bool(config.resume), quiet=plan.quiet) as tracking,
        ):
            fitted = fit_into(
                folder,
                model,
                data,
                plan.options,
                checkpoints=checkpoints,
                quiet=plan.quiet,
                tracking=tracking,
                processes=team,
            )
            if team.rank:
                fitted.help_evaluate(data.test, team)
                return {}

            def measure() -> dict[str, Any]:
                found = metrics_of(
                    fitted, data, tau=config.tau, learning_rate=config.learning_rate, seed=config.seed, processes=team
                )
                return with_accuracy(found, fitted, questions) | {"predicted_memory_bytes": memory.total}

            run = Run(folder, config.base_model, quiet=plan.quiet, adapters=config.export_adapters)
            return run.save(fitted, data, measure, tracking=tracking)


def _memory(plan: Plan, model: BoRA, data: TaskData) -> MemoryEstimate:
    """Estimate the memory that the fit needs, and show it with the layers that have adapters."""
    options = plan.options
    memory = estimate_memory(
        model,
        data,
        token_budget=options.token_budget,
        task_subsampling=options.task_subsampling,
        task_memory=options.task_memory,
        accumulate=options.accumulate,
        average=options.average,
        processes=plan.team.size,
        process=plan.resident,
    )
    if not plan.quiet:
        print(*[layers_line(model.backbone.slots), *latents_lines(model)], sep="\n", file=sys.stderr)
        print(f"memory: {memory}", file=sys.stderr)
    return memory


def _take_folder(plan: Plan, data: TaskData, start: Start | None) -> None:
    folder, standing = plan.folder, plan.standing
    folder.take(overwrite=plan.config.overwrite, resume=bool(plan.config.resume))
    folder.remove_metrics()
    if standing.steps_left:
        folder.write_config(plan.written)
    if start is not None:
        write_start(folder, start)
    if standing.split is None:
        folder.write_split(data.split_record)
