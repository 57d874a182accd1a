"""The command line: which commands there are, and which configuration each one reads."""

from __future__ import annotations

from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig

#: Configurations that files are written of, by the script that reads them: a file given to another script is told by its options.
CONFIGURATIONS: dict[str, type] = {
    "map_fit.py": MapFitConfig,
    "posterior_fit.py": PosteriorFitConfig,
    "adapt.py": AdaptConfig,
}
