"""Reading LoRA adapters from PEFT folders, ours and those that PEFT itself wrote.

    >>> import tempfile
    >>> import bora_pyro as bp
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> model = bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bp.save_peft(Path(folder), model, model.starts)
    ...     weights = load_peft(folder, model)
    >>> all(torch.equal(weights[name], start) for name, start in model.starts.items())
    True

A folder may come from anywhere, so nothing in it is trusted: no pickle is opened, no link out of the folder is followed, and
whatever is not plain LoRA on linear layers is refused by name, rather than read as something that it is not.
Layers with ranks and scales of their own are read as layers with one r and one α that change by the same.
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
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.errors import InputError
from bora_pyro.exchange.config import PeftConfig, read_peft_config, shown_json
from bora_pyro.exchange.save import CONFIG, PREFIX, TENSORS, LayerFactors
from bora_pyro.files.limits import largest_text
from bora_pyro.model import BoRA, Weights

#: The largest header of the tensors that is looked at; it takes some 150 bytes a matrix.
HEADER_BYTES = 2**24

_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<factor>lora_A|lora_B)\.weight")
_DTYPES = ("F32", "F16", "BF16")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One LoRA adapter as a PEFT folder holds it: each of its layers changes by (α/r) B A.

    Attributes:
        folder: where it was read.
        base_model: what the folder calls its base; empty where it does not say.
        rank: r; where layers have ranks of their own, the largest, the others padded with zeros.
        alpha: α; of rsLoRA, whose scale is α/√r, the α that gives the same scale as α/r. Where layers have scales of their own,
            their B makes up for it.
        factors: ``lora_A`` (r, in) and ``lora_B`` (out, r) by path of the layer, float32.
        config: what the folder says, where it was read from one.
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
        """The kinds of layers that are adapted, as ``Backbone(targets=...)`` takes them."""
        return list(dict.fromkeys(map(_kind, self.factors)))

    def on(self, backbone: Backbone, *, same_base: bool = True) -> PeftAdapter:
        """The adapter with matrices for every target layer of a base.

        Where the folder adapts some layers of a kind only (by ``layers_to_transform``, ``exclude_modules``, a pattern or whole
        paths), the others have zeros, which change nothing, and a note is logged.

        Args:
            backbone: the base, with the layers that are to be adapted.
            same_base: refuse a folder that names another base; False goes by the layers and their shapes alone.

        Raises:
            InputError: another base, layers that lack matrices or have none to change, other shapes.
        """
        own, kinds = str(backbone.model.config.name_or_path or ""), set(self.targets)
        if same_base and self.base_model and own and _base(self.base_model) != _base(own):
            raise InputError(
                f"{self.folder} is an adapter of {self.base_model!r}, not of {own!r}; load that base, or say that they are one "
                "(same_base false)"
            )
        shapes = {path: (slot.in_features, slot.out_features) for slot in backbone.slots for path in slot.paths}
        missing = [path for path in shapes if path not in self.factors]
        for path in missing:
            if _kind(path) not in kinds:
                raise InputError(
                    f"{self.folder} has no matrices of {path!r}, which is to be adapted; it has those of "
                    f"{', '.join(self.targets)}: load the base with these targets"
                )
            if self.config is None or self.config.needs(path):
                raise InputError(
                    f"{self.folder} has no matrices of {path!r}, though it adapts every layer of that kind; give the base that "
                    "it belongs to"
                )
        if extra := [path for path in self.factors if path not in shapes]:
            raise InputError(
                f"{self.folder} has matrices of {extra[0]!r}, which is no target layer of the base; load the base with the "
                f"targets {', '.join(self.targets)}, or give the base that they belong to"
            )
        for path, of_layer in self.factors.items():
            (in_features, out_features), a, b = shapes[path], of_layer["lora_A"], of_layer["lora_B"]
            if (a.shape[1], b.shape[0]) != (in_features, out_features):
                raise InputError(
                    f"{self.folder} maps {a.shape[1]} features to {b.shape[0]} in {path!r}, the base maps {in_features} to "
                    f"{out_features}; give the base that the adapter belongs to"
                )
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
    """The latents of one adapter, (layers, *shape) by name: ``save_peft`` undone, bit for bit.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = bp.save_peft(Path(folder), model, model.starts)
        ...     load_peft(folder, model)["q_proj.lora_A"].shape
        torch.Size([4, 1, 256])

    Args:
        folder: a PEFT folder.
        model: the model whose latents are wanted; of a backbone alone they are those of ``LoRA`` with the folder's own r and α.
            Where the model's scale α/r is another, B is scaled, so that the layers change as the folder says.
        same_base: as for :meth:`PeftAdapter.on`.

    Raises:
        InputError: as for :func:`read_peft` and :meth:`PeftAdapter.on`; another rank than the model's, or matrices that
            its adapter cannot have.
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
    """Read a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

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
        InputError: a file is missing, damaged, too large or a link out of the folder; the weights are a pickle; the adapter
            is not plain LoRA (or rsLoRA) on linear layers; a matrix is missing, has another shape than it should, or an entry
            that is no finite number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one with {CONFIG} and {TENSORS}")
    file = _inside(folder, CONFIG)
    config = read_peft_config(file)
    if not (folder / TENSORS).exists() and any((folder / name).exists() for name in ("adapter_model.bin", "adapter_model.pt")):
        raise InputError(
            f"{folder} has its weights as a pickle, which can run code and is never read; save it again as {TENSORS} "
            "(save_pretrained of a present-day PEFT does)"
        )
    factors = _factors(_inside(folder, TENSORS), config)
    for path in factors:
        if not config.names(path):
            raise InputError(f"{file} does not name {path!r} among its target_modules, so that PEFT leaves its matrices out")
    rank = max(of_layer["lora_A"].shape[0] for of_layer in factors.values())
    _check_size(folder, rank, [(found["lora_A"].shape[1], found["lora_B"].shape[0]) for found in factors.values()])
    same = {path: _same_form(of_layer, rank, config.scaling_of(path) / config.scaling) for path, of_layer in factors.items()}
    alpha = config.alpha * (math.sqrt(config.rank) if config.stabilised else 1.0)
    return PeftAdapter(folder, config.base_model, rank, alpha * (rank / config.rank), same, config)


def _check_size(folder: Path, rank: int, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse an adapter that grows beyond memory where all layers have the rank of one."""
    size = 4 * rank * sum(map(sum, shapes))
    if size > largest_text():
        raise InputError(f"{folder} takes {size} bytes with r = {rank} in all layers, which is more than is read here")


