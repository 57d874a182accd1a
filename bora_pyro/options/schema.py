"""A configuration dataclass as a JSON schema (draft 2020-12): what an editor needs to complete and to check a YAML file.

>>> from dataclasses import dataclass
>>> from bora_pyro.options.field import option
>>> @dataclass
... class Walk:
...     steps: int = option(10, "how many steps to take")
>>> json_schema(Walk)["properties"]
{'steps': {'description': 'how many steps to take', 'type': 'integer', 'default': 10}}

It is stricter than the command line's reader in one thing: a value must be of its type, where the reader also takes its text.
What several options may not be together is for the configuration's ``validate`` to say.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def json_schema(cls: type) -> dict[str, Any]:
    """The schema of a configuration: each option's type, default, choices and help; no other key is allowed.

    JSON has no infinity: a number may also be the text ``inf``, as on the command line and where YAML has ``.inf``.

    Args:
        cls: a dataclass whose fields are made by ``option``.
    """
    kinds = option_types(cls)
    return {
        "$schema": DRAFT,
        "title": cls.__name__,
        "description": (cls.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": {field.name: _property(field, *kinds[field.name]) for field in dataclasses.fields(cls)},
        "additionalProperties": False,
    }


def option_types(cls: type) -> dict[str, tuple[type, bool]]:
    """Name -> (plain type, whether None is allowed); ``list[str]`` counts as list, ``str | list[str]`` as tuple."""
    kinds: dict[str, tuple[type, bool]] = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if str in parts and list[str] in parts:
            kinds[name] = (tuple, type(None) in parts)
            continue
        # of `float | str` the number, of `bool | str` the truth: the texts that it may be are its `words`
        hint = next(part for part in parts if part is not type(None))
        kinds[name] = (get_origin(hint) or hint, type(None) in parts)
    return kinds


def _property(field: dataclasses.Field[Any], kind: type, optional: bool) -> dict[str, Any]:
    about = field.metadata
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    several: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
    if default != []:  # one that is to be given has no default but none
        several["minItems"] = 1
    allowed: list[dict[str, Any]] = [several if kind in (list, tuple) else {"type": _TYPES[kind]}]
    words = [*(["inf"] if kind is float else []), *about.get("words", ())]
    if about.get("choices"):
        allowed = [{"enum": list(about["choices"])}]
    elif kind is tuple:
        allowed.append({"type": "string"})
    elif words:
        allowed.append({"enum": words})
    if optional:
        allowed.append({"type": "null"})
    if isinstance(default, float) and math.isinf(default):
        default = "inf"
    types = allowed[0] if len(allowed) == 1 else {"anyOf": allowed}
    return {"description": about.get("help", ""), **types, "default": default}
