"""The kinds of runs: what marks the folder of each, and the class of the options in its ``config.yaml``.

>>> import tempfile
>>> from bora_pyro.runs.map_fit import run_map_fit
>>> options = {"num_tasks": 2, "rank": 2, "max_tokens": 32, "max_train_documents": 2, "max_eval_documents": 2, "epochs": 1}
>>> with tempfile.TemporaryDirectory() as folder:
...     metrics = run_map_fit(MapFitConfig(output_dir=f"{folder}/run", **options), quiet=True)
...     kind_of(RunFolder.open(f"{folder}/run"))
'run'

A new kind of run is a name and a class in `KINDS`, and what `kind_of` knows it by.
"""

from __future__ import annotations

from typing import Any

from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.ensemble import EnsembleConfig
from bora_pyro.runs.config.federated import FederatedConfig
from bora_pyro.runs.config.federated_client import FederatedClientConfig
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.meta_fit import MetaFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.config.reward_fit import RewardFitConfig
from bora_pyro.runs.config.route_fit import RouteFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import CLIENTS, FIT, MEMBERS, REWARD, SERVER, TASK_NORMAL
from bora_pyro.runs.results import GIVEN
from bora_pyro.runs.results import ROUTED as ROUTED_PRIOR

MAP, ENSEMBLE, POSTERIOR, ADAPTATION = "run", "ensemble", "posterior", "adaptation"
ROUTED, META, FEDERATED, CLIENT = "routed run", "meta-fit", "federated fit", "client of a federated fit"
REWARDED = "fit from rewards"

#: The class of the options in the ``config.yaml`` of each kind.
KINDS: dict[str, type[Any]] = {
    MAP: MapFitConfig,
    ENSEMBLE: EnsembleConfig,
    FEDERATED: FederatedConfig,
    CLIENT: FederatedClientConfig,
    REWARDED: RewardFitConfig,
    META: MetaFitConfig,
    POSTERIOR: PosteriorFitConfig,
    ADAPTATION: AdaptConfig,
    ROUTED: RouteFitConfig,
}
#: Kinds that were made from another fit, whose options are in ``fit.yaml``.
AROUND_A_FIT = (POSTERIOR, ADAPTATION, ROUTED)
# Kinds by an option that they alone have.
_BY_OPTION = {MEMBERS: ENSEMBLE, CLIENTS: FEDERATED, SERVER: CLIENT, REWARD: REWARDED}


def kind_of(folder: RunFolder) -> str:
    """The kind of a finished run.

    Raises:
        InputError: its configuration or its posterior cannot be read.
    """
    metadata = folder.load_metadata("posterior")
    if (folder.path / FIT).is_file():
        return {GIVEN: ADAPTATION, ROUTED_PRIOR: ROUTED}.get(str(metadata.get("prior")), POSTERIOR)
    config = folder.read_config()
    of_guide = META if metadata.get("guide") == TASK_NORMAL else MAP
    return next((kind for option, kind in _BY_OPTION.items() if option in config), of_guide)
