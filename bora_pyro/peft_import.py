"""Reading LoRA adapters from PEFT folders, ours and those that PEFT itself wrote.

    >>> import tempfile
    >>> import bora_pyro as bp
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bp.save_peft(Path(folder), model, model.starts)
    ...     weights = load_peft(folder, model)
    >>> all(torch.equal(weights[name], start) for name, start in model.starts.items())
    True

A folder may come from anywhere, so nothing in it is trusted: no pickle is opened, no link out of the folder is followed, and
whatever is not plain LoRA on linear layers is refused by name, rather than read as something that it is not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bora_pyro.adapters import Adapter, LoRA
from bora_pyro.backbone import BUILTIN_BASES, Backbone
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights
from bora_pyro.peft_format import CONFIG, PREFIX, TENSORS, Factors

#: The largest files that are looked at: a configuration takes kilobytes, the header of the tensors some 150 bytes a matrix.
CONFIG_BYTES, HEADER_BYTES = 2**20, 2**24

_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_DTYPES = ("F32", "F16", "BF16")
# Options of PEFT's that are read below, or that say nothing about what the adapter adds when it predicts. The tensors' names
# tell which layers are adapted. Any other option must be off.
_READ = {"bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules", "task_type", "use_rslora"}
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
}  # fmt: skip
# First values that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) move a part of the base into the adapter.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One LoRA adapter as a PEFT folder holds it: each of its layers changes by (α/r) B A.

    Attributes:
        folder: where it was read.
        base_model: what the folder calls its base; empty where it does not say.
        rank: r.
        alpha: α; of rsLoRA, whose scale is α/√r, the α that gives the same scale as α/r.
        factors: ``lora_A`` (r, in) and ``lora_B`` (out, r) by path of the layer, float32.
    """

    folder: Path
    base_model: str
    rank: int
    alpha: float
    factors: Factors

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    @property
    def targets(self) -> list[str]:
        """The kinds of layers that are adapted, as ``Backbone(targets=...)`` takes them."""
        return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", "", path) for path in self.factors))

    def check(self, backbone: Backbone, *, same_base: bool = True) -> None:
        """Raise where the adapter is not one of this base.

        Args:
            backbone: the base, with the layers that are to be adapted.
            same_base: refuse a folder that names another base; False goes by the layers and their shapes alone.

        Raises:
            InputError: another base, layers that lack matrices or have none to change, other shapes.
        """
        own = str(backbone.model.config.name_or_path or "")
        if same_base and self.base_model and own and _base(self.base_model) != _base(own):
            raise InputError(
                f"{self.folder} is an adapter of {self.base_model!r}, not of {own!r}; load that base, or say that they are one "
                "(same_base false)"
            )
        shapes = {path: (slot.in_features, slot.out_features) for slot in backbone.slots for path in slot.paths}
        if missing := [path for path in shapes if path not in self.factors]:
            raise InputError(
                f"{self.folder} has no matrices of {missing[0]!r}, which is to be adapted; it has those of "
                f"{', '.join(self.targets)}: load the base with these targets"
            )
        if extra := [path for path in self.factors if path not in shapes]:
            raise InputError(
                f"{self.folder} has matrices of {extra[0]!r}, which is no target layer of the base; load the base with the "
                f"targets {', '.join(self.targets)}, or give the base that they belong to"
            )
        for path, (in_features, out_features) in shapes.items():
            a, b = self.factors[path]["lora_A"], self.factors[path]["lora_B"]
            if (a.shape[1], b.shape[0]) != (in_features, out_features):
                raise InputError(
                    f"{self.folder} maps {a.shape[1]} features to {b.shape[0]} in {path!r}, the base maps {in_features} to "
                    f"{out_features}; give the base that the adapter belongs to"
                )

    def __repr__(self) -> str:
        return f"PeftAdapter({str(self.folder)!r}, rank={self.rank}, alpha={self.alpha:g}, {len(self.factors)} layers)"


def load_peft(folder: str | Path, model: BoRA | Backbone, *, same_base: bool = True) -> Weights:
    """The latents of one adapter, (layers, *shape) by name: ``save_peft`` undone, bit for bit.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_peft(Path(folder), model, model.starts)
        ...     load_peft(folder, model)["q_proj.lora_A"].shape
        torch.Size([4, 1, 256])

    Args:
        folder: a PEFT folder.
        model: the model whose latents are wanted; of a backbone alone they are those of ``LoRA`` with the folder's own r and α.
            Where the model's scale α/r is another, B is scaled, so that the layers change as the folder says.
        same_base: as for :meth:`PeftAdapter.check`.

    Raises:
        InputError: as for :func:`read_peft` and :meth:`PeftAdapter.check`; another rank than the model's, or matrices that
            its adapter cannot have.
    """
    found = read_peft(folder)
    backbone = model.backbone if isinstance(model, BoRA) else model
    found.check(backbone, same_base=same_base)
    adapter: Adapter = model.adapter if isinstance(model, BoRA) else LoRA(found.rank, found.alpha)
    scaling = getattr(adapter, "scaling", found.scaling)
    weights: Weights = {}
    for slot in backbone.slots:
        layers = []
        for layer, path in enumerate(slot.paths):
            factors = dict(found.factors[path])
            if scaling != found.scaling:
                factors["lora_B"] = factors["lora_B"] * (found.scaling / scaling)
            layers.append(adapter.from_lora(factors, model.fixed_of(slot, layer) if isinstance(model, BoRA) else {}))
        for name, spec in adapter.latents(slot).items():
            if layers[0][name].shape != spec.shape:
                raise InputError(
                    f"{folder} has the rank {found.rank}, which {adapter} cannot have; give the model an adapter of that rank"
                )
            weights[f"{slot.name}.{name}"] = torch.stack([of_layer[name] for of_layer in layers]).to(backbone.device)
    return weights


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bp.save_peft(Path(folder), model, model.starts)
        ...     found = read_peft(folder)
        >>> found.rank, found.scaling, len(found.factors)
        (2, 1.0, 8)

    Args:
        folder: a PEFT folder.

    Raises:
        InputError: a file is missing, damaged, too large or a link out of the folder; the weights are a pickle; the adapter
            is not plain LoRA (or rsLoRA) on linear layers; a matrix is missing, has another shape than it should, or an entry
            that is no finite number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with {CONFIG} and {TENSORS}")
    file = _inside(folder, CONFIG)
    config = _config(file)
    rank, alpha = _rank_and_alpha(file, config)
    if not (folder / TENSORS).exists() and any((folder / name).exists() for name in ("adapter_model.bin", "adapter_model.pt")):
        raise InputError(
            f"{folder} has its weights as a pickle, which can run code and is never read; save it again as {TENSORS} "
            "(save_pretrained of a present-day PEFT does)"
        )
    factors = _factors(_inside(folder, TENSORS), rank)
    _check_selected(file, config["target_modules"], factors)
    return PeftAdapter(folder, str(config.get("base_model_name_or_path") or ""), rank, alpha, factors)


