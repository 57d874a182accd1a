"""The JSON schema (draft 2020-12) of a configuration dataclass, with which an editor completes and checks a YAML file.

>>> from dataclasses import dataclass
>>> from bora_pyro.options.field import option
>>> @dataclass
... class Walk:
...     steps: int = option(10, "how many steps to take")
>>> json_schema(Walk)["properties"]
{'steps': {'description': 'how many steps to take', 'type': 'integer', 'default': 10}}

The schema is stricter than the command line in one way: it does not accept a number or a boolean that is written as a text.
It has no rules about combinations of options; the configuration's ``validate`` checks those.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def json_schema(cls: type) -> dict[str, Any]:
    """The schema of a configuration: the type, default, choices and help of each option. No other key is allowed.

    JSON has no infinity, so a number may also be the text ``inf``.

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
    """Each option's plain type, and whether None is allowed. ``list[str]`` counts as list, ``str | list[str]`` as tuple.

    None is also allowed if it is the default, even if the type does not say so.
    """
    kinds: dict[str, tuple[type, bool]] = {}
    open_to_none = {field.name for field in dataclasses.fields(cls) if field.default is None}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        optional = type(None) in parts or name in open_to_none
        if str in parts and list[str] in parts:
            kinds[name] = (tuple, optional)
            continue
        # `float | str` counts as float and `bool | str` as bool: the texts that are allowed are the field's `words`
        hint = next(part for part in parts if part is not type(None))
        kinds[name] = (get_origin(hint) or hint, optional)
    return kinds


def _property(field: dataclasses.Field[Any], kind: type, optional: bool) -> dict[str, Any]:
    about = field.metadata
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    several: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
    if default != []:  # an empty default means that the user must give the list
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
