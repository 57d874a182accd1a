"""Reading of LoRA adapters from PEFT folders that were written by this library or by PEFT.

    >>> import tempfile
    >>> import bora_pyro as bp
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bp.save_peft(Path(folder), model, model.starts)
    ...     weights = load_peft(folder, model)
    >>> all(torch.equal(weights[name], start) for name, start in model.starts.items())
    True

A folder may come from an untrusted source. No pickle is opened, and no link out of the folder is followed. Adapters other than
plain LoRA on linear layers are refused with an error that names the reason. If layers differ in rank or scale, their matrices are
converted to one common r and α, which leaves ΔW of each layer unchanged.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from bora_pyro.adapters import Adapter, Factors, LoRA
from bora_pyro.backbone.backbone import BUILTIN_BASES, Backbone
from bora_pyro.backbone.configuration import base_name
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.errors import InputError
from bora_pyro.exchange.config import PeftConfig, read_peft_config, shown_json
from bora_pyro.exchange.peft_rules import misread_layers
from bora_pyro.exchange.save import CONFIG, PREFIX, TENSORS, LayerFactors
from bora_pyro.files.limits import largest_text
from bora_pyro.model import BoRA, Weights

#: The largest header of a tensor file in bytes. A header has about 150 bytes per matrix.
HEADER_BYTES = 2**24

_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_DTYPES = ("F32", "F16", "BF16")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One LoRA adapter from a PEFT folder. It adds (α/r) B A to each of its layers.

    Attributes:
        folder: the folder that it was read from.
        base_model: the name of the base; empty if the folder has none.
        rank: r. If layers have different ranks it is the largest, and the matrices of the others are padded with zeros.
        alpha: α. For rsLoRA, whose scale is α/√r, it is converted so that the scale is α/r. If layers have different scales, the
            differences are multiplied into their B.
        factors: ``lora_A`` (r, in) and ``lora_B`` (out, r) by path of the layer, float32.
        config: the configuration of the folder, or None if the adapter was not read from a folder.
    """

    folder: Path
    base_model: str
    rank: int
    alpha: float
    factors: LayerFactors
    config: PeftConfig | None = None

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    @property
    def targets(self) -> list[str]:
        """The kinds of layers that are adapted, in the form of the argument ``targets`` of ``Backbone``."""
        return list(dict.fromkeys(map(_kind, self.factors)))

    def on(self, backbone: Backbone, *, same_base: bool = True) -> PeftAdapter:
        """The adapter with matrices for exactly the target layers of a base.

        A folder may adapt only some layers of a kind (through ``layers_to_transform``, ``exclude_modules``, a pattern or whole
        paths). The other layers of that kind then get matrices of zeros, and a note is logged.

        Args:
            backbone: the base with its target layers.
            same_base: whether to refuse a folder that names another base. With False only layers and shapes are compared.

        Raises:
            InputError: if the folder names another base, a target layer has no matrices, matrices belong to no target layer, or
                shapes differ.
        """
        own, kinds = base_name(backbone.model.config), set(self.targets)
        if same_base and self.base_model and own and base_place(self.base_model) != base_place(own):
            raise InputError(
                f"{self.folder} is an adapter of {self.base_model!r}, not of {own!r}; load that base, or set same_base to false "
                "if both are the same"
            )
        shapes = {path: (slot.in_features, slot.out_features) for slot in backbone.slots for path in slot.paths}
        missing = [path for path in shapes if path not in self.factors]
        for path in missing:
            if _kind(path) not in kinds:
                raise InputError(
                    f"{self.folder} has no matrices of {path!r}, which is to be adapted; it has those of "
                    f"{', '.join(self.targets)}: load the base with these targets"
                )
            if self.config is None or self.config.must_adapt(path):
                raise InputError(
                    f"{self.folder} has no matrices of {path!r}, although it adapts all layers of that kind; give the base that "
                    "the adapter belongs to"
                )
        if extra := [path for path in self.factors if path not in shapes]:
            raise InputError(
                f"{self.folder} has matrices of {extra[0]!r}, which is no target layer of the base; load the base with the "
                f"targets {', '.join(self.targets)}, or give the base that the adapter belongs to"
            )
        for path, of_layer in self.factors.items():
            (in_features, out_features), a, b = shapes[path], of_layer["lora_A"], of_layer["lora_B"]
            if (a.shape[1], b.shape[0]) != (in_features, out_features):
                raise InputError(
                    f"{self.folder} maps {a.shape[1]} features to {b.shape[0]} in {path!r}, the base maps {in_features} to "
                    f"{out_features}; give the base that the adapter belongs to"
                )
        if misread := misread_layers(backbone.model, self.factors):
            path, reason = next(iter(misread.items()))
            _log.warning("note: %s is read as it names its layers, not as PEFT: %s (%s)", self.folder, reason, path)
        if not missing:
            return self
        _check_size(self.folder, self.rank, [*shapes.values()])
        _log.warning("note: %s adapts %d of %d layers; the others stay as they are", self.folder, len(self.factors), len(shapes))
        filled = self.factors | {path: self._zeros(*shapes[path]) for path in missing}
        return replace(self, factors={path: filled[path] for path in shapes})

    def _zeros(self, in_features: int, out_features: int) -> dict[str, Tensor]:
        return {"lora_A": torch.zeros(self.rank, in_features), "lora_B": torch.zeros(out_features, self.rank)}

    def __repr__(self) -> str:
        return f"PeftAdapter({str(self.folder)!r}, rank={self.rank}, alpha={self.alpha:g}, {len(self.factors)} layers)"


