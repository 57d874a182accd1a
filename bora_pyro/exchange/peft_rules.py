"""Where PEFT puts the adapter of a folder on a given base: the rules of PEFT 0.21, restated so that PEFT need not be installed.

>>> from bora_pyro import Backbone
>>> backbone = Backbone.from_pretrained("builtin:nano")
>>> paths = [path for slot in backbone.slots for path in slot.paths]
>>> target_modules(backbone.model, paths), misread_layers(backbone.model, paths)
(['q_proj', 'v_proj'], {})

A folder names its layers twice, by ``target_modules`` in its configuration and by the names of its tensors. PEFT rewrites both
for some architectures. Transformers 5 has fused the routed experts of mixtures of experts into single tensors. So that earlier
adapters still load, PEFT gives what is called ``gate_proj``, ``up_proj`` or ``down_proj`` in such a base to the fused experts,
also if a dense layer or a shared expert is meant. It also applies the renamings by which transformers reads old checkpoints.
These can change the name of a layer that has the new name already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from bora_pyro.backbone.experts import fused_experts

# Last names of layers whose adapters PEFT gives to the fused experts, by the kind of mixture of experts.
_FUSED = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
# Last names of layers that PEFT refuses to adapt, by the type of the base.
_REFUSED = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"out_proj", "conv1d"}))
_PREFIX = "base_model.model."


def target_modules(model: nn.Module, paths: Collection[str]) -> list[str] | str:
    """The value of ``target_modules`` that selects exactly these layers.

    Args:
        model: the base.
        paths: the paths of the layers.

    Returns:
        The last parts of the paths if no other module has such a name, else the whole paths. PEFT takes a path as the end of
        others, so if one is the end of another module's path, the result is a pattern of all paths.
    """
    wanted, modules = set(paths), [path for path, _ in model.named_modules()]
    for targets in ({_last(path) for path in wanted}, wanted):
        if set(_matches(targets, modules)) == wanted:
            return sorted(targets)
    return "|".join(re.escape(path) for path in sorted(wanted))


def adapted_modules(model: nn.Module, targets: Sequence[str] | str) -> set[str]:
    """The paths of the modules that PEFT adapts for a value of ``target_modules``.

    Args:
        model: the base.
        targets: names of layers, or a pattern of whole paths.
    """
    modules, fused = [path for path, _ in model.named_modules()], _fused_names(model)
    if isinstance(targets, str):
        found = {path for path in modules if re.fullmatch(targets, path)}
        if not fused:
            return found
        targets = sorted({_last(path) for path in found})  # PEFT goes on with the last names alone
    return set(_matches({target for target in targets if _last(target) not in fused}, modules))


def misread_layers(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """The layers whose adapters a PEFT folder cannot describe faithfully.

    Args:
        model: the base.
        paths: the paths of the adapted layers.

    Returns:
        By the path of the layer, why: a clause about PEFT.
    """
    fused, refused = _fused_names(model), _REFUSED.get(_type_of(model), frozenset())
    renamed, places = _renaming(model), _places(model)
    reasons: dict[str, str] = {}
    for path in paths:
        if _last(path) in fused:
            reasons[path] = "PEFT gives the adapter of a layer of that name to the fused experts of this base"
        elif _last(path) in refused:
            reasons[path] = "PEFT refuses to adapt that layer of a state-space model"
        elif (name := renamed(path)) != path:
            reasons[path] = f"PEFT changes its name to {name!r}"
        elif places.get(path, 1) > 1:
            reasons[path] = "the layer is used at several places of the base, and PEFT adapts one of them"
    rest = [path for path in paths if path not in reasons]
    if rest and (others := adapted_modules(model, target_modules(model, rest)) ^ set(rest)):
        reasons |= dict.fromkeys(sorted(others), "no target_modules of PEFT separates it from the adapted layers")
    return reasons


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _type_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _matches(targets: Collection[str], modules: Iterable[str]) -> list[str]:
    """The modules whose path is a target, or ends with one after a dot."""
    found = []
    for path in modules:
        rest = path
        while rest:
            if rest in targets:
                found.append(path)
                break
            rest = rest.partition(".")[2]
    return found


def _fused_names(model: nn.Module) -> frozenset[str]:
    """Last names of layers whose adapters PEFT gives to fused experts; empty for most bases."""
    if _type_of(model) == "mixtral":
        return _FUSED["mixtral"]
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as kinds  # as PEFT does
    except ImportError:  # another version of transformers: assume the worst
        return frozenset().union(*_FUSED.values()) if fused_experts(model) else frozenset()
    return _FUSED.get(kinds.get(_type_of(model), ""), frozenset())


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """The change of a layer's path when PEFT applies the renamings of transformers to the names of the tensors."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a version of transformers without them; PEFT renames nothing there
        return lambda path: path
    if get_checkpoint_conversion_mapping(_type_of(model)) is None:
        return lambda path: path
    mapping: Any = get_model_conversion_mapping(model)
    renamings = [WeightRenaming(f"{_PREFIX}model.", "model."), WeightRenaming(_PREFIX, "")]
    renamings += [one for one in mapping if isinstance(one, WeightRenaming)]

    def renamed(path: str) -> str:
        ending = ".lora_A.weight"
        key = f"{_PREFIX}{path}{ending}"
        found = rename_source_key(key, renamings, [])[0]
        # PEFT undoes a renaming that took away the beginning of the name
        return path if key.endswith(found) else found.removeprefix(_PREFIX).removesuffix(ending)

    return renamed


def _places(model: nn.Module) -> dict[str, int]:
    """In how many places each module stands directly in others, for modules with several places."""
    counts: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            counts[id(child)] = counts.get(id(child), 0) + 1
    return {path: counts[id(module)] for path, module in model.named_modules() if counts.get(id(module), 0) > 1}
