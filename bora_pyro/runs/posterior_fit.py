"""One posterior fit around a finished MAP fit, from run folder to run folder.

>>> from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
>>> config = PosteriorFitConfig(run="runs/demo", guide="normal", output_dir="runs/demo-posterior")
>>> metrics = run_posterior_fit(config)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoDelta, AutoGuide

from bora_pyro.diagnostics.evidence import evidence_summary
from bora_pyro.errors import InputError
from bora_pyro.guides import GUIDES, guide_options, make_parameters
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.inference.continuation import Continuation
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.spread import check_average
from bora_pyro.options.field import part_of
from bora_pyro.predict.held_out import settle
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.checks import stored_result
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import FIXED, PosteriorFitConfig
from bora_pyro.runs.fitting import fit_into, start_tracking
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG, FIT, SPLIT
from bora_pyro.runs.progress import print_data
from bora_pyro.runs.results import add_mixture, metrics_of
from bora_pyro.runs.resume import (
    Standing,
    as_written,
    changed_option,
    fitted_options,
    resolve_folder,
    resume,
    say_nothing_is_left,
)
from bora_pyro.runs.run import Run
from bora_pyro.runs.saved import SavedRun, load_run, sampled_tau
from bora_pyro.runs.trackers import Tracking

#: Name in ``source.json``: the digest of the MAP fit's posterior.safetensors.
POSTERIOR = "posterior_sha256"


def run_posterior_fit(config: PosteriorFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the MAP fit, fit a guide around it, predict the test documents, and write a run folder.

    The adapters in the folder are at the posterior's mean. ``config.yaml`` has the options of the posterior, ``fit.yaml`` those
    of the MAP fit, so that ``load_run`` needs nothing else. The folder of the MAP fit is not changed.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        The content of ``metrics.json``: the numbers of a fit at the posterior's mean, and ``mixture``, with the calibration of
        both; ``chosen``, what the validation documents chose of the guide; and ``evidence``, for guides from the curvature.

    Raises:
        InputError: something in the configuration, the run or its data cannot be used, in which case nothing is written; or a
            result cannot be written.
        RunStopped: the process got Ctrl-C or SIGTERM; the state of the fit is saved.
    """
    if Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the posterior")
    config, folder = resolve_folder(config)
    standing = Standing()
    if config.resume:
        _check_same_posterior(config, folder)
        config, standing = resume(config, folder)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    if run.adapted:
        raise InputError(
            f"the run in {config.run} is of new tasks that were adapted from another fit; for a posterior of theirs adapt with "
            "--guide normal instead, as in scripts/adapt.py RUN --data new.csv --guide normal"
        )
    if not quiet:
        print_data(run.data)
    source = run.folder.digest_of("posterior")
    if standing.checkpoint is not None:
        _check_same_source(folder, run, source, standing)
    options = _options(config, run, standing)
    checkpoints = standing.continuation(folder, run.data, run.fitted.model.backbone, options)
    if not standing.steps_left:
        if not quiet:
            say_nothing_is_left(standing)
        stored = stored_result(folder, run.data)
        if stored is not None and standing.split is not None:
            return stored
    guide, written = _guide(config, run), as_written(config)
    folder.take(overwrite=config.overwrite, resume=bool(config.resume))
    with folder:
        folder.remove_metrics()
        if standing.steps_left:
            folder.write_config(written)
        if standing.checkpoint is None:
            folder.write_fit(run.folder.read_config())
            folder.write_source({POSTERIOR: source})
        if standing.checkpoint is None or standing.split is None:
            folder.write_split(run.folder.read_split())
        with start_tracking(config.trackers, folder, written, resume=bool(config.resume), quiet=quiet) as tracking:
            fitted = _fit(run, guide, folder, options, checkpoints, tracking, quiet=quiet)
            _note_where_the_map_is_better(config, run, fitted, quiet=quiet)
            mixture = {"draws": config.draws, "linearised": config.predict == "linearised", "seed": config.seed}
            chosen = settle(fitted, run.data.validation, **mixture)
            for note in chosen.pop("notes", []):
                _add_note(run, note, quiet=quiet)
            own = Run(folder, run.config.base_model, guide=config.guide, quiet=quiet)
            return own.save(fitted, run.data, lambda: _metrics(config, run, fitted, chosen), tracking=tracking)


def _options(config: PosteriorFitConfig, run: SavedRun, standing: Standing) -> FitOptions:
    """Options of the fit. The token budget is the run's unless it is given; a finished fit gets no further epoch."""
    options = part_of(config, FitOptions)
    epochs = options.epochs if standing.steps_left else standing.epochs
    budget = run.config.token_budget if options.token_budget is None else options.token_budget
    return dataclasses.replace(options, epochs=epochs, token_budget=budget)


def _add_note(run: SavedRun, note: str, *, quiet: bool) -> None:
    run.data.notes.append(note)
    if not quiet:
        print(f"note: {note}", file=sys.stderr)


def _note_where_the_map_is_better(config: PosteriorFitConfig, run: SavedRun, fitted: Fitted, *, quiet: bool) -> None:
    best, of_map, measure = fitted.validation_score, run.fitted.validation_score, fitted.model.likelihood.measure
    if fitted.history and best is not None and of_map is not None and best > of_map:
        centre = "mean of the steps" if isinstance(fitted.guide, FromSteps) else "posterior's mean"
        both = f"{best:.{measure.digits}f} against {of_map:.{measure.digits}f}"
        rate = (
            f"use more --epochs, or a smaller --learning_rate (now {config.learning_rate:g}; try {config.learning_rate / 3:.1g})"
        )
        _add_note(run, f"the {centre} has a higher validation {measure.title} than the MAP ({both}); {rate}", quiet=quiet)


