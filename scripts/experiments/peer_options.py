"""What ``compare_peers.py`` and each of its fits share: the options of the fits, and the names of the arms. Quick to import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fit_options import OF_PRIOR, check_usual

from bora_pyro.errors import InputError
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import check_fields, option
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Arms through PEFT that are trained.
THROUGH_PEFT = ("peft_one", "peft_each", "peft_one_then_each", "peft_task_id", "peft_big")
#: Options of a fit that the arms through PEFT do not have, and those that the arms themselves set.
NOT_IN_PEFT = (
    "adapter", "router", "likelihood", "likelihood_unit", "task_weights", "task_group_column", "accumulate", "start_from",
    "temperature", "tau_documents",
)  # fmt: skip
OF_THE_ARMS = (*OF_PRIOR, "tau_per", "tau_start")
BORA = "bora_"
#: Ending of an arm of this library that reads the name of the task as the first line of each document.
NAMED = "_task_id"
#: Arms that come with ``peft_each``: the mean of (A, B) over tasks, and the mean of the changes B A.
SOUPS = ("peft_soup", "peft_soup_delta")


@dataclass(kw_only=True)
class FitOf:
    """The options that all fits of a comparison share."""

    fit_config: str = option("results/documentation.yaml", "YAML file of the options that all fits share")
    data: str | list[str] | None = option(None, "the documents (default: as in fit_config)")
    base_model: str | None = option(None, "the frozen language model (default: as in fit_config)")
    precision: str | None = option(
        None, "arithmetic of the frozen model (default: as in fit_config)", choices=("float32", "bfloat16")
    )
    average: bool = option(
        True, "measure the mean of the steps beside the last step after each epoch, in every arm, and keep the better one"
    )
    threads: int = option(1, "CPU threads of a fit", least=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")

    def words(self) -> list[str]:
        """The command line of ``map_fit.py`` for what is shared."""
        given = {name: getattr(self, name) for name in ("data", "base_model", "precision", "average", "threads", "device")}
        given = {name: value for name, value in given.items() if value is not None}
        pairs = ((f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in given.items())
        return ["--config", self.fit_config, *chain.from_iterable(pairs)]

    def fit(self, **changes: Any) -> MapFitConfig:
        """The configuration of a fit.

        Raises:
            InputError: it has an option that not all arms can follow.
        """
        config = dataclasses.replace(parse_config(MapFitConfig, self.words()), **changes)
        check_usual(config, NOT_IN_PEFT, file=self.fit_config, why="the arms through PEFT do not have it")
        check_usual(config, OF_THE_ARMS, file=self.fit_config, why="each arm has its own prior")
        return config
