"""Group the linear layers that adapters change into *slots*: one slot for each kind of layer, stacked over the model's depth.

>>> from transformers import GPT2Config, GPT2LMHeadModel
>>> from bora_pyro.backbone.slots import find_slots
>>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
>>> [(slot.name, slot.layers, slot.in_features, slot.out_features) for slot in find_slots(model)]
[('c_attn', 2, 8, 24)]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from bora_pyro.backbone.blocks import block_number, parts_of, paths_in_blocks
from bora_pyro.backbone.configuration import model_type
from bora_pyro.backbone.usual_targets import blocks_without, pattern_of, usual_targets
from bora_pyro.errors import InputError, nearest

#: The target that stands for every linear layer.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Slot:
    """One kind of linear layer, stacked over the layers of the model.

    Attributes:
        name: short name without dots, unique in the model (``q_proj``, ``mlp_c_proj``).
        paths: the module path in each layer, in the order of the model.
        in_features: size of the input.
        out_features: size of the output.
        fan_in_fan_out: whether the weight is stored as (in, out), as in GPT-2's ``Conv1D``.
        kind_paths: where ``paths`` are some layers of this kind only: the paths of all of them.
    """

    name: str
    paths: tuple[str, ...]
    in_features: int
    out_features: int
    fan_in_fan_out: bool = False
    kind_paths: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers of the model have this slot."""
        return len(self.paths)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The number of each layer: that of its block, or its place where several are in one block.

        >>> Slot("q_proj", ("layers.2.q_proj", "layers.3.q_proj"), 4, 4).blocks
        (2, 3)
        """
        numbers = tuple(map(block_number, self.paths))
        return numbers if len({*numbers}) == len(numbers) else tuple(range(len(numbers)))


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers by module path, without the embedding and the head."""
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in ends
    }  # fmt: skip


def find_slots(
    model: PreTrainedModel,
    targets: Sequence[str] | str | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    unusable: Mapping[str, str] | None = None,
) -> list[Slot]:
    """Group the target layers of ``model`` into slots. Layers of one slot have the same place in their block and the same shape.

    Args:
        model: a causal language model.
        targets: as for :class:`Backbone`.
        layers: as for :class:`Backbone`.
        unusable: layers that are left out, by path, with the reason as the end of "layers that ...".

    Raises:
        InputError: a target matches no linear layer, or only layers that are left out; or a block has no target layer.
    """
    linear, unusable = linear_modules(model), unusable or {}
    kinds = _kinds(path for path in linear if path not in unusable)
    if not kinds:
        raise InputError(f"the base, a {type(model).__name__}, has no linear layer that an adapter can change")
    names = _short_names(list(kinds))
    valid = sorted({*names.values(), ALL_LINEAR})
    wanted = usual_targets(kinds) if targets is None else _as_list(targets, kinds)
    if targets is None and not wanted:
        raise InputError(
            f"no usual targets are known for {model_type(model.config)!r}; name some of its layers: {', '.join(valid)}"
        )
    chosen: set[str] = set()
    for target in wanted:
        matching = [path for kind, paths in kinds.items() for path in paths if _matches(kind, target) or _ends(path, target)]
        if not matching:
            out = [why for path, why in unusable.items() if _matches(pattern_of(path), target) or _ends(path, target)]
            what = f"only names layers that {out[0]}" if out else "names no linear layer of this model"
            raise InputError(f"target {target!r} {what}; valid: {', '.join(valid)}{nearest(target, valid)}")
        chosen.update(matching)
    if layers is not None:
        chosen = set(paths_in_blocks([path for path in linear if path in chosen], _listed(layers), linear))
    slots = []
    for kind, of_kind in kinds.items():
        shapes: dict[tuple[int, int, bool], list[str]] = {}
        for path in of_kind:
            shapes.setdefault(linear_shape(linear[path]), []).append(path)
        for (in_features, out_features, transposed), of_shape in shapes.items():
            # in some models the width of a layer changes with depth; each shape is then a slot of its own
            name = names[kind].replace(".", "_") + ("" if len(shapes) == 1 else f"_{out_features}x{in_features}")
            if paths := tuple(path for path in of_shape if path in chosen):
                slots.append(Slot(name, paths, in_features, out_features, transposed))
    return slots


