"""The seed: an option that the data, the model and the fit share."""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.options.field import option


@dataclass(kw_only=True)
class Seeded:
    """Options with a seed.

    >>> Seeded()
    Seeded(seed=0)
    """

    seed: int = option(
        0, "seed of the split, the start and the order of the documents", group="optimisation", least=0, most=2**32 - 1
    )
