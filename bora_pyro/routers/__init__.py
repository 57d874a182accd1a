"""Routers: which adapter, or which mixture of adapters, reads a token."""

from bora_pyro.routers.base import AdaptedModel, Router
from bora_pyro.routers.by_task import ByTask

#: Routers by the name that a configuration gives them.
ROUTERS: dict[str, type[Router]] = {"by_task": ByTask}

__all__ = ["ROUTERS", "AdaptedModel", "ByTask", "Router"]
