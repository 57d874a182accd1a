"""What a server and its clients must have in common, and the first thing in which they differ.

>>> difference({"options": {"rounds": 20}}, {"options": {"rounds": 10}})
'options.rounds is 10 at the client and 20 at the server'
>>> difference({"start": {"q_proj.lora_A": [0.5]}}, {"start": {"q_proj.lora_A": [0.5000001]}})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bora_pyro.errors import shown

# A start is rounded otherwise on another machine.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6


def difference(of_server: Any, of_client: Any, *, name: str = "") -> str | None:
    """The first difference between what the server has and what a client says that it has; None if there is none.

    Args:
        of_server: values for JSON, mappings by name.
        of_client: the same of the client; it may be anything.
        name: where in the mappings they stand.
    """
    if isinstance(of_server, Mapping) and isinstance(of_client, Mapping):
        for key in [*of_server, *(key for key in of_client if key not in of_server)]:
            place = f"{name}.{key}" if name else str(key)
            if key not in of_client or key not in of_server:
                return f"{place} is missing at the {'client' if key in of_server else 'server'}"
            if found := difference(of_server[key], of_client[key], name=place):
                return found
        return None
    if _equal(of_server, of_client):
        return None
    return f"{name} is {shown(of_client)} at the client and {shown(of_server)} at the server"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if {type(one), type(other)} <= {int, float}:
        return one == other or math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return type(one) is type(other) and bool(one == other)
