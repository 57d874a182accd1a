"""Describe a model in plain values. A run folder stores the description and compares it when the run is read.

>>> from bora_pyro.priors import HierarchicalNormal, Pooled
>>> plain(HierarchicalNormal(tau=100))
{'class': 'HierarchicalNormal', 'tau': 100.0, 'form': 'noncentered'}
>>> plain(Pooled())
{'class': 'Pooled'}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bora_pyro.adapters import Adapter
from bora_pyro.likelihoods import Likelihood
from bora_pyro.model import BoRA
from bora_pyro.priors import Prior
from bora_pyro.routers import Router

Member = Adapter | Prior | Likelihood | Router
# Where learning begins: it does not matter after the fit.
_BEGINNING = "start"


def describe(model: BoRA) -> dict[str, Any]:
    """Describe the members of a model and its slots, in values for JSON.

    The description leaves out what is learned, and where learning begins.
    """
    slots = {slot.name: [slot.layers, slot.out_features, slot.in_features] for slot in model.backbone.slots}
    return {
        "adapter": plain(model.adapter),
        "prior": plain(model.prior),
        "likelihood": plain(model.likelihood),
        "router": plain(model.router),
        "slots": slots,
    }


def plain(value: Member) -> dict[str, Any]:
    """Describe a member of an axis: its class, and its fields that are numbers, rows of numbers, texts or other members."""
    return {"class": type(value).__name__} | _fields(value)


def _fields(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in vars(value).items():
        if name.startswith("_") or name == _BEGINNING:
            continue
        if isinstance(field, bool | int | float | str):
            found[name] = field
        elif isinstance(field, tuple) and field and all(isinstance(item, int | float) for item in field):
            found[name] = list(field)
        elif isinstance(field, Member):
            found[name] = plain(field)
        elif isinstance(field, Mapping) and field and all(isinstance(item, Member) for item in field.values()):
            found[name] = {key: plain(item) for key, item in field.items()}
    return found