def _check_same_posterior(config: PosteriorFitConfig, folder: RunFolder) -> None:
    """Check that the posterior is the one to resume. Options of the optimisation may differ."""
    stored = folder.read_config()
    if not (folder.path / FIT).is_file():
        raise InputError(f"the run in {folder.path} is no posterior fit; give the folder of one to resume, or another output_dir")
    for name in ("run", "guide", "guide_option", "scale", "temperature", "tau", "seed"):
        if getattr(config, name) != stored.get(name):
            raise changed_option(config, folder, name, stored)


def _check_same_source(folder: RunFolder, run: SavedRun, source: str, standing: Standing) -> None:
    """Check that the MAP fit is still the one that the posterior began from: it may have been fitted again."""
    then, now = folder.read_config(FIT), run.folder.read_config()
    same = {
        CONFIG: all(then.get(name) == now.get(name) for name in fitted_options(MapFitConfig)),
        SPLIT: standing.split in (None, run.folder.read_split()),
        # older posteriors do not store it
        "posterior.safetensors": folder.read_source().get(POSTERIOR, source) == source,
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        raise InputError(
            f"{run.folder.path / other[0]} is not what the posterior in {folder.path} began from, for the run was fitted "
            "again; give another --output_dir, or start afresh with --overwrite true"
        )


def _guide(config: PosteriorFitConfig, run: SavedRun) -> AutoGuide:
    """The guide at the MAP estimate, with its tensors created."""
    model, sites = run.fitted.model, run.fitted.sites()
    if run.federated_config is not None:
        raise InputError(
            f"the run in {run.folder.path} is a federated fit, and a posterior around it would need the documents of all clients "
            "in one place; give a MAP fit"
        )
    if run.reward_config is not None:
        raise InputError(
            f"the run in {run.folder.path} is a fit from rewards, and a posterior around it would be that of its prompts; "
            "give a MAP fit to texts"
        )
    if run.meta_config is not None:
        raise InputError(f"the run in {run.folder.path} is a meta-fit, whose tasks have posteriors already; give a MAP fit")
    if not isinstance(run.fitted.guide, AutoDelta):
        raise InputError(f"the run in {run.folder.path} is a posterior already; give the MAP fit that it began from")
    scale = config.scale or usual_scale(run.fitted.tau())
    if config.tau != FIXED:
        sites = sampled_tau(model, config.tau, run.fitted)
    options = guide_options(config.guide, config.guide_option or ())
    guide = GUIDES[config.guide](model, sites, data=run.data, scale=scale, temperature=config.temperature, **options)
    check_average(guide, part_of(config, FitOptions))
    make_parameters(guide, model)
    return guide


def usual_scale(tau: float) -> float:
    """0.5 of the prior's standard deviation τ^-1/2, and at most 0.045 in the unit of the weights.

    The entries of LoRA are some hundredths. With wider draws the mean would be fitted to noise. The limit matters under a
    small τ. At τ = 0 and τ = ∞ there is no deviation to scale.
    """
    return min(0.5, 0.045 * tau**0.5) if 0 < tau < float("inf") else 0.5


def _fit(
    run: SavedRun,
    guide: AutoGuide,
    folder: RunFolder,
    options: FitOptions,
    checkpoints: Continuation,
    tracking: Tracking,
    *,
    quiet: bool,
) -> Fitted:
    if not [*guide.parameters()]:
        of_run = run.fitted.validation_score
        return Fitted(run.fitted.model, guide, run.data.tasks, validation_score=of_run, chat_template=run.data.chat_template)
    return fit_into(
        folder,
        run.fitted.model,
        run.data,
        options,
        checkpoints=checkpoints,
        quiet=quiet,
        tracking=tracking,
        guide=guide,
        callbacks=[],  # τ stays what the run has learned
    )


def _metrics(config: PosteriorFitConfig, run: SavedRun, fitted: Fitted, chosen: dict[str, Any]) -> dict[str, Any]:
    metrics = metrics_of(fitted, run.data, tau=run.config.tau, learning_rate=config.learning_rate, seed=run.config.seed)
    measure = fitted.model.likelihood.measure.name
    metrics |= {
        "guide": config.guide,
        "temperature": config.temperature,
        "draws": config.draws,
        "predict": config.predict,
        f"map_test_{measure}": run.metrics[f"test_{measure}"],
        f"map_validation_{measure}": run.metrics.get(f"validation_{measure}"),
        **({"chosen": chosen} if chosen else {}),
    }
    if config.tau != FIXED:
        metrics |= {"tau": fitted.tau(), "tau_by_group": fitted.tau_by_group()}
    if config.temperature == 1 and not chosen and (evidence := evidence_summary(fitted.guide, run.data.train)):
        metrics["evidence"] = evidence
    if run.data.test.num_tokens:
        posterior = Posterior(fitted, seed=config.seed)
        predictor = posterior.predictor(config.predict == "linearised")
        add_mixture(metrics, fitted, run.data, predictor, lambda: posterior.draws(config.draws))
    return metrics
