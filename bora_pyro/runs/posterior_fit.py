"""One posterior fit around a finished MAP fit, from run folder to run folder: what ``scripts/posterior_fit.py`` does.

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

from bora_pyro.diagnostics.calibration import calibration
from bora_pyro.errors import InputError
from bora_pyro.files.slugs import adapter_folders
from bora_pyro.guides import GUIDES, make_parameters
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.checks import stored_result
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import FIXED, PosteriorFitConfig
from bora_pyro.runs.fitting import FIT_OPTIONS, fit_into, resumes, start_tracking
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CONFIG, FIT, SPLIT
from bora_pyro.runs.results import metrics_of, write_adapters, write_posterior
from bora_pyro.runs.resume import Standing, fitted_options, resume, say_nothing_is_left
from bora_pyro.runs.saved import SavedRun, load_run, sampled_tau
from bora_pyro.runs.trackers import Tracking, check_packages

#: In the record of a posterior's source: the digest of the MAP's sites.
POSTERIOR = "posterior_sha256"


def run_posterior_fit(config: PosteriorFitConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Read the MAP fit, fit a guide around it, predict the test documents, and leave a run folder.

    The folder is that of a fit, with the adapters at the posterior's mean; ``config.yaml`` holds the options of the posterior,
    ``fit.yaml`` those of the MAP fit, so that ``load_run`` needs nothing else. The run that it began from is left alone.

    Args:
        config: the checked configuration.
        quiet: show no progress and no notes.

    Returns:
        What ``metrics.json`` holds: that of a fit, at the posterior's mean, and ``mixture``, with the calibration of both.

    Raises:
        InputError: something in the configuration, the run or its data cannot be used; nothing is written then.
    """
    if Path(config.output_dir).resolve() == Path(config.run).resolve():
        raise InputError(f"output_dir {config.output_dir} is the run itself; give another folder for the posterior")
    config = dataclasses.replace(config, resume=resumes(config.output_dir, config.resume))
    RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=bool(config.resume))
    check_packages(config.trackers)
    standing = Standing()
    if config.resume:
        _check_same_posterior(config, RunFolder.open(config.output_dir))
        config, standing = resume(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
    if run.adapted:
        raise InputError(
            f"the run in {config.run} is of new tasks that were adapted from another fit; for a posterior of theirs adapt with "
            "--guide normal instead, as in scripts/adapt.py RUN --data new.csv --guide normal"
        )
    source = run.folder.digest_of("posterior")
    if standing.checkpoint is not None:
        _check_same_source(config, run, source, standing)
        own = dataclasses.replace(config, token_budget=_token_budget(config, run))
        standing.check(run.data, run.fitted.model.backbone, own)
    if not standing.steps_left:
        if not quiet:
            say_nothing_is_left(standing)
        stored = stored_result(RunFolder(Path(config.output_dir)), run.data)
        if stored is not None and standing.split is not None:
            return stored
        config = dataclasses.replace(config, epochs=standing.epochs)
    guide = _guide(config, run)
    with RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=bool(config.resume)) as folder:
        folder.remove_metrics()
        if standing.steps_left:
            folder.write_config(dataclasses.asdict(config) | {"overwrite": False, "resume": False})
        if standing.checkpoint is None:
            folder.write_fit(run.folder.read_config())
            folder.write_source({POSTERIOR: source})
        if standing.checkpoint is None or standing.split is None:
            folder.write_split(run.folder.read_split())
        with start_tracking(config, folder, quiet=quiet) as tracking:
            fitted = _fit(config, run, guide, folder, tracking, quiet=quiet)
            metrics = _finish(config, run, fitted, folder, quiet=quiet)
            tracking.conclude(metrics, fitted.history)
        folder.write_metrics(metrics)
    return metrics


def _finish(config: PosteriorFitConfig, run: SavedRun, fitted: Fitted, folder: RunFolder, *, quiet: bool) -> dict[str, Any]:
    """Write the adapters and the posterior; returns what ``metrics.json`` will hold."""
    if fitted.history and fitted.best_epoch == 0:
        run.data.notes.append(
            "no epoch had a lower validation perplexity than the MAP, so the posterior is as it began, its scales not fitted; "
            f"use a smaller --learning_rate (now {config.learning_rate:g}; try {config.learning_rate / 3:.1g}) or --scale"
        )
        if not quiet:
            print(f"note: {run.data.notes[-1]}", file=sys.stderr)
    write_adapters(folder, fitted, run.config.base_model)
    write_posterior(folder, fitted, run.data, config.guide)
    return _metrics(config, run, fitted)


