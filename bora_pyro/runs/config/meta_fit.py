"""The configuration of a meta-fit.

>>> config = parse_config(MetaFitConfig, ["--inner_steps", "3", "--beta", "0.01", "--scale", "0.02"])
>>> config.inner_steps, config.map_fit.prior, config.map_fit.prior_option[0]
(3, 'amortised_normal', 'scale=0.02')
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bora_pyro.data.options import DataOptions
from bora_pyro.errors import InputError
from bora_pyro.inference.meta_options import INNER, MetaOptions
from bora_pyro.inference.options import RUN
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, check_fields, option, part_of
from bora_pyro.priors import GLOBAL_PRIORS
from bora_pyro.priors.scale_prior import POSITIVITIES
from bora_pyro.runs.config.groups import HEADINGS, PRIOR, BaseOptions, PriorOptions, RunOptions, SourceOptions
from bora_pyro.runs.config.map_fit import MapFitConfig

__all__ = ["MetaFitConfig", "parse_config"]


@by_heading(*HEADINGS[:-2], INNER, *HEADINGS[-2:])
@dataclass(kw_only=True)
class MetaFitConfig(MetaOptions, BaseOptions, DataOptions, SourceOptions):
    """Fit ABMLL: means and scales that all tasks share, and a few gradient steps from there for each task. No checkpoints."""

    scale: float = option(
        0.01, "scale sigma_0 of every entry at the start, in the unit of the weights", group=PRIOR, positive=True
    )
    positivity: str = option("softplus", "how scales stay positive", group=PRIOR, choices=tuple(POSITIVITIES))
    learn_scale: bool = option(True, "learn sigma_0; false: it stays as it begins", group=PRIOR)
    global_prior: str = option(
        "flat",
        "p of the global means and scales: flat, or normal_gamma, Normal(start, 1) and a Gamma(1, scale^2) precision",
        group=PRIOR,
        choices=GLOBAL_PRIORS,
    )
    likelihood: str = changed(PriorOptions, "likelihood", "causal_lm")
    likelihood_option: list[str] | None = changed(PriorOptions, "likelihood_option", None)
    likelihood_unit: str = changed(PriorOptions, "likelihood_unit", "tokens")
    option_score: str | None = changed(PriorOptions, "option_score", None)
    task_weights: str | None = changed(PriorOptions, "task_weights", None)
    draws: int = option(8, "draws of the mixture that metrics.json reports", group=RUN, least=1)
    export_adapters: bool = changed(MapFitConfig, "export_adapters", True)
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/meta_fit")
    overwrite: bool = changed(RunOptions, "overwrite", False)
    resume: bool = option(False, "not possible: a meta-fit has no checkpoints; start it again with --overwrite true", group=RUN)

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

            >>> MetaFitConfig(resume=True).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: resume is true, but a meta-fit has no checkpoints; start it again with --overwrite true

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if self.resume:
            raise InputError("resume is true, but a meta-fit has no checkpoints; start it again with --overwrite true")
        check_fields(self)
        part_of(self, MetaOptions).validate()
        if self.shard_base:
            raise InputError("shard_base is true, but a meta-fit runs in one process; leave it out")
        self.map_fit.validate()

    @property
    def map_fit(self) -> MapFitConfig:
        """The configuration of a MAP fit with the same documents, base and options, and the prior of this fit."""
        names = {field.name for field in dataclasses.fields(self)} & {field.name for field in dataclasses.fields(MapFitConfig)}
        own = {name: getattr(self, name) for name in names}
        prior = [f"scale={self.scale!r}", f"positivity={self.positivity}"]
        prior += [f"learned={str(self.learn_scale).lower()}", f"global_prior={self.global_prior}"]
        return MapFitConfig(**own, prior="amortised_normal", prior_option=prior)
