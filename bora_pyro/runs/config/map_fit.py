"""The configuration of a MAP fit.

    >>> config = parse_config(MapFitConfig, ["--tau", "1e3", "--rank=4"])
    >>> config.tau, config.rank, config.prior_form
    (1000.0, 4, 'noncentered')

The help of each field is its documentation, here and on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bora_pyro.data.forms.preference import REJECTED
from bora_pyro.data.options import DataOptions
from bora_pyro.errors import InputError
from bora_pyro.inference.options import OPTIMISATION, RUN, FitOptions
from bora_pyro.likelihoods import LIKELIHOODS
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.options.field import by_heading, option
from bora_pyro.options.members import member_options
from bora_pyro.priors.grouped import GROUPED
from bora_pyro.runs.config.groups import CENTRE, HEADINGS, LEARNED, BaseOptions, PriorOptions, RunOptions, SourceOptions

__all__ = ["MapFitConfig", "parse_config", "to_yaml"]


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class MapFitConfig(RunOptions, FitOptions, PriorOptions, BaseOptions, DataOptions, SourceOptions):
    """Fit BoRA by MAP: one frozen language model, one adapter for each task, all under one hierarchical Normal."""

    scale_learning_rate_with_tau: bool = option(
        False, "the paper's rule: learning rate proportional to tau; for --prior_form centered only", group=OPTIMISATION
    )
    export_adapters: bool = option(
        True,
        "write the adapter of each task as a PEFT folder into the run; false: for targets that such a folder cannot describe",
        group=RUN,
    )

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

            >>> MapFitConfig(rank=0).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: rank is 0; give a whole number from 1 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        for group in (SourceOptions, DataOptions, BaseOptions, PriorOptions, FitOptions, RunOptions):
            group.validate(self)
        if self.start_as == CENTRE and self.start_from is None:
            raise InputError("start_as is centre, but no adapter is given; name its folder with start_from")
        if self.token_budget < self.max_tokens:
            raise InputError(
                f"token_budget is {self.token_budget}, less than one document of max_tokens {self.max_tokens}; "
                f"give token_budget {self.max_tokens} or more, or lower max_tokens"
            )
        self._check_likelihood()
        if self.options_column is not None and self.shard_base:
            raise InputError("options_column and shard_base are both given; leave one of them out")
        self._check_groups()
        if self.scale_learning_rate_with_tau and (self.prior_form != "centered" or self.tau in (0, math.inf, LEARNED)):
            raise InputError(
                "scale_learning_rate_with_tau is only for the centred prior with a given tau above 0 and below inf; "
                f"here prior_form is {self.prior_form!r} and tau {self.tau}: leave it out, or give --prior_form centered"
            )

    def _check_groups(self) -> None:
        """Check that the options of the prior fit groups of tasks, if there are any."""
        named = self.prior == GROUPED
        if self.task_group_column is None:
            if named:
                raise InputError(f"prior {GROUPED} needs groups of tasks; name the column of their groups (task_group_column)")
            if self.tau_group != LEARNED:
                raise InputError(f"tau_group is {self.tau_group}, but there are no groups of tasks; name their task_group_column")
            return
        if self.prior is not None and not named:
            raise InputError(
                f"task_group_column is {self.task_group_column!r}, but prior {self.prior} has no groups; leave one of them out"
            )
        if named and self.tau_group != LEARNED:
            raise InputError("prior and tau_group are both given; leave tau_group out, or give it as prior_option")
        for name, usual in (("prior_form", "noncentered"), ("penalty", "normal"), ("start_as", "theta")):
            if getattr(self, name) != usual:
                raise InputError(
                    f"{name} is {getattr(self, name)}, which groups of tasks do not have; leave it or task_group_column out"
                )
        if self.tau in (0, math.inf):
            instead = "leave task_group_column out" if self.tau == 0 else f"give --task_column {self.task_group_column}"
            what = "independent tasks share nothing in a group" if self.tau == 0 else "tasks of a group would have one adapter"
            raise InputError(f"tau is {self.tau:g}: {what}; {instead}, or give a number for tau")

    def _check_likelihood(self) -> None:
        if (kind := LIKELIHOODS.get(self.likelihood)) is None:
            return  # named with the known ones where it is built
        if self.likelihood == "dpo" and self.options_column is None:
            self.options_column = REJECTED
        if kind.reads_options and self.options_column is None:
            raise InputError(f"likelihood {self.likelihood} observes answers among options; name their column (options_column)")
        given = {"likelihood_unit": self.likelihood_unit != "tokens", "option_score": self.option_score is not None}
        for name, argument in (("likelihood_unit", "unit"), ("option_score", "option_score")):
            if given[name] and argument not in member_options(kind):
                raise InputError(
                    f"{name} is {getattr(self, name)}, which likelihood {self.likelihood} does not have; leave it out"
                )
