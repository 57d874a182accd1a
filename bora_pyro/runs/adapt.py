"""Adapt a finished fit to new tasks, from run folder to run folder.

>>> from bora_pyro.runs.config.adapt import AdaptConfig
>>> config = AdaptConfig(run="runs/demo", data="new.csv", output_dir="runs/new")
>>> metrics = run_adapt(config)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bora_pyro.data import TaskData
from bora_pyro.data.counts import counted
from bora_pyro.errors import InputError, check_at_least, shown
from bora_pyro.inference.adapt import adapt, load_new_tasks
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.inner_steps import InnerOptions
from bora_pyro.inference.meta_adapt import meta_adapt
from bora_pyro.inference.meta_fit import inner_options
from bora_pyro.inference.meta_options import MetaOptions
from bora_pyro.options.field import part_of
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.ensemble import member_folders
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.generator_folder import read_generator
from bora_pyro.runs.new_documents import with_options_of_fit
from bora_pyro.runs.progress import print_data
from bora_pyro.runs.results import GIVEN, metrics_of
from bora_pyro.runs.run import Run
from bora_pyro.runs.saved import SavedRun, load_run

#: The guide of an adaptation by default, and that of a run whose tasks were adapted by inner steps.
MAP, OF_INNER_STEPS = "map", "normal"
#: Steps and learning rate by default.
STEPS, RATE = 60, 1e-2


def run_adapt(config: AdaptConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the fit, infer the deviations of the new tasks, and write a run folder of the new tasks.

    ``config.yaml`` has the options of the adaptation, ``fit.yaml`` those of the fit, and the posterior has Θ and τ. So
    ``load_run`` needs neither the folder of the fit nor its documents. The folder of the fit is not changed.

    The tasks of a meta-fit are adapted by its inner steps (`meta_adapt`), unless a guide is given.

    Args:
        config: the checked configuration.
        quiet: show no notes.

    Returns:
        The content of ``metrics.json``. It has test perplexities if ``split_column`` names test documents.

    Raises:
        InputError: something in the configuration, the run or the data cannot be used, in which case nothing is written; or a
            result cannot be written.
    """
    if Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the new tasks")
    folder = RunFolder(config.output_dir)
    folder.check_free(overwrite=config.overwrite, resume=None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    if isinstance(run.config, EnsembleConfig):
        raise InputError(
            f"the run in {config.run} is an ensemble, whose members have a Θ each; adapt one of them, such as "
            f"{member_folders(config.run)[0]}"
        )
    config = _resolved(config, run)
    data = load_new_tasks(config.data, run.fitted, long_documents=run.config.long_documents, **config.documents)
    groups = run.fitted.model.prior.groups
    if groups and config.task_group is None:
        data.notes.append(
            f"the fit has {counted(len(groups), 'group')} of tasks, and new tasks are taken to be in none of them; name one with "
            "--task_group"
        )
    if not quiet:
        print_data(data)
    fitted, inner = _adapted(config, run, data)

    guide = config.guide or (MAP if inner is None else OF_INNER_STEPS)

    def measure() -> dict[str, Any]:
        metrics = metrics_of(fitted, data, tau=run.config.tau, learning_rate=config.learning_rate or 0.0, seed=config.seed)
        # the τ of the prior that the tasks got; the configuration does not have the τ of a posterior or of single tasks
        metrics |= {"tau": fitted.tau(), "tau_by_group": fitted.tau_by_group(), "guide": guide}
        return metrics | (
            {} if inner is None else {"meta": {"inner_steps": inner.steps, "inner_rate": inner.rate, "beta": inner.beta}}
        )

    folder.take(overwrite=config.overwrite, resume=None)
    with folder:
        folder.write_config(dataclasses.asdict(config) | {"overwrite": False})
        folder.write_fit(dataclasses.asdict(run.config))
        folder.write_split(data.split_record)
        return Run(folder, run.config.base_model, guide=guide, prior=GIVEN, quiet=quiet).save(fitted, data, measure)


def _resolved(config: AdaptConfig, run: SavedRun) -> AdaptConfig:
    """The configuration with the fit's values for options that are not given."""
    reads_options = run.fitted.model.likelihood.reads_options
    config = with_options_of_fit(config, run.config, reads_options=reads_options, run=config.run)
    meta = None if config.guide is not None else run.meta_config
    for name in () if meta is None else ("task_group", "start_from_generator"):
        if (value := getattr(config, name)) is not None:
            raise InputError(
                f"{name} is {shown(value)}, but new tasks of the run in {config.run} begin at the point of meta-fit; leave it "
                "out, or name a guide"
            )
    if config.steps is not None and meta is None:
        check_at_least("steps", config.steps, 1)
    steps, rate = (STEPS, RATE) if meta is None else (meta.inner_steps, meta.inner_rate)
    return dataclasses.replace(
        config,
        steps=steps if config.steps is None else config.steps,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
    )


def _adapted(config: AdaptConfig, run: SavedRun, data: TaskData) -> tuple[Fitted, InnerOptions | None]:
    """The fit of the new tasks, and the inner steps if they were made by those."""
    assert config.steps is not None
    assert config.learning_rate is not None
    assert config.token_budget is not None
    if run.meta_config is None or config.guide is not None:
        names = ("steps", "learning_rate", "token_budget", "scale", "task_group", "seed")
        options: dict[str, Any] = {name: getattr(config, name) for name in names}
        if config.start_from_generator is not None:
            saved, budget = read_generator(config.start_from_generator), config.token_budget
            _, options["start"] = saved.generate(run.fitted.model, data.train, token_budget=budget, seed=config.seed)
        return adapt(run.fitted, data, guide=config.guide or MAP, **options), None
    usual = inner_options(part_of(run.meta_config, MetaOptions))
    inner = dataclasses.replace(usual, steps=config.steps, rate=config.learning_rate, token_budget=config.token_budget)
    return meta_adapt(run.fitted, data, inner, seed=config.seed), inner
