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
    slots = {slot.name: [slot.layers, slot.out_features, slot.in_features, [*slot.blocks]] for slot in model.backbone.slots}
    return {
        "adapter": plain(model.adapter),
        "prior": plain(model.prior),
        "likelihood": plain(model.likelihood),
        "router": plain(model.router),
        "slots": slots,
    }


def is_described(model: BoRA, description: Any) -> bool:
    """Whether a stored description is that of a model.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano", layers="0-1"), 2)
    >>> other = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano", layers="2-3"), 2)
    >>> is_described(model, describe(model)), is_described(model, describe(other))
    (True, False)
    """
    now = describe(model)
    if not isinstance(description, dict) or not same_slots(description.get("slots"), now["slots"]):
        return False
    return bool(description | {"slots": None} == now | {"slots": None})


def same_slots(stored: Any, slots: Mapping[str, list[Any]]) -> bool:
    """Whether stored slots are those of a description. Older ones do not say in which blocks the layers are.

    >>> slots = {"q_proj": [2, 8, 8, [0, 1]]}
    >>> [same_slots({"q_proj": stored}, slots) for stored in ([2, 8, 8, [0, 1]], [2, 8, 8], [2, 8, 8, [2, 3]], [])]
    [True, True, False, False]
    """
    if not isinstance(stored, dict) or stored.keys() != slots.keys():
        return False
    return all(stored[name] in (slot, slot[:3]) for name, slot in slots.items())


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