def _inside(folder: Path, name: str) -> Path:
    """The file of that name, which must lie in the folder."""
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{file} is a link that leaves the folder; put a copy of the file in its place")
        if not file.is_file():
            raise InputError(f"{folder} has no {name}; give a folder with {CONFIG} and {TENSORS}")
    except (OSError, RuntimeError) as error:  # a link to itself
        raise InputError(f"{file} cannot be read ({error})") from None
    return file


def _config(file: Path) -> dict[str, Any]:
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
            raise InputError(f"{file} has {name} {_shown(value)}; read are LoRA adapters whose {name} is {words}")
    for name, value in config.items():
        if name not in _READ | _NEUTRAL and value:
            raise InputError(
                f"{file} has {name} {_shown(value)}; only plain LoRA and rsLoRA with one r and alpha are read: {name} must be off"
            )
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise InputError(f"{file} has target_modules {_shown(targets)}; it is a text or a list of texts")
    return config


def _rank_and_alpha(file: Path, config: dict[str, Any]) -> tuple[int, float]:
    rank, alpha, stabilised = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise InputError(f"{file} has r {_shown(rank)}; it is a whole number from 1 up")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
        raise InputError(f"{file} has lora_alpha {_shown(alpha)}; it is a positive, finite number")
    if not isinstance(stabilised, bool):
        raise InputError(f"{file} has use_rslora {_shown(stabilised)}; it is true or false")
    return rank, float(alpha) * math.sqrt(rank) if stabilised else float(alpha)


def _factors(file: Path, rank: int) -> Factors:
    factors: Factors = {}
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as opened:
            keys = opened.keys()
            for key in keys:
                path, factor = _parsed(file, key)
                view = opened.get_slice(key)
                shape, dtype = view.get_shape(), view.get_dtype()
                if len(shape) != 2 or shape[0 if factor == "lora_A" else 1] != rank or 0 in shape:
                    raise InputError(f"{file} has {key!r} of shape {tuple(shape)}, which does not go with r = {rank}")
                if dtype not in _DTYPES:
                    raise InputError(f"{file} has {key!r} as {dtype}; read are {', '.join(_DTYPES)}")
                value: Tensor = opened.get_tensor(key).float()
                if not bool(value.isfinite().all()):
                    raise InputError(f"{file} has an entry in {key!r} that is no finite number; the adapter is of no use")
                factors.setdefault(path, {})[factor] = value
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({' '.join(str(error).split())}); copy it again") from None
    for path, found in factors.items():
        if len(found) == 1:
            [one] = found
            raise InputError(f"{file} has {one} of {path!r} alone; a layer has lora_A and lora_B")
    if not factors:
        raise InputError(f"{file} holds no matrices")
    return factors


def _check_header(file: Path) -> None:
    """Look at the header's length before anything of that size is read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > min(HEADER_BYTES, size - 8):
        raise InputError(
            f"{file} is damaged: its header is said to have {length} bytes, of {size} in the file; one of an adapter has "
            f"{HEADER_BYTES} at most"
        )


def _parsed(file: Path, key: str) -> tuple[str, str]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise InputError(
            f"{file} has {_shown(key)}, which is no LoRA matrix of a linear layer; those are called "
            f"{PREFIX}<layer>.lora_A.weight and .lora_B.weight"
        )
    return match["path"], match["factor"]


def _check_selected(file: Path, targets: str | Sequence[str], factors: Factors) -> None:
    """Refuse matrices that PEFT would leave out. A pattern is not run: its author may mean it never to end."""
    if isinstance(targets, str):
        return
    for path in factors:
        if not any(path == target or path.endswith(f".{target}") for target in targets):
            raise InputError(f"{file} does not name {path!r} among its target_modules, so that PEFT leaves its matrices out")


def _base(name: str) -> str:
    """A base's name, the same for one folder by whatever path."""
    place = BUILTIN_BASES.get(name, Path(name))
    return str(place.resolve()) if place.exists() else name


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
