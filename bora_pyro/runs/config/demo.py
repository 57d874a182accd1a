"""The configuration of the demo: a MAP fit of the embedded base to the embedded data, in minutes on a laptop.

    >>> config = DemoConfig()
    >>> config.base_model, config.data, config.epochs, config.output_dir
    ('builtin:nano', 'builtin:documentation', 3, 'runs/demo')

Every option of a MAP fit can be given; those below have other defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from bora_pyro.options.field import by_heading, changed
from bora_pyro.runs.config.groups import HEADINGS
from bora_pyro.runs.config.map_fit import MapFitConfig


@by_heading(*HEADINGS)
@dataclass(kw_only=True)
class DemoConfig(MapFitConfig):
    """Fit the embedded base model to the embedded data: a MAP fit of some minutes that needs no file and no network."""

    max_tokens: int = changed(MapFitConfig, "max_tokens", 128)
    targets: list[str] | None = changed(MapFitConfig, "targets", ["q_proj", "v_proj", "fc1", "fc2"])
    epochs: int = changed(MapFitConfig, "epochs", 3)
    output_dir: str = changed(MapFitConfig, "output_dir", "runs/demo")
