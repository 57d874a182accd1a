"""What a posterior fit can be told: every option of ``scripts/posterior_fit.py``, with its default and its help.

>>> config = parse_config(PosteriorFitConfig, ["runs/demo", "--guide", "low_rank", "--temperature", "0.1"])
>>> config.run, config.guide, config.temperature
('runs/demo', 'low_rank', 0.1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.guides import GUIDES
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors.random_precision import HYPERPRIORS
from bora_pyro.runs.config.map_fit import AUTO
from bora_pyro.runs.trackers import TRACKERS, check_trackers

__all__ = ["PosteriorFitConfig", "parse_config"]

#: What ``--tau`` is where the posterior keeps the τ of the run.
FIXED = "fixed"
# Guides that have a spread; the point estimate is what the posterior is fitted around.
_SPREAD = tuple(name for name in GUIDES if name != "map")
POSTERIOR, OPTIMISATION, RUN = "posterior", "optimisation", "run"


@dataclass(kw_only=True)
class PosteriorFitConfig:
    """Fit a posterior around a finished MAP fit: the same model, data and split, a guide with a spread."""

    run: str = option("", "folder of the MAP fit, its output_dir", positional=True)
    guide: str = option("normal", f"how the posterior is approximated: {', '.join(_SPREAD)}", group=POSTERIOR)
    scale: float | None = option(
        None,
        "first standard deviations in units of the prior's, for guides that learn them (default: 0.5, or less where the prior is "
        "so wide that they would exceed 0.045 in the unit of the weights)",
        group=POSTERIOR,
    )
    temperature: float = option(
        1.0, "weight of the KL divergence; below 1 the posterior is narrower than the model says", group=POSTERIOR
    )
    tau: str = option(
        FIXED,
        "fixed: the run's tau, learned or given; half_cauchy or gamma: a random variable with that hyperprior, begun there",
        group=POSTERIOR,
        choices=(FIXED, *HYPERPRIORS),
    )
    draws: int = option(8, "draws of the mixture that metrics.json reports", group=POSTERIOR)

    epochs: int = option(
        6, "passes over the training documents, at most; guides that are not fitted make none", group=OPTIMISATION
    )
    learning_rate: float = option(3e-3, "AdamW's largest learning rate", group=OPTIMISATION)
    warmup: float = option(0.1, "fraction of all steps in which the learning rate rises from 0", group=OPTIMISATION)
    token_budget: int | None = option(None, "tokens of a batch, padding included (default: the run's)", group=OPTIMISATION)
    accumulate: int = option(1, "batches whose gradients make one step", group=OPTIMISATION)
    gradient_clip: float = option(1.0, "largest norm of the whole gradient; inf does not clip", group=OPTIMISATION)
    task_subsampling: bool | None = option(
        None, "move only the tasks that a step's documents are of (default: with more than 64 tasks)", group=OPTIMISATION
    )
    patience: int = option(
        3, "stop after so many epochs without a better validation perplexity of the mean; 0 never stops early", group=OPTIMISATION
    )
    seed: int = option(0, "seed of the order of the documents and of the draws; the split is the run's", group=OPTIMISATION)

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps", group=RUN)
    trust_remote_code: bool = option(
        False,
        "let a base model that brings code of its own run it on this machine; a file cannot say so",
        group=RUN,
        line_only=True,
    )
    task_memory: float = option(
        4.0, "GiB for what belongs to tasks where they are drawn; beyond it they lie in memory-mapped files", group=RUN
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)", group=RUN)
    checkpoint_every: int = option(1, "epochs between checkpoints", group=RUN)
    checkpoint_minutes: float = option(
        10.0, "minutes after which a checkpoint is written within an epoch too; inf: at its end alone", group=RUN
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", group=RUN)
    trackers: list[str] | None = option(
        None, f"where else the numbers go while the fit runs: {', '.join(TRACKERS)} (default: nowhere)", group=RUN
    )
    output_dir: str = option("runs/posterior_fit", "the new run's folder", group=RUN)
    overwrite: bool = option(False, "replace the run that output_dir holds", group=RUN)
    resume: bool | str = option(
        False,
        "go on with the run that output_dir holds, from its newest checkpoint; auto: where it holds one, else start one",
        group=RUN,
        expects="true, false or auto",
        words=(AUTO,),
    )

    def validate(self) -> None:
        """Check every value that needs no run to be checked.

            >>> PosteriorFitConfig(run="runs/demo", guide="norml").validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: guide is 'norml'; allowed: normal, low_rank, laplace, ...; did you mean 'normal'?

        Raises:
            InputError: one line with the value and what is allowed.
        """
        check_choices(self)
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a MAP fit, as in posterior_fit.py runs/map_fit")
        if self.guide == "map":
            raise InputError(f"guide is 'map', the point estimate that the run is already; allowed: {', '.join(_SPREAD)}")
        if self.guide not in GUIDES:
            raise InputError(f"guide is {self.guide!r}; allowed: {', '.join(_SPREAD)}{nearest(self.guide, _SPREAD)}")
        for name in ("scale", "temperature", "learning_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a finite number above 0")
        for name, least in (
            ("draws", 1),
            ("epochs", 1),
            ("accumulate", 1),
            ("patience", 0),
            ("seed", 0),
            ("checkpoint_every", 1),
            ("keep_checkpoints", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from {least} up")
            if getattr(self, name) >= 2**31:
                raise InputError(f"{name} is {shown(getattr(self, name))}; give a whole number below 2**31")
        for name in ("token_budget", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give a whole number from 1 up")
        if not self.checkpoint_minutes >= 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; give minutes from 0 (every step) up, or inf")
        if not self.task_memory >= 0:
            raise InputError(f"task_memory is {self.task_memory}; give GiB from 0 (all in files) up")
        if not self.gradient_clip > 0:
            raise InputError(f"gradient_clip is {self.gradient_clip}; give a number above 0, or inf for no clipping")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is {self.warmup}; give a fraction of the steps, from 0 to 1")
        if self.tau != FIXED and self.guide.startswith("laplace"):
            raise InputError(f"guide {self.guide} holds tau where it is; give --tau fixed, or --guide normal")
        check_trackers(self.trackers)
        if self.overwrite and self.resume:
            raise InputError("overwrite and resume are both true; overwrite starts anew, resume goes on: give one of them")
