"""The reward that a configuration names: ``builtin:length``, or a function of the user's own code, ``module:function``.

>>> named_reward("builtin:regex", ["pattern=[0-9]"])("", "room 12", "ada")
2.0
>>> named_reward("my_rewards:score")
Traceback (most recent call last):
bora_pyro.errors.InputError: reward 'my_rewards:score' is code that would run on this machine; give --trust_reward_code ...

The name alone never runs code: a configuration file may come from anybody.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.options.members import build_member
from bora_pyro.rewards.functions import REWARDS
from bora_pyro.rewards.judge import Reward

#: Before the name of a reward of this library.
BUILTIN = "builtin:"


def named_reward(
    name: str,
    options: Sequence[str] | None = None,
    *,
    trusted: bool = False,
    more: Mapping[str, Callable[..., Reward]] | None = None,
) -> Reward:
    """The reward with a name.

    Args:
        name: ``builtin:NAME``, or ``module:function``.
        options: arguments of a built-in reward, ``key=value``.
        trusted: whether the user's own code may run. The module is looked for where Python looks, and then in the current folder.
        more: further built-in rewards by name.

    Raises:
        InputError: there is no such reward, an option is not allowed, the code is not trusted, or it cannot be imported.
    """
    known: dict[str, Any] = {**REWARDS, **(more or {})}
    if name.startswith(BUILTIN):
        return build_member("reward", known, name.removeprefix(BUILTIN), _with_needed(known, name, options or ()))
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        builtin = [f"{BUILTIN}{key}" for key in known]
        raise InputError(f"reward is {shown(name)}; give module:function, or {', '.join(builtin)}{nearest(name, builtin)}")
    if options:
        raise InputError(f"reward_option is {shown(list(options))}, but reward {shown(name)} is no built-in one; leave it out")
    if not trusted:
        raise InputError(
            f"reward {shown(name)} is code that would run on this machine; give --trust_reward_code true if you trust it, or one "
            f"of {', '.join(f'{BUILTIN}{key}' for key in known)}"
        )
    return _imported(module, function)


def _with_needed(known: Mapping[str, Any], name: str, options: Sequence[str]) -> Sequence[str]:
    """The options, if those are there that have no default."""
    given = {text.partition("=")[0] for text in options}
    needed = {"regex": "pattern", "log_likelihood": "run"}.get(name.removeprefix(BUILTIN))
    if needed is not None and needed not in given:
        raise InputError(f"reward {name} needs an option; give --reward_option {needed}=...")
    return options


def _imported(module: str, function: str) -> Reward:
    if os.getcwd() not in sys.path:
        # last, so that a file here does not hide a module of the same name; it stays, for what the code imports later
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the code may raise anything
        raise InputError(f"reward module {shown(module)} cannot be imported ({type(error).__name__}: {error})") from error
    value: Any = found
    for part in function.split("."):
        if not hasattr(value, part):
            names = [key for key in vars(found) if not key.startswith("_") and callable(getattr(found, key))]
            raise InputError(f"reward module {shown(module)} has no {shown(function)}{nearest(function, names)}")
        value = getattr(value, part)
    if not callable(value):
        raise InputError(f"reward {module}:{function} is {shown(value)}; give a function (prompt, text, task) -> number")
    return value