def _check_same_posterior(config: PosteriorFitConfig, folder: RunFolder) -> None:
    """Refuse to go on with another posterior; how it is optimised may change."""
    stored = folder.read_config()
    if not (folder.path / FIT).is_file():
        raise InputError(f"the run in {folder.path} is no posterior fit; give the folder of one to resume, or another output_dir")
    for name in ("run", "guide", "scale", "temperature", "tau", "seed"):
        if getattr(config, name) != stored.get(name):
            raise InputError(
                f"{name} is {getattr(config, name)!r}, but the run in {folder.path} has {stored.get(name)!r}; resume it with "
                f"--config {folder.path}/config.yaml --resume true, or give another --output_dir"
            )


def _check_same_source(config: PosteriorFitConfig, run: SavedRun, source: str, standing: Standing) -> None:
    """Refuse to go on around another MAP fit, which has taken the place of the one that the posterior began from."""
    folder = RunFolder(Path(config.output_dir))
    then, now = folder.read_config(FIT), run.folder.read_config()
    same = {
        CONFIG: all(then.get(name) == now.get(name) for name in fitted_options(MapFitConfig)),
        SPLIT: standing.split in (None, run.folder.read_split()),
        # older posteriors do not say which one it was
        "posterior.safetensors": folder.read_source().get(POSTERIOR, source) == source,
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        raise InputError(
            f"{run.folder.path / other[0]} is not what the posterior in {config.output_dir} began from, for the run was fitted "
            "again; give another --output_dir, or start afresh with --overwrite true"
        )


def _token_budget(config: PosteriorFitConfig, run: SavedRun) -> int:
    return run.config.token_budget if config.token_budget is None else config.token_budget


def _guide(config: PosteriorFitConfig, run: SavedRun) -> AutoGuide:
    """The guide at the MAP, with its tensors made."""
    model, sites = run.fitted.model, run.fitted.sites()
    if not isinstance(run.fitted.guide, AutoDelta):
        raise InputError(f"the run in {run.folder.path} is a posterior already; give the MAP fit that it began from")
    scale = config.scale or _usual_scale(run.fitted.tau())
    if config.tau != FIXED:
        sites = sampled_tau(model, config.tau, run.fitted)
    guide = GUIDES[config.guide](model, sites, data=run.data, scale=scale, temperature=config.temperature)
    make_parameters(guide, model)
    return guide


def _usual_scale(tau: float) -> float:
    """0.5 of the prior's standard deviation τ^-1/2, and no more than 0.045 in the unit of the weights.

    Draws that are wider drown what LoRA's entries of some hundredths say, and the mean is fitted to noise; a short fit learns a
    small τ. At τ = 0 and ∞ there is no such deviation.
    """
    return min(0.5, 0.045 * tau**0.5) if 0 < tau < float("inf") else 0.5


def _fit(
    config: PosteriorFitConfig, run: SavedRun, guide: AutoGuide, folder: RunFolder, tracking: Tracking, *, quiet: bool
) -> Fitted:
    if not [*guide.parameters()]:
        of_run = run.fitted.validation_perplexity
        return Fitted(run.fitted.model, guide, run.data.tasks, validation_perplexity=of_run, chat_template=run.data.chat_template)
    options = {name: getattr(config, name) for name in FIT_OPTIONS} | {"token_budget": _token_budget(config, run)}
    options |= {"learning_rate": config.learning_rate, "temperature": config.temperature, "guide": guide}
    options["callbacks"] = []  # τ stays what the run has learned
    return fit_into(folder, run.fitted.model, run.data, quiet=quiet, tracking=tracking, **options)


def _metrics(config: PosteriorFitConfig, run: SavedRun, fitted: Fitted) -> dict[str, Any]:
    of_fit = dataclasses.replace(run.config, learning_rate=config.learning_rate)
    metrics = metrics_of(of_fit, fitted, run.data)
    metrics |= {
        "guide": config.guide,
        "temperature": config.temperature,
        "draws": config.draws,
        "map_test_perplexity": run.metrics["test_perplexity"],
        "map_validation_perplexity": run.metrics.get("validation_perplexity"),
    }
    if config.tau != FIXED:
        metrics |= {"tau": fitted.tau(), "tau_by_group": fitted.tau_by_group()}
    if not run.data.test.num_tokens:
        return metrics
    posterior, mean = Posterior(fitted, seed=config.seed), fitted.weights()[0]
    mixture, centre = posterior.score(run.data.test, draws=config.draws), predictive(fitted.model, run.data.test, lambda: [mean])
    metrics |= {"mixture": dataclasses.asdict(calibration(mixture)), "mean": dataclasses.asdict(calibration(centre))}
    metrics["mixture_test_perplexity"] = mixture.perplexity()
    slugs = adapter_folders(fitted.tasks)
    for d, name in enumerate(fitted.tasks):
        own = mixture.epistemic[mixture.task == d]
        metrics["tasks"][slugs[name]] |= {
            "mixture_test_perplexity": mixture.perplexity(d),
            "epistemic": float(own.mean()) if len(own) else None,
        }
    return metrics