def checkpointed_blocks(model: PreTrainedModel, slots: Sequence[Slot]) -> dict[str, list[str]]:
    """The target layers within each decoder layer that gradient checkpointing recomputes, by path of the decoder layer.

    A decoder layer may contain another one, which is recomputed with it. Several may share a layer (Zamba): its adapters must be
    applied in each of them, although it has one path.
    """
    path_of = {id(model.get_submodule(path)): path for slot in slots for path in slot.paths}
    blocks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{outer}.") for outer in blocks):
            blocks[path] = [path_of[id(inner)] for inner in module.modules() if id(inner) in path_of]
    return blocks


def layers_left_out(
    model: PreTrainedModel,
    slots: Sequence[Slot],
    targets: Sequence[str] | str | None,
    unusable: Mapping[str, str],
    *,
    layers: Sequence[str] | str | None = None,
) -> list[str]:
    """A note for each reason why layers that the targets name have no adapter, and one for blocks without a usual target.

    Args:
        model: a causal language model.
        slots: the layers that have one.
        targets: as for :class:`Backbone`. Without targets, layers are meant whose last name is that of an adapted layer.
        unusable: as for `find_slots`.
        layers: as for :class:`Backbone`. Other blocks are not spoken of.
    """
    linear = [*linear_modules(model)]
    meant = linear if layers is None else paths_in_blocks(linear, _listed(layers), linear)
    unusable = {path: reason for path, reason in unusable.items() if path in {*meant}}
    usual = {path.rsplit(".", 1)[-1] for slot in slots for path in slot.paths}
    named = usual if targets is None else _as_list(targets, _kinds(unusable))
    by_reason: dict[str, list[str]] = {}
    for path, reason in unusable.items():
        if any(_matches(pattern_of(path), target) or _ends(path, target) for target in named):
            by_reason.setdefault(reason, []).append(path)
    notes = []
    for reason, paths in by_reason.items():
        kinds = list(_kinds(paths))
        names = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")
        notes.append(f"no adapter on {len(paths)} of the layers that the targets name; they {reason}: {names}")
    without = blocks_without(meant, (path for slot in slots for path in slot.paths)) if targets is None else []
    if without:
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        notes.append(
            f"no adapter on {len(without)} blocks, which have none of the usual targets (--targets names others): {names}"
        )
    return notes


def _as_list(targets: Sequence[str] | str, kinds: Iterable[str]) -> list[str]:
    """The targets one by one; ``all-linear`` is all of ``kinds``."""
    listed = [targets] if isinstance(targets, str) else list(targets)
    return list(kinds) if listed == [ALL_LINEAR] else listed


def _kinds(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths by their pattern, in which a star stands for the number of a layer."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(pattern_of(path), []).append(path)
    return kinds


def _listed(layers: Sequence[str] | str) -> list[str]:
    """The blocks one by one, whether they were given as one text or as several."""
    listed = parts_of(layers) if isinstance(layers, str) else [part for text in layers for part in parts_of(str(text))]
    if not listed:
        raise InputError("layers is empty; name blocks, as 0-3 or -1 (the last one), or leave it out for all of them")
    return listed


def _matches(kind: str, target: str) -> bool:
    # with and without the stars, because a short name may skip the index of a list of layers ("experts.up_proj")
    return any(_ends(path, target) for path in (kind, kind.replace(".*", "")))


def _ends(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")


def linear_shape(module: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, fan_in_fan_out) of a linear layer, as in :class:`Slot`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1], True
    weight = module.weight
    assert isinstance(module, nn.Linear) and isinstance(weight, Tensor)
    return module.in_features, module.out_features, False


def linear_weight(module: nn.Module) -> Tensor:
    """The weight W of a linear layer x Wᵀ, (out, in) float32.

    A quantised weight is dequantised, a sharded one is gathered, and the weight of a ``Conv1D`` is transposed.
    """
    weight = module.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        # imported only for a quantised base: it loads bitsandbytes, an optional package that prints a message
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        weight = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    assert isinstance(weight, Tensor)
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return (whole.detach().mT if isinstance(module, Conv1D) else whole.detach()).float()


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
    """The shortest suffix of each path pattern that no other pattern has."""
    names = {}
    for kind in kinds:
        parts = [part for part in kind.split(".") if part != "*"]
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            others = (other.replace(".*", "") for other in kinds if other != kind)
            if not any(other == suffix or other.endswith("." + suffix) for other in others):
                break
        names[kind] = suffix
    return names
