"""Reading of the file ``adapter_config.json`` of a PEFT folder with a LoRA adapter.

    >>> import json, tempfile
    >>> file = Path(tempfile.mkdtemp(), "adapter_config.json")
    >>> _ = file.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
    ...                                 "alpha_pattern": {"v_proj": 8}}))
    >>> config = read_peft_config(file)
    >>> config.rank_of("layers.0.q_proj"), config.scaling_of("layers.0.q_proj"), config.scaling_of("layers.0.v_proj")
    (2, 2.0, 4.0)

The file may come from an untrusted source. Its patterns are only used if they are so simple that matching always ends soon. An
option that is unknown here must be off.
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

#: The largest configuration file in bytes. Typical files have some kilobytes.
CONFIG_BYTES = 2**20

# PEFT options that are read below, and options that do not affect predictions. Any other option must be off. The adapted layers
# are known from the names of the tensors.
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type", "r",
    "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
# Initialisations that leave the base unchanged. Others (PiSSA, OLoRA, LoftQ, ...) move a part of the base into the adapter.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
#: The largest number of entries of ``rank_pattern`` and ``alpha_pattern``. Large models have some thousands of layers.
MAX_PATTERNS = 2**12
# Names of layers and alternatives of names. A dot matches any character, as in PEFT. Nothing repeats, so matching ends soon.
_PLAIN_KEY = re.compile(r"(?:[\w.^$|-]|\\\.){1,400}", re.ASCII)

#: Pairs of a pattern of layer paths and a number, in order.
Patterns = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class PeftConfig:
    """The options of one adapter.

    Attributes:
        base_model: the name of the base; empty if the file has none.
        rank: r of the layers that ``ranks`` does not match.
        alpha: α of the layers that ``alphas`` does not match.
        rslora: whether the adapter is rsLoRA, whose scale is α/√r instead of α/r.
        targets: names of layers, or one pattern of their paths.
        partial: whether the adapter may leave out some of the layers in ``targets``.
        ranks: r by layer, from ``rank_pattern``. The first pattern that matches the path of a layer counts.
        alphas: α by layer, from ``alpha_pattern``. The first pattern that matches the path of a layer counts.
    """

    base_model: str
    rank: int
    alpha: float
    rslora: bool
    targets: str | tuple[str, ...]
    partial: bool
    ranks: Patterns
    alphas: Patterns

    @property
    def scaling(self) -> float:
        """The factor of B A in layers that no pattern matches: α/r, or α/√r for rsLoRA."""
        return _scaling(self.alpha, self.rank, self.rslora)

    def rank_of(self, path: str) -> int:
        """r of the layer with this path."""
        return int(_first_match(self.ranks, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """The factor of B A in the layer with this path."""
        return _scaling(_first_match(self.alphas, path, self.alpha), self.rank_of(path), self.rslora)

    def may_adapt(self, path: str) -> bool:
        """Whether PEFT may adapt the layer with this path. It is always True if ``targets`` is a pattern, which is not run."""
        return isinstance(self.targets, str) or any(path == name or path.endswith(f".{name}") for name in self.targets)

    def must_adapt(self, path: str) -> bool:
        """Whether PEFT always adapts the layer with this path."""
        return not self.partial and self.may_adapt(path)


def read_peft_config(file: Path) -> PeftConfig:
    """Read an ``adapter_config.json``.

    Raises:
        InputError: if the file is damaged or too large, is not of plain LoRA or rsLoRA, or has an option that cannot be read.
    """
    config = _read_mapping(file)
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if not _is_rank(rank):
        raise InputError(f"{file} has r {shown_json(rank)}; it is a whole number from 1 up")
    if not _is_alpha(alpha):
        raise InputError(f"{file} has lora_alpha {shown_json(alpha)}; it is a positive, finite number")
    if not isinstance(rslora, bool):
        raise InputError(f"{file} has use_rslora {shown_json(rslora)}; it is true or false")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise InputError(f"{file} has target_modules {shown_json(targets)}; it is a text or a list of texts")
    partial = any(config.get(name) not in (None, [], "") for name in ("layers_to_transform", "exclude_modules"))
    return PeftConfig(
        base_model=str(config.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=float(alpha),
        rslora=rslora,
        targets=targets if isinstance(targets, str) else tuple(targets),
        partial=partial or isinstance(targets, str),
        ranks=_by_layer(file, config, "rank_pattern"),
        alphas=_by_layer(file, config, "alpha_pattern"),
    )


def shown_json(value: Any) -> str:
    """A value as JSON text, shortened to at most 120 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_mapping(file: Path) -> dict[str, Any]:
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
    allowed = {
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "bias": (None, "none"),
        "init_lora_weights": _INITIALISATIONS,
    }
    for name, values in allowed.items():
        value = config.get(name)
        if not any(value is one or (isinstance(value, str) and value == one) for one in values):
            words = ", ".join("not given" if one is None else json.dumps(one) for one in values)
            raise InputError(f"{file} has {name} {shown_json(value)}; only LoRA adapters whose {name} is {words} are read")
    for name, value in config.items():
        if name not in _READ | _NEUTRAL and value:
            raise InputError(f"{file} has {name} {shown_json(value)}; only plain LoRA and rsLoRA are read: {name} must be off")
    return config


def _by_layer(file: Path, config: Mapping[str, Any], name: str) -> Patterns:
    """The entries of ``rank_pattern`` or ``alpha_pattern``. PEFT uses their keys as patterns of layer paths."""
    given = config.get(name) or {}
    valid, what = (_is_rank, "a whole number from 1 up") if name == "rank_pattern" else (_is_alpha, "a positive, finite number")
    if not isinstance(given, dict):
        raise InputError(f"{file} has {name} {shown_json(given)}; it is a mapping of names of layers")
    if len(given) > MAX_PATTERNS:
        raise InputError(f"{file} has {name} with {len(given)} names of layers; at most {MAX_PATTERNS} are read")
    for key, value in given.items():
        if not _PLAIN_KEY.fullmatch(key):
            raise InputError(
                f"{file} has {name} with the pattern {shown_json(key)}, which is not run; write out the names of the layers"
            )
        if not valid(value):
            raise InputError(f"{file} has {name} with {shown_json(value)} for {shown_json(key)}; it is {what}")
    # PEFT matches keys in the same way
    return tuple((re.compile(rf"(.*\.)?({key})$"), float(value)) for key, value in given.items())


def _first_match(patterns: Patterns, path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _scaling(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _is_rank(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_alpha(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