def load_peft(folder: str | Path, model: BoRA | Backbone, *, same_base: bool = True) -> Weights:
    """Read the latents of one adapter, (layers, *shape) by name. This is the exact inverse of ``save_peft``.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = bp.save_peft(Path(folder), model, model.starts)
        ...     load_peft(folder, model)["q_proj.lora_A"].shape
        torch.Size([4, 1, 256])

    Args:
        folder: a PEFT folder.
        model: the model whose latents are returned. For a backbone alone they are the latents of ``LoRA`` with the folder's r and
            α. If the model has another scale α/r, B is rescaled so that ΔW stays the same.
        same_base: as for :meth:`PeftAdapter.on`.

    Raises:
        InputError: as for :func:`read_peft` and :meth:`PeftAdapter.on`; or if the model's adapter has another rank, or cannot
            represent the matrices.
    """
    backbone = model.backbone if isinstance(model, BoRA) else model
    found = read_peft(folder).on(backbone, same_base=same_base)
    adapter: Adapter = model.adapter if isinstance(model, BoRA) else LoRA(found.rank, found.alpha)
    tensors = model.tensors if isinstance(model, BoRA) else _tensors_of(adapter, backbone)
    weights: Weights = {}
    for slot in backbone.slots:
        layers = []
        for layer, path in enumerate(slot.paths):
            fixed = tensors.at_layer(slot, layer, {})
            own = adapter.factors({name: tensors.latents[f"{slot.name}.{name}"][layer] for name in tensors.names(slot)} | fixed)
            if own is None:
                raise InputError(f"LoRA matrices cannot be read as {adapter}")
            lora_a, lora_b = found.factors[path]["lora_A"], found.factors[path]["lora_B"]
            if own.scaling != found.scaling:
                lora_b = lora_b * (found.scaling / own.scaling)
            layers.append(adapter.from_factors(Factors(lora_a, lora_b, own.alpha), fixed))
        for name in tensors.names(slot):
            if layers[0][name].shape != tensors.latents[f"{slot.name}.{name}"].shape[1:]:
                raise InputError(
                    f"{folder} has the rank {found.rank}, which {adapter} cannot have; give the model an adapter of that rank"
                )
            weights[f"{slot.name}.{name}"] = torch.stack([of_layer[name] for of_layer in layers]).to(backbone.device)
    return weights


def _tensors_of(adapter: Adapter, backbone: Backbone) -> LayerTensors:
    return LayerTensors.of([adapter], backbone)


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read a PEFT folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = bp.save_peft(Path(folder), model, model.starts)
        ...     found = read_peft(folder)
        >>> found.rank, found.scaling, len(found.factors)
        (2, 1.0, 8)

    Args:
        folder: a PEFT folder.

    Raises:
        InputError: if a file is missing, damaged, too large or a link out of the folder; if the weights are a pickle; if the
            adapter is not plain LoRA or rsLoRA on linear layers; or if a matrix is missing, has a wrong shape, or has an entry
            that is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with {CONFIG} and {TENSORS}")
    file = _inside(folder, CONFIG)
    config = read_peft_config(file)
    if not (folder / TENSORS).exists() and any((folder / name).exists() for name in ("adapter_model.bin", "adapter_model.pt")):
        raise InputError(
            f"{folder} has its weights as a pickle, which can run code and is never read; save it again as {TENSORS} "
            "(save_pretrained of a recent PEFT does)"
        )
    factors = _factors(_inside(folder, TENSORS), config)
    for path in factors:
        if not config.may_adapt(path):
            raise InputError(f"{file} does not name {path!r} among its target_modules, so PEFT would ignore its matrices")
    rank = max(of_layer["lora_A"].shape[0] for of_layer in factors.values())
    _check_size(folder, rank, [(found["lora_A"].shape[1], found["lora_B"].shape[0]) for found in factors.values()])
    same = {path: _same_form(of_layer, rank, config.scaling_of(path) / config.scaling) for path, of_layer in factors.items()}
    alpha = config.alpha * (math.sqrt(config.rank) if config.rslora else 1.0)
    return PeftAdapter(folder, config.base_model, rank, alpha * (rank / config.rank), same, config)


