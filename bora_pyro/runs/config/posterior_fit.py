"""The configuration of a posterior fit.

>>> config = parse_config(PosteriorFitConfig, ["runs/demo", "--guide", "low_rank", "--temperature", "0.1"])
>>> config.run, config.guide, config.temperature
('runs/demo', 'low_rank', 0.1)
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import AROUND_MAP, GUIDES, OF_ALL, guide_options
from bora_pyro.inference.options import OPTIMISATION, RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, option
from bora_pyro.options.members import options_text
from bora_pyro.predict.posterior import PREDICT
from bora_pyro.priors.random_precision import HYPERPRIORS
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device

__all__ = ["PosteriorFitConfig", "parse_config"]

#: The value of ``--tau`` that keeps the τ of the run.
FIXED = "fixed"
# All guides but the point estimate: the posterior is fitted around it.
_SPREAD = tuple(name for name in GUIDES if name != "map")
POSTERIOR = "posterior"


@by_heading("options", POSTERIOR, OPTIMISATION, RUN)
@dataclass(kw_only=True)
class PosteriorFitConfig(RunOptions, FitOptions):
    """Fit a posterior around a finished MAP fit, with the same model, data and split."""

    run: str = option("", "folder of the MAP fit, its output_dir", positional=True)
    guide: str = option("normal", f"how the posterior is approximated: {', '.join(_SPREAD)}", group=POSTERIOR)
    guide_option: list[str] | None = option(
        None,
        "arguments of the guide, as key=value; may be repeated "
        f"({options_text({name: GUIDES[name] for name in _SPREAD}, without=OF_ALL)}) (default: none)",
        group=POSTERIOR,
        whole=True,
    )
    scale: float | None = option(
        None,
        "initial standard deviations in units of the prior's, for guides that learn them (default: 0.5, or less if the prior is "
        "so wide that they would exceed 0.045 in units of the weights)",
        group=POSTERIOR,
        positive=True,
    )
    temperature: float = changed(
        FitOptions,
        "temperature",
        1.0,
        "weight of the KL divergence; below 1 the posterior is narrower than the model says",
        group=POSTERIOR,
    )
    tau: str = option(
        FIXED,
        "fixed: the tau of the run; half_cauchy or gamma: a random variable with that hyperprior, which starts at the run's tau",
        group=POSTERIOR,
        choices=(FIXED, *HYPERPRIORS),
    )
    draws: int = option(8, "draws of the mixture that metrics.json reports", group=POSTERIOR, least=1)
    predict: str = option(
        "draws",
        "draws: each draw of this mixture predicts with the network; linearised: with its linear expansion around the mean, "
        "which is right for the guides laplace, laplace_kfac and laplace_kronecker",
        group=POSTERIOR,
        choices=PREDICT,
    )

    epochs: int = changed(
        FitOptions, "epochs", 6, "largest number of passes over the training documents; guides that are not fitted make none"
    )
    learning_rate: float = changed(FitOptions, "learning_rate", 3e-3)
    # None: the value of the run, which is read later
    token_budget: int = changed(FitOptions, "token_budget", None, "tokens of a batch, padding included (default: as in the run)")
    task_subsampling: bool | None = changed(
        FitOptions,
        "task_subsampling",
        None,
        "update only the tasks of a step's documents (default: with more than 64 tasks)",
    )
    patience: int = changed(
        FitOptions,
        "patience",
        3,
        "stop after this many epochs without a better validation perplexity of the mean; 0 never stops early",
    )
    seed: int = changed(
        FitOptions, "seed", 0, "seed of the order of the documents and of the draws; the split is that of the run"
    )

    device: str = changed(BaseOptions, "device", "auto")
    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    output_dir: str = changed(RunOptions, "output_dir", "runs/posterior_fit", "folder of the new run")

    def validate(self) -> None:
        """Check every value that can be checked without the run.

            >>> PosteriorFitConfig(run="runs/demo", guide="norml").validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: guide is 'norml'; allowed: normal, task_normal, ...; did you mean 'normal'?

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a MAP fit, as in posterior_fit.py runs/map_fit")
        if self.guide == "map":
            raise InputError(f"guide is 'map', but the run is already that point estimate; allowed: {', '.join(_SPREAD)}")
        if self.guide not in GUIDES:
            raise InputError(f"guide is {self.guide!r}; allowed: {', '.join(_SPREAD)}{nearest(self.guide, _SPREAD)}")
        guide_options(self.guide, self.guide_option or ())
        for group in (FitOptions, RunOptions):
            group.validate(self)
        check_device(self.device)
        if self.tau != FIXED and self.guide in AROUND_MAP:
            raise InputError(f"guide {self.guide} needs a fixed tau; give --tau fixed, or --guide normal")
