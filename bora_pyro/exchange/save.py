"""Write adapters as PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

``peft.PeftModel.from_pretrained(base, folder)`` loads such a folder, and the loaded model gives the same logits::

    base = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
    model = PeftModel.from_pretrained(base, "runs/speeches/adapters/abraham-lincoln")

Only keys that every PEFT version knows are written, so that servers with an older version can read the folders.
:mod:`bora_pyro.exchange.load` reads such folders back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.configuration import base_name
from bora_pyro.errors import InputError
from bora_pyro.exchange.factors import EXPORT_RANK, lora_form
from bora_pyro.exchange.peft_rules import misread_layers, target_modules
from bora_pyro.files.atomic import unwritable
from bora_pyro.files.tensors import write_safetensors
from bora_pyro.model import BoRA, Weights

#: LoRA's matrices by the path of the layer: ``lora_A`` (r, in) and ``lora_B`` (out, r).
LayerFactors = dict[str, dict[str, Tensor]]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: The prefix of the path of a layer in the names of the tensors.
PREFIX = "base_model.model."


def save_peft(
    folder: Path,
    model: BoRA,
    weights: Weights,
    *,
    base_model: str | None = None,
    task: int | None = None,
    rank: int = EXPORT_RANK,
    ranks: Sequence[int] | None = None,
) -> float:
    """Write one adapter: exactly if it has a LoRA form, else the best approximation of a given rank.

        >>> import tempfile, bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     error = save_peft(Path(folder) / "start", model, model.starts)
        ...     error, sorted(file.name for file in (Path(folder) / "start").iterdir())
        (0.0, ['adapter_config.json', 'adapter_model.safetensors'])

    Args:
        folder: the folder; it is made if it does not exist.
        model: the model that the weights belong to.
        weights: one task's (or Θ's) latents by name, (layers, *shape) each.
        base_model: name of the base in the folder; default: the name by which the base was loaded.
        task: index of the task, needed if tasks have masks of their own; None: Θ.
        rank: the largest rank of a change that has no exact LoRA form. Where the adapter masks entries, ranks that are inactive
            in all layers are left out.
        ranks: the ranks that a server allows. The matrices are filled up with zeros to the next of them, and the scale α/r is
            multiplied into B, so that it is 1. Default: the adapter's own rank and α.

    Returns:
        The relative error of the written adapter, ‖ΔW − (α/r) B A‖ / ‖ΔW‖ over all layers; 0 if the form is exact. An error
        above 0 is also written to the metadata of the tensors' file.

    Raises:
        InputError: the adapter gives no ΔW; its rank is larger than all of ``ranks``; the router is not :class:`ByTask`; some
            targets are ``Conv1D`` and others ``Linear``; PEFT would adapt other layers (:func:`check_exportable`); or the folder
            cannot be written.
    """
    check_exportable(model.backbone)
    form = lora_form(model, weights, task=task, rank=rank)
    form = form.without_zeros() if model.tensors.masks else form  # the ranks that a task does not have
    form = form if ranks is None else form.with_rank(ranks)
    metadata = {"relative_error": f"{form.relative_error:.6g}"} if form.relative_error else {}
    write_peft(folder, model.backbone, form.factors, alpha=form.alpha, base_model=base_model, metadata=metadata)
    return form.relative_error


def check_exportable(backbone: Backbone) -> None:
    """Check that a PEFT folder can describe the adapted layers, so that PEFT gives the same logits.

    Raises:
        InputError: some targets are ``Conv1D`` and others ``Linear``, or PEFT would adapt other layers than these. The message
            names the layers, and the targets that are left.
    """
    if len({slot.fan_in_fan_out for slot in backbone.slots}) > 1:
        raise InputError("a PEFT folder cannot mix Conv1D and Linear targets; fit them as two models")
    paths = adapted_paths(backbone)
    if not (misread := misread_layers(backbone.model, paths)):
        return
    path, reason = next(iter(misread.items()))
    more = f" and {len(misread) - 1} more layers" if len(misread) > 1 else ""
    left = _targets_without(misread, [path for path in paths if path not in misread])
    remedy = f"adapt only the targets {', '.join(left)}" if left else "choose other targets"
    raise InputError(f"a PEFT folder cannot describe the adapter of {path!r}{more}: {reason}; {remedy}")


def adapted_paths(backbone: Backbone) -> list[str]:
    """The paths of all adapted layers."""
    return [path for slot in backbone.slots for path in slot.paths]


def _targets_without(left_out: Collection[str], paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths' kinds that select none of the layers that are left out."""
    out, found = {_kind(path) for path in left_out}, []
    for kind in dict.fromkeys(map(_kind, paths)):
        parts = kind.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        found.append(next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in out)), kind))
    return list(dict.fromkeys(found))


def _kind(path: str) -> str:
    """The kind of a layer: its path without numbers of layers."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def write_peft(
    folder: Path,
    backbone: Backbone,
    factors: Mapping[str, Mapping[str, Tensor]],
    *,
    alpha: float,
    base_model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA matrices of one adapter.

    Args:
        folder: the folder; it is made if it does not exist.
        backbone: the base; its slots are the adapted layers.
        factors: the matrices of each of these layers, all of the same rank r.
        alpha: α; a layer changes by (α/r) B A.
        base_model: as for :func:`save_peft`.
        metadata: further texts for the metadata of the tensors' file.

    Raises:
        InputError: some targets are ``Conv1D`` and others ``Linear``, or the folder cannot be written.
    """
    config = _config(backbone, rank_of(factors), alpha, base_model)
    state = {
        f"{PREFIX}{path}.{name}.weight": value.detach().float().cpu().contiguous()
        for path, of_layer in factors.items()
        for name, value in of_layer.items()
    }
    temporary = folder / "adapter_config.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / TENSORS, state, {"format": "pt"} | dict(metadata or {}))
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, folder / CONFIG)
    except OSError as error:
        raise unwritable(folder, error) from error


def rank_of(factors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """The rank r, which is the same for all matrices."""
    return next(iter(factors.values()))["lora_A"].shape[-2]


def _config(backbone: Backbone, rank: int, alpha: float, base_model: str | None) -> dict[str, Any]:
    check_exportable(backbone)
    return {
        "base_model_name_or_path": base_name(backbone.model.config) if base_model is None else base_model,
        "bias": "none",
        "fan_in_fan_out": backbone.slots[0].fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules(backbone.model, adapted_paths(backbone)),
        "task_type": "CAUSAL_LM",
    }
