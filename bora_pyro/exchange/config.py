"""What a PEFT folder's ``adapter_config.json`` says of a LoRA adapter, of those options that can be read exactly.

    >>> import json, tempfile
    >>> file = Path(tempfile.mkdtemp(), "adapter_config.json")
    >>> _ = file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
    ...                                 "alpha_pattern": {"v_proj": 8}}))
    >>> config = read_peft_config(file)
    >>> config.rank_of("layers.0.q_proj"), config.scaling_of("layers.0.q_proj"), config.scaling_of("layers.0.v_proj")
    (2, 2.0, 4.0)

The file may come from anywhere: no pattern in it is run, whose author may mean it never to end, and an option that is not known
here must be off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bora_pyro.errors import InputError

#: The largest configuration that is looked at; one takes kilobytes.
CONFIG_BYTES = 2**20

# Options of PEFT's that are read below, or that say nothing about what the adapter adds when it predicts. The tensors' names
# tell which layers are adapted. Any other option must be off.
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r",
    "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
# First values that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) move a part of the base into the adapter.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
#: The most entries of ``rank_pattern`` and ``alpha_pattern``: large models have some thousands of layers.
PATTERNS = 2**12
# Names, with a dot that PEFT reads as any character, and alternatives of them: nothing that repeats, so a match ends soon.
_PLAIN_KEY = re.compile(r"(?:[\w.^$|-]|\\\.){1,400}", re.ASCII)

#: Numbers by layer: patterns of paths, in order.
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class PeftConfig:
    """The options of one adapter.

    Attributes:
        base_model: what the folder calls its base; empty where it does not say.
        rank: r of the layers for which ``ranks`` has no other.
        alpha: α likewise.
        stabilised: whether it is rsLoRA, whose scale is α/√r.
        targets: names of layers, or a pattern of their paths.
        some_layers: whether the adapter may leave out some of the layers that ``targets`` names.
        ranks: r by layer, ``rank_pattern``; the first that matches a layer's path is its own.
        alphas: α by layer, ``alpha_pattern``.
    """

    base_model: str
    rank: int
    alpha: float
    stabilised: bool
    targets: str | tuple[str, ...]
    some_layers: bool
    ranks: Patterns
    alphas: Patterns

    @property
    def scaling(self) -> float:
        """What B A is multiplied by where no pattern says otherwise: α/r, or α/√r."""
        return _scaling(self.alpha, self.rank, self.stabilised)

    def rank_of(self, path: str) -> int:
        """r of a layer."""
        return int(_first(self.ranks, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """What B A is multiplied by in a layer."""
        return _scaling(_first(self.alphas, path, self.alpha), self.rank_of(path), self.stabilised)

    def names(self, path: str) -> bool:
        """Whether PEFT may adapt this layer; of a pattern it is not known."""
        return isinstance(self.targets, str) or any(path == name or path.endswith(f".{name}") for name in self.targets)

    def needs(self, path: str) -> bool:
        """Whether PEFT surely adapts this layer of a base."""
        return not self.some_layers and self.names(path)


def read_peft_config(file: Path) -> PeftConfig:
    """Read an ``adapter_config.json``.

    Raises:
        InputError: it is damaged or too large, of something else than plain LoRA or rsLoRA, or has an option that cannot be read.
    """
    config = _mapping(file)
    rank, alpha, stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if not _is_rank(rank):
        raise InputError(f"{file} has r {shown_json(rank)}; it is a whole number from 1 up")
    if not _is_alpha(alpha):
        raise InputError(f"{file} has lora_alpha {shown_json(alpha)}; it is a positive, finite number")
    if not isinstance(stabilised, bool):
        raise InputError(f"{file} has use_rslora {shown_json(stabilised)}; it is true or false")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise InputError(f"{file} has target_modules {shown_json(targets)}; it is a text or a list of texts")
    partial = any(config.get(name) not in (None, [], "") for name in ("layers_to_transform", "exclude_modules"))
    return PeftConfig(
        base_model=str(config.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        stabilised=stabilised,
        targets=targets if isinstance(targets, str) else tuple(targets),
        some_layers=partial or isinstance(targets, str),
        ranks=_by_layer(file, config, "rank_pattern"),
        alphas=_by_layer(file, config, "alpha_pattern"),
    )


def shown_json(value: Any) -> str:
    """A value as it stands in the file, cut to a length that a line can hold."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _mapping(file: Path) -> dict[str, Any]:
    try:
        if (size := file.stat().st_size) > CONFIG_BYTES:
            raise InputError(f"{file} has {size} bytes; the configuration of an adapter has {CONFIG_BYTES} at most")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())}); give the one that PEFT wrote") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no mapping; give the one that PEFT wrote")
    allowed = {"peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": (None, "none"), "init_lora_weights": _STARTS}
    for name, values in allowed.items():
        value = config.get(name)
        if not any(value is one or (isinstance(value, str) and value == one) for one in values):
            words = ", ".join("not given" if one is None else json.dumps(one) for one in values)
            raise InputError(f"{file} has {name} {shown_json(value)}; read are LoRA adapters whose {name} is {words}")
    for name, value in config.items():
        if name not in _READ | _NEUTRAL and value:
            raise InputError(f"{file} has {name} {shown_json(value)}; only plain LoRA and rsLoRA are read: {name} must be off")
    return config


def _by_layer(file: Path, config: Mapping[str, Any], name: str) -> Patterns:
    """``rank_pattern`` or ``alpha_pattern``, whose keys PEFT takes for patterns."""
    given = config.get(name) or {}
    fits, what = (_is_rank, "a whole number from 1 up") if name == "rank_pattern" else (_is_alpha, "a positive, finite number")
    if not isinstance(given, dict):
        raise InputError(f"{file} has {name} {shown_json(given)}; it is a mapping of names of layers")
    if len(given) > PATTERNS:
        raise InputError(f"{file} has {name} with {len(given)} names of layers; read are {PATTERNS} at most")
    for key, value in given.items():
        if not _PLAIN_KEY.fullmatch(key):
            raise InputError(
                f"{file} has {name} with the pattern {shown_json(key)}, which is not run; write out the layers' names"
            )
        if not fits(value):
            raise InputError(f"{file} has {name} with {shown_json(value)} for {shown_json(key)}; it is {what}")
    # as PEFT matches them
    return tuple((re.compile(rf"(.*\.)?({key})$"), float(value)) for key, value in given.items())


def _first(patterns: Patterns, path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _scaling(alpha: float, rank: int, stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if stabilised else rank)


def _is_rank(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_alpha(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
