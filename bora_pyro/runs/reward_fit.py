"""A fit from rewards, from a configuration to a run folder.

    bora reward-fit --prompts prompts.csv --reward builtin:length --output_dir runs/rewards
    bora reward-fit --prompts prompts.csv --reward my_rewards:score --trust_reward_code true --output_dir runs/rewards

:func:`~bora_pyro.rewards.fit.reward_fit` does the work. The folder is that of a MAP fit whose documents are the prompts, and
every command that reads one reads it, except ``posterior-fit`` and ``route-fit``. Its perplexities are those of the prompts as
texts; the rewards are under ``reward`` in ``metrics.json``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bora_pyro.data import ByRecord, DataOptions, TaskData
from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.files.text import NAME_LENGTH, name_line
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods import PERPLEXITY, Measure
from bora_pyro.model import BoRA
from bora_pyro.options.field import part_of
from bora_pyro.rewards.fit import RewardFit, name_rewards
from bora_pyro.rewards.functions import LogLikelihood
from bora_pyro.rewards.judge import Reward
from bora_pyro.rewards.measure import rewards_of, summary
from bora_pyro.rewards.named import BUILTIN, named_reward
from bora_pyro.rewards.options import REWARD, RewardOptions
from bora_pyro.rewards.prompts import PromptTexts
from bora_pyro.rewards.rollouts import distances
from bora_pyro.runs.build import begin, build_run, check_can_export
from bora_pyro.runs.checks import stored_result
from bora_pyro.runs.command import Command
from bora_pyro.runs.config.groups import MODEL, PRIOR
from bora_pyro.runs.config.reward_fit import RewardFitConfig
from bora_pyro.runs.description import describe
from bora_pyro.runs.fitting import fit_into, start_tracking
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import REWARD as REWARD_OPTION
from bora_pyro.runs.progress import layers_line, print_fitted
from bora_pyro.runs.results import metrics_of
from bora_pyro.runs.resume import Standing, as_written, changed_option, resolve_folder, resume, say_nothing_is_left
from bora_pyro.runs.run import Run
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.start import write_start

# The name in source.json of the digest of the posterior of start_run.
_POSTERIOR = "posterior"
_REWARD = Measure("reward", "reward", "document", exponential=False, digits=4)


def run_reward_fit(config: RewardFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Load, fit, measure, and write a run folder.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: that of a MAP fit to the prompts as texts, and ``reward``, with the rewards of validation
        and test prompts by task before and after the fit, and the drift.

    Raises:
        InputError: something in the configuration or the prompts cannot be used, in which case nothing is written; or a reward is
            no finite number.
        RunStopped: the process got Ctrl-C or SIGTERM; the state of the fit is saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a fit from rewards runs in one process; start it without torchrun")
    reward = reward_of(config)
    if not quiet and not config.reward.startswith(BUILTIN):
        print(f"note: the code of reward {config.reward} runs on this machine (trust_reward_code)", file=sys.stderr)
    config, folder = resolve_folder(config)
    standing = Standing()
    if config.resume:
        _check_same_fit(config, folder)
        config, standing = resume(config, folder)
    split = None if standing.split is None else ByRecord(standing.split)
    try:
        model, data = build_run(config.map_fit, quiet=quiet, split=split)
    except InputError as error:
        # prompts are read as texts; the option has another name here
        raise InputError(str(error).replace("text_column", "prompt_column")) from error
    if config.export_adapters:
        check_can_export(model.backbone)
    start = begin(config.map_fit, model, data, folder=folder if config.resume else None, quiet=quiet)
    sites, source = _start_sites(config, model, data)
    if standing.checkpoint is not None and folder.read_source().get(_POSTERIOR) != source:
        raise InputError(
            f"start_run {config.start_run} is not what the run in {folder.path} began from, for it was fitted again; give "
            "another --output_dir, or start afresh with --overwrite true"
        )
    documents = part_of(config.map_fit, DataOptions)
    prompts = PromptTexts.of(config.prompts, model.backbone, data, documents)
    plan = RewardFit.of(model, data, reward, part_of(config, RewardOptions), prompts=prompts, sites=sites)
    options = plan.options
    if not standing.steps_left:
        options = dataclasses.replace(options, epochs=standing.epochs)
    checkpoints = standing.continuation(folder, data, model.backbone, options)
    if not standing.steps_left:
        if not quiet:
            say_nothing_is_left(standing)
        if standing.split is not None and (stored := stored_result(folder, data)) is not None:
            return stored
    if not quiet:
        print(layers_line(model.backbone.slots), file=sys.stderr)
        steps = plan.rollouts.rounds
        print(
            f"an epoch: {len(data.train)} prompts in {steps} step{'s' * (steps > 1)} of up to {config.prompts_per_step} prompts "
            f"x {config.samples} texts of up to {config.new_tokens} tokens",
            file=sys.stderr,
        )
    written = as_written(config)
    folder.take(overwrite=config.overwrite, resume=bool(config.resume))
    with folder:
        folder.remove_metrics()
        if standing.steps_left:
            folder.write_config(written)
        if standing.split is None:
            folder.write_split(data.split_record)
        if start is not None:
            write_start(folder, start)
        if source is not None:
            folder.write_source({_POSTERIOR: source})
        with start_tracking(config.trackers, folder, written, resume=bool(config.resume), quiet=quiet) as tracking:
            fitted = fit_into(
                folder,
                plan.model,
                data,
                options,
                checkpoints=checkpoints,
                quiet=quiet,
                tracking=tracking,
                measure=_REWARD,
                rename=name_rewards,
                guide=plan.guide,
                callbacks=plan.callbacks,
                steps=plan.rollouts.steps,
            )
            score = fitted.validation_score
            result = plan.result(fitted)
            _add_notes(result, data, quiet=quiet)
            saving = Run(folder, config.base_model, quiet=quiet, adapters=config.export_adapters)
            return saving.save(result, data, lambda: _metrics(config, plan, result, data, score), tracking=tracking)


def reward_of(config: RewardFitConfig) -> Reward:
    """The reward of a configuration. Code of the user runs only with ``trust_reward_code``.

    Raises:
        InputError: there is no such reward, or its code is not trusted.
    """

    def log_likelihood(run: str) -> LogLikelihood:
        return LogLikelihood(load_run(run, device=config.device, trust_remote_code=config.trust_remote_code).fitted)

    more = {"log_likelihood": log_likelihood}
    return named_reward(config.reward, config.reward_option, trusted=config.trust_reward_code, more=more)


def _check_same_fit(config: RewardFitConfig, folder: RunFolder) -> None:
    """Check that prompts, model, prior, rewards and seed are those of the run to resume. The optimisation may differ."""
    stored = folder.read_config()
    if REWARD_OPTION not in stored:
        raise InputError(f"the run in {folder.path} is no fit from rewards; give the folder of one to resume")
    for field in dataclasses.fields(config):
        if field.metadata["line_only"]:
            continue
        name, value = field.name, getattr(config, field.name)
        same = field.metadata["group"] in (DATA, MODEL, PRIOR, REWARD) or name == "seed"
        if same and value != stored.get(name, value):
            raise changed_option(config, folder, name, stored)


def _start_sites(config: RewardFitConfig, model: BoRA, data: TaskData) -> tuple[dict[str, Tensor] | None, str | None]:
    """The values of the sites at the adapters of ``start_run``, and the digest of its posterior; None without one.

    Raises:
        InputError: the run has other tasks, another base or another kind of adapter.
    """
    if config.start_run is None:
        return None, None
    run = load_run(config.start_run, device=config.device, trust_remote_code=config.trust_remote_code)
    what, before, now = f"start_run {config.start_run}", describe(run.fitted.model), describe(model)
    for name, title in (("adapter", "another adapter"), ("router", "another router"), ("slots", "other layers")):
        if before[name] != now[name]:
            raise InputError(f"{what} has {title} ({shown(before[name])}) than this fit ({shown(now[name])}); give its options")
    if run.fitted.model.backbone.digest != model.backbone.digest:
        raise InputError(f"{what} is of another base model; give its --base_model and --precision")
    own = run.fitted.model.fixed
    if any(not own[name].equal(value) for name, value in model.fixed.items()):
        raise InputError(f"{what} has other fixed tensors, which its seed gives; give --seed {run.config.seed}")
    if run.fitted.model.tensors.masks:
        raise InputError(f"{what} has masks that its fit has changed; begin at a run with an adapter such as lora")
    for task in data.tasks:
        if task not in run.fitted.tasks:
            raise InputError(f"{what} has no task {shown(task)}{nearest(task, run.fitted.tasks)}; give prompts of its tasks")
    theta, mean = run.fitted.weights()
    rows = [run.fitted.tasks.index(task) for task in data.tasks]
    sites = model.sites_given({name: value[rows] for name, value in theta.items()}, mean)
    return sites, run.folder.digest_of("posterior")


def _add_notes(fitted: Fitted, data: TaskData, *, quiet: bool) -> None:
    notes = ["the documents of this run are prompts: its perplexities say how well they are predicted as texts, before and after"]
    if fitted.history and not fitted.best_epoch:
        notes.append("no epoch had a larger validation reward than the start, which is kept")
    data.notes.extend(notes)
    for note in () if quiet else notes:
        print(f"note: {note}", file=sys.stderr)


def _metrics(
    config: RewardFitConfig, plan: RewardFit, fitted: Fitted, data: TaskData, validation_score: float | None
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    metrics = metrics_of(fitted, data, tau=config.map_fit.tau, learning_rate=config.learning_rate, seed=config.seed)
    theta = fitted.weights()[0]
    (scores,) = evaluate(fitted.model, data.validation, theta)
    metrics[f"validation_{PERPLEXITY.name}"] = scores.perplexity()
    slugs, last = adapter_folders(fitted.tasks), fitted.history[fitted.best_epoch - 1] if fitted.best_epoch else {}
    found: dict[str, Any] = {"name": config.reward, "chosen_by": "validation" if len(data.validation) else "the last epoch"}
    found |= {"validation_reward": None if validation_score is None else -validation_score}
    tasks: dict[str, dict[str, Any]] = {slug: {} for slug in slugs.values()}
    for name, split in (("validation", data.validation), ("test", data.test)):
        if not len(split):
            continue
        for when, weights in (("before", plan.start), ("after", theta)):
            numbers = summary(rewards_of(fitted.model, weights, split, plan.judge), split.task, fitted.tasks)
            found |= {f"{name}_{key}_{when}": value for key, value in (numbers.pop(None) or {}).items() if key != "prompts"}
            for task, row in numbers.items():
                of_task = tasks[slugs[str(task)]]
                of_task |= {f"{name}_{key}_{when}": value for key, value in row.items() if key != "prompts"}
                of_task[f"{name}_prompts"] = row["prompts"]
    for task, distance in zip(fitted.tasks, distances(theta, plan.start).tolist(), strict=True):
        tasks[slugs[task]]["distance"] = distance
    # of the epoch that is kept, on its training texts
    found |= {name: last.get(name) for name in ("kl", "clipped", "distance")}
    for slug, row in tasks.items():
        metrics["tasks"][slug]["reward"] = row
    return metrics | {"guide": "map", "reward": found}


def reward_table(metrics: Mapping[str, Any]) -> Table:
    """A table with the rewards of each task before and after the fit: on test prompts, or on validation prompts without any."""
    split = "test" if "test_reward_before" in metrics["reward"] else "validation"
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold", max_width=NAME_LENGTH)
    for heading in (
        "train\nprompts",
        f"{split}\nprompts",
        "reward\nbefore",
        "reward\nafter",
        "sd\nafter",
        "distance\nfrom start",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    names = (f"{split}_reward_before", f"{split}_reward_after", f"{split}_reward_sd_after")
    for slug, task in metrics["tasks"].items():
        own = task["reward"]
        cells = [f"{task['train_documents']:,}", f"{own.get(f'{split}_prompts', 0):,}"]
        cells += [_cell(own.get(name)) for name in (*names, "distance")]
        table.add_row(Text(name_line(task.get("name") or slug, characters=None)), *cells)
    table.add_section()
    prompts = sum(task["reward"].get(f"{split}_prompts", 0) for task in metrics["tasks"].values())
    own = metrics["reward"]
    cells = [f"{metrics['train_documents']:,}", f"{prompts:,}", *(_cell(own.get(name)) for name in (*names, "distance"))]
    table.add_row("all tasks", *cells)
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def show(config: RewardFitConfig, metrics: Mapping[str, Any]) -> None:
    """Print the rewards of the tasks before and after the fit, what chose the epoch, the drift, and the run folder."""
    print_fitted(reward_table(metrics))
    found = metrics["reward"]
    kept = f"epoch {metrics['best_epoch']} of {metrics['epochs']}" if metrics["best_epoch"] else "the start"
    why = f"chosen by its mean validation reward, {_cell(found['validation_reward'])}"
    print(f"kept: {kept}, {why if found['validation_reward'] is not None else 'the last one (there are no validation prompts)'}")
    if found["kl"] is not None:
        print(
            f"drift: {found['kl']:.3g} nats a token from the base (KL divergence), {found['clipped']:.1%} of the ratios clipped"
        )
    print(f"run folder: {config.output_dir}")


COMMAND = Command("reward-fit", RewardFitConfig, run_reward_fit, show)
