"""The options of an experiment's fits: those of its ``--fit_config``, without the ones that the experiment cannot follow.

>>> check_usual(MapFitConfig(rank=4), ["epochs", "rank"], file="fit.yaml", why="all arms have the same")
Traceback (most recent call last):
bora_pyro.errors.InputError: rank is 4 in fit.yaml; all arms have the same: leave it out
"""

from __future__ import annotations

from collections.abc import Iterable

from bora_pyro.errors import InputError, shown
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Options that choose the prior, apart from ``tau`` itself and what a learned τ has.
OF_PRIOR = ("prior", "prior_option", "prior_form", "penalty")


def check_usual(config: MapFitConfig, names: Iterable[str], *, file: str, why: str) -> None:
    """Check that some options have their defaults.

    Args:
        config: the options of a fit.
        names: the options that the experiment cannot follow.
        file: the YAML file of the options.
        why: why it cannot, for the error message.

    Raises:
        InputError: an option has another value.
    """
    usual = MapFitConfig()
    for name in names:
        if (value := getattr(config, name)) != getattr(usual, name):
            raise InputError(f"{name} is {shown(value)} in {file}; {why}: leave it out")
