"""Routers: which adapter, or which mixture of adapters, reads a token."""

from bora_pyro.routers.base import AdaptedModel, Router
from bora_pyro.routers.by_task import ByTask
from bora_pyro.routers.meteora import MeteoRA

#: Routers by the name that the configuration of a fit gives them.
ROUTERS: dict[str, type[Router]] = {"by_task": ByTask}
#: Routers whose gates are fitted to finished adapters, by the name that ``bora route-fit`` gives them.
GATED_ROUTERS: dict[str, type[MeteoRA]] = {"meteora": MeteoRA}

__all__ = ["GATED_ROUTERS", "ROUTERS", "AdaptedModel", "ByTask", "MeteoRA", "Router"]
