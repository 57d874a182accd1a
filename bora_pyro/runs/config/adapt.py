"""The configuration of an adaptation to new tasks.

>>> config = parse_config(AdaptConfig, ["runs/demo", "--data", "new.csv", "--guide", "normal"])
>>> config.run, config.data, config.guide
('runs/demo', 'new.csv', 'normal')
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.data.options import DATA
from bora_pyro.errors import InputError
from bora_pyro.inference.adapt import ALLOWED
from bora_pyro.inference.options import RUN, FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import by_heading, changed, option
from bora_pyro.runs.config.groups import BaseOptions, RunOptions, check_device
from bora_pyro.runs.config.new_documents import NewDocuments

__all__ = ["AdaptConfig", "parse_config"]

ADAPTATION = "adaptation"


@by_heading("options", DATA, ADAPTATION, RUN)
@dataclass(kw_only=True)
class AdaptConfig(NewDocuments):
    """Adapt a finished fit to new tasks with few documents each: Theta and tau stay fixed, the new deviations are inferred."""

    run: str = option("", "folder of the fit, its output_dir", positional=True)

    task_group: str | None = option(
        None,
        "the group of the fit that all new tasks belong to, if the fit has groups of tasks (default: none of them)",
        group=ADAPTATION,
        filled=True,
    )
    guide: str | None = option(
        None,
        "how the posterior is approximated; map is a point estimate (default: map; for a run of meta-fit its inner steps)",
        group=ADAPTATION,
        choices=ALLOWED,
    )
    steps: int | None = option(
        None,
        "optimiser steps of each task, rounded up to whole passes over its documents (default: 60; the inner steps of a run of "
        "meta-fit, where 0 gives its prior)",
        group=ADAPTATION,
        least=0,
    )
    learning_rate: float | None = changed(
        FitOptions,
        "learning_rate",
        None,
        "AdamW's largest learning rate (default: 0.01; the inner rate of a run of meta-fit)",
        group=ADAPTATION,
    )
    scale: float = option(
        0.1, "initial standard deviations in units of the prior's, for guides that learn them", group=ADAPTATION, positive=True
    )
    start_from_generator: str | None = option(
        None,
        "folder of a generator, in whose adapters the new tasks begin; the prior stays the same (default: they begin at Theta)",
        group=ADAPTATION,
        filled=True,
    )
    token_budget: int | None = changed(
        FitOptions, "token_budget", None, "tokens of a batch, padding included (default: as in the fit)", group=ADAPTATION
    )
    seed: int = changed(FitOptions, "seed", 0, "seed of the order of the documents and of the guide's draws", group=ADAPTATION)

    trust_remote_code: bool = changed(BaseOptions, "trust_remote_code", False, group=RUN)
    device: str = changed(BaseOptions, "device", "auto")
    threads: int | None = changed(RunOptions, "threads", None)
    output_dir: str = changed(RunOptions, "output_dir", "runs/adapted", "folder of the new run")
    overwrite: bool = changed(RunOptions, "overwrite", False)

    def validate(self) -> None:
        """Check every value that can be checked without the run.

            >>> AdaptConfig(run="runs/demo", data="new.csv", steps=-1).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: steps is -1; give a whole number from 0 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in adapt.py runs/map_fit --data new.csv")
        super().validate()
        check_device(self.device)
