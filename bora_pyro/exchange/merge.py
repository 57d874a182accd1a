"""Merge one adapter into the weights of its base, W + ΔW: for a ΔW of high rank, or a server without adapters.

>>> import tempfile
>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
>>> with tempfile.TemporaryDirectory() as folder:
...     error = save_merged(Path(folder) / "merged", model, model.starts)
...     merged = bp.Backbone.from_pretrained(Path(folder) / "merged")
>>> merged.digest == model.backbone.digest  # adapters change nothing at their start
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.configuration import base_name
from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import layer_deltas
from bora_pyro.files.atomic import whole_folder, write_record
from bora_pyro.model import BoRA

#: The file in the folder of a merged base that records how it was made.
MERGED = "merged.json"


def save_merged(
    folder: str | Path, model: BoRA, weights: Mapping[str, Tensor], *, task: int | None = None, overwrite: bool = False
) -> float:
    """Write the base with one adapter merged into it, as ``save_pretrained`` does. The folder appears once it is complete.

    Args:
        folder: the folder to make.
        model: the model that the weights belong to; its base does not change.
        weights: one task's (or Θ's) latents by name, (layers, *shape) each.
        task: index of the task, needed if tasks have masks of their own; None: Θ.
        overwrite: replace an earlier merged base.

    Returns:
        The relative error of rounding to the precision of the base, ‖W' − (W + ΔW)‖ / ‖ΔW‖ over all adapted layers; 0 if ΔW is 0.

    Raises:
        InputError: the adapter gives no ΔW; the router is not :class:`ByTask`; the base is quantised; an adapted layer shares its
            weight with another one; or the folder is taken or cannot be written.
    """
    base = model.backbone.model
    changed, relative_error = _merged(model, weights, task)
    with whole_folder(folder, record=MERGED, overwrite=overwrite) as aside:
        save_base(model.backbone, aside, changed)
        content = {"base_model": base_name(base.config), "model": repr(model), "relative_error": relative_error}
        write_record(aside, MERGED, content)
    return relative_error


def save_base(backbone: Backbone, folder: Path, changed: Mapping[str, Tensor] | None = None) -> None:
    """Write a base and its tokenizer, as ``save_pretrained`` does; ``changed`` are other values of weights by their keys."""
    base = backbone.model
    base.save_pretrained(folder, state_dict=dict(base.state_dict()) | dict(changed or {}))
    if backbone.tokenizer is not None:
        backbone.tokenizer.save_pretrained(folder)


@torch.no_grad()
def merge_into_base(model: BoRA, weights: Mapping[str, Tensor], *, task: int | None = None) -> float:
    """Change the weights of the model's own base to W + ΔW. Models that have this base are then models of the changed one.

        >>> import bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano", targets=["q_proj"]), 2, adapter=bp.LoRA(rank=1))
        >>> before, changed = model.backbone.digest, {name: torch.ones_like(value) for name, value in model.starts.items()}
        >>> round(merge_into_base(model, changed), 3), model.backbone.digest == before
        (0.0, False)

    Args:
        model: the model that the weights belong to. Its adapter still has the start that it made for the old weights.
        weights: as for :func:`save_merged`.
        task: as for :func:`save_merged`.

    Returns:
        The relative error of rounding, as :func:`save_merged` returns it.

    Raises:
        InputError: as for :func:`save_merged`.
    """
    changed, relative_error = _merged(model, weights, task)
    own = model.backbone.model.state_dict()
    for key, value in changed.items():
        own[key].copy_(value)
    model.backbone.__dict__.pop("digest", None)  # that of the old weights
    return relative_error


def check_mergeable(model: BoRA) -> None:
    """Raise ``InputError`` if the base is quantised, or an adapted layer shares its weight with another one."""
    if getattr(model.backbone.model, "is_quantized", False):
        raise InputError("an adapter cannot be merged into a quantised base; load the base without --quantization")
    if tied := _tied(model):
        raise InputError(
            f"{' and '.join(tied[:2])} are one tensor in this base, which cannot have an adapter for each; export adapters"
        )


def _merged(model: BoRA, weights: Mapping[str, Tensor], task: int | None) -> tuple[dict[str, Tensor], float]:
    """The changed weights by their keys in the state of the base, and the relative error of rounding."""
    check_mergeable(model)
    deltas = layer_deltas(model, weights, task=task)
    state, changed, lost, total = model.backbone.model.state_dict(), dict[str, Tensor](), 0.0, 0.0
    for slot in model.backbone.slots:
        for path in slot.paths:
            key, delta = f"{path}.weight", deltas[path]
            change = (delta.mT if slot.fan_in_fan_out else delta).to(state[key].device)
            exact = state[key].float() + change
            changed[key] = exact.to(state[key].dtype)
            lost += float((changed[key].double() - exact.double()).square().sum())
            total += float(change.double().square().sum())
    return changed, math.sqrt(lost / total) if total else 0.0


def _tied(model: BoRA) -> list[str]:
    """Names of parameters that are one tensor, one of which is the weight of an adapted layer; empty if there are none."""
    names: dict[int, list[str]] = {}
    for name, value in model.backbone.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    adapted = {f"{path}.weight" for slot in model.backbone.slots for path in slot.paths}
    return next((alike for alike in names.values() if len(alike) > 1 and adapted & set(alike)), [])
