"""The configuration of a deep ensemble of MAP fits.

>>> config = EnsembleConfig(members=3, seed=7, output_dir="runs/ensemble")
>>> members = [config.member(k, f"{config.output_dir}/members/{k}") for k in range(3)]
>>> [(member.seed, member.split_seed) for member in members]
[(7, 7), (1007, 7), (2007, 7)]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bora_pyro.options.field import by_heading, changed, option, part_of
from bora_pyro.runs.config.groups import AUTO, HEADINGS
from bora_pyro.runs.config.map_fit import MapFitConfig

#: Between the seeds of two members. Ensembles of neighbouring seeds then have no member in common.
SEED_STEP = 1000


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class EnsembleConfig(MapFitConfig):
    """Fit a deep ensemble: several MAP fits of the same documents, each with a start and an order of documents of its own."""

    members: int = option(
        4,
        f"K, the number of MAP fits; member k has the seed of the ensemble plus {SEED_STEP} k, and the split of member 0",
        group="optimisation",
        least=2,
        most=100,
    )
    seed: int = changed(MapFitConfig, "seed", 0, "seed of the split, and of the start and the order of documents of member 0")
    export_adapters: bool = changed(
        MapFitConfig,
        "export_adapters",
        True,
        "write the adapters of the best member as PEFT folders; false: for targets that such a folder cannot describe",
    )
    output_dir: str = changed(MapFitConfig, "output_dir", "runs/ensemble")

    def validate(self) -> None:
        """Check every value that can be checked without the data and the model.

            >>> EnsembleConfig(members=1).validate()
            Traceback (most recent call last):
            bora_pyro.errors.InputError: members is 1; give a whole number from 2 up

        Raises:
            InputError: one line with the value and what is allowed.
        """
        super().validate()
        self.member(self.members - 1, self.output_dir).validate()  # its seed is the largest

    def member(self, number: int, output_dir: str) -> MapFitConfig:
        """The configuration of member ``number``, from 0, in a folder of its own. Its run is resumed if it has begun."""
        return dataclasses.replace(
            part_of(self, MapFitConfig),
            seed=self.seed + SEED_STEP * number,
            split_seed=self.seed_of_split,
            output_dir=output_dir,
            overwrite=False,
            resume=AUTO,
            export_adapters=False,
        )