def _check_size(folder: Path, rank: int, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse an adapter that would need too much memory if all its layers had the largest rank."""
    size = 4 * rank * sum(map(sum, shapes))
    if size > largest_text():
        raise InputError(f"{folder} takes {size} bytes with r = {rank} in all layers, which is more than is read here")


def _same_form(factors: dict[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """The matrices of a layer, padded with zeros to a larger rank, with B multiplied by a scale."""
    more = rank - factors["lora_A"].shape[0]
    a, b = factors["lora_A"], factors["lora_B"] if scale == 1 else factors["lora_B"] * scale
    return {"lora_A": pad(a, (0, 0, 0, more)), "lora_B": pad(b, (0, more))} if more else {"lora_A": a, "lora_B": b}


def _inside(folder: Path, name: str) -> Path:
    """The path of a file, after a check that it is really inside the folder."""
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{file} is a link that leaves the folder; put a copy of the file in its place")
        if not file.is_file():
            raise InputError(f"{folder} has no {name}; give a folder with {CONFIG} and {TENSORS}")
    except (OSError, RuntimeError) as error:  # for instance a link to itself
        raise InputError(f"{file} cannot be read ({error})") from None
    return file


def _factors(file: Path, config: PeftConfig) -> LayerFactors:
    factors: LayerFactors = {}
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as opened:
            keys = opened.keys()
            for key in keys:
                path, factor = _parse_key(file, key)
                rank = config.rank_of(path)
                view = opened.get_slice(key)
                shape, dtype = view.get_shape(), view.get_dtype()
                if len(shape) != 2 or shape[0 if factor == "lora_A" else 1] != rank or 0 in shape:
                    raise InputError(f"{file} has {key!r} of shape {tuple(shape)}, which does not fit r = {rank}")
                if dtype not in _DTYPES:
                    raise InputError(f"{file} has {key!r} as {dtype}; only {', '.join(_DTYPES)} are read")
                value: Tensor = opened.get_tensor(key).float()
                if not bool(value.isfinite().all()):
                    raise InputError(f"{file} has an entry in {key!r} that is no finite number; the adapter cannot be used")
                factors.setdefault(path, {})[factor] = value
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged ({' '.join(str(error).split())}); copy it again") from None
    for path, found in factors.items():
        if len(found) == 1:
            [one] = found
            raise InputError(f"{file} has {one} of {path!r} alone; a layer needs lora_A and lora_B")
    if not factors:
        raise InputError(f"{file} holds no matrices")
    return factors


def _check_header(file: Path) -> None:
    """Check the length that the file states for its header, before memory of that size is allocated."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > min(HEADER_BYTES, size - 8):
        raise InputError(
            f"{file} is damaged: its header is said to have {length} bytes, but the file has {size}, and the header of an "
            f"adapter has {HEADER_BYTES} at most"
        )


def _parse_key(file: Path, key: str) -> tuple[str, str]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise InputError(
            f"{file} has {shown_json(key)}, which is no LoRA matrix of a linear layer; the names of these are "
            f"{PREFIX}<layer>.lora_A.weight and .lora_B.weight"
        )
    return match["path"], match["factor"]


def _kind(path: str) -> str:
    """The kind of a layer: its path without the layer number."""
    return re.sub(r"\.\d+(?=\.|$)", "", path)


def base_place(name: str) -> str:
    """The name of a base, or its absolute path if it is a folder, so that different paths of one folder compare as equal."""
    place = BUILTIN_BASES.get(name, Path(name))
    try:
        return str(place.resolve()) if place.exists() else name
    except (OSError, ValueError):  # the name is too long for a path, or has a NUL byte
        return name