def _same_form(factors: dict[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """The same change as matrices of another rank, with zeros behind, and B multiplied by a scale."""
    more = rank - factors["lora_A"].shape[0]
    a, b = factors["lora_A"], factors["lora_B"] if scale == 1 else factors["lora_B"] * scale
    return {"lora_A": pad(a, (0, 0, 0, more)), "lora_B": pad(b, (0, more))} if more else {"lora_A": a, "lora_B": b}


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


def _factors(file: Path, config: PeftConfig) -> LayerFactors:
    factors: LayerFactors = {}
    try:
        _check_header(file)
        with safe_open(file, framework="pt") as opened:
            keys = opened.keys()
            for key in keys:
                path, factor = _parsed(file, key)
                rank = config.rank_of(path)
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
            f"{file} has {shown_json(key)}, which is no LoRA matrix of a linear layer; those are called "
            f"{PREFIX}<layer>.lora_A.weight and .lora_B.weight"
        )
    return match["path"], match["factor"]


def _kind(path: str) -> str:
    """A layer's path without its number."""
    return re.sub(r"\.\d+(?=\.|$)", "", path)


def _base(name: str) -> str:
    """A base's name, the same for one folder by whatever path."""
    place = BUILTIN_BASES.get(name, Path(name))
    try:
        return str(place.resolve()) if place.exists() else name
    except (OSError, ValueError):  # longer than a path can be, or with a NUL byte
        return name
