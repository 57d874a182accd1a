"""Start a fit from an adapter in a PEFT folder: Θ begins there, or the prior of the tasks is centred there.

>>> import tempfile
>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
>>> with tempfile.TemporaryDirectory() as folder:
...     _ = bp.save_peft(Path(folder), model, {name: value + 1 for name, value in model.starts.items()})
...     start = read_start(folder, model)
>>> begin_at(model, start, MapFitConfig(start_from=folder))
>>> bool((model.starts["q_proj.lora_B"] == 1).all())
True

The run folder keeps a copy of the adapter and its digest, so a run can be resumed without the PEFT folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.configuration import base_name
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import base_place, load_peft, read_peft
from bora_pyro.exchange.save import CONFIG, TENSORS, adapted_paths
from bora_pyro.model import BoRA, Weights
from bora_pyro.priors import Given, prior_from_tau
from bora_pyro.routers import ByTask
from bora_pyro.runs.config.groups import CENTRE
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import START

_DIGEST, _SOURCE = "digest", "source"


@dataclass(frozen=True, eq=False)
class Start:
    """The adapter that a fit starts from.

    Attributes:
        weights: its latents, (layers, *shape) by name.
        source: the PEFT folder.
        digest: SHA-256 of its two files.
        notes: what the user should know about it.
    """

    weights: Weights
    source: str
    digest: str
    notes: tuple[str, ...] = ()


def read_start(folder: str, model: BoRA) -> Start:
    """Read the adapter from a PEFT folder.

    Directions in which the adapter is zero in both of its matrices would get no gradient. They get the usual start of A, which
    changes no ΔW: layers that the folder does not adapt, and ranks that only other layers have.

    Args:
        folder: the PEFT folder.
        model: the model of the fit, before the fit.

    Raises:
        InputError: the folder cannot be read, or is of other layers or another rank; the model's adapter is not plain LoRA, or a
            router chooses adapters.
    """
    if type(model.adapter) is not LoRA or not isinstance(model.router, ByTask):
        other = model.router if type(model.adapter) is LoRA else model.adapter
        raise InputError(f"start_from needs --adapter lora and --router by_task, not {other}; leave one of them out")
    found = read_peft(folder)
    if found.rank != model.adapter.rank:
        raise InputError(
            f"start_from {folder} has rank {found.rank}, the fit has rank {model.adapter.rank}; give --rank {found.rank}"
            f"{f' --alpha {found.alpha:g}' if found.alpha != found.rank else ''}"
        )
    weights = load_peft(folder, model, same_base=False)
    notes = []
    own = base_name(model.backbone.model.config)
    if found.base_model and own and base_place(found.base_model) != base_place(own):
        notes.append(f"start_from {folder} names the base {found.base_model}; the fit has {own}")
    assert model.adapter.alpha is not None
    scale, ours = found.scaling, model.adapter.alpha / model.adapter.rank
    if scale != ours:
        notes.append(f"start_from {folder} has alpha/r {scale:g}, the fit {ours:g}; B is multiplied by {scale / ours:g}")
    if left := len(set(adapted_paths(model.backbone)) - set(found.factors)):
        notes.append(f"start_from {folder} does not adapt {left} of the layers; these begin as usual")
    return Start(_with_directions(weights, model.starts), folder, _digest(Path(folder)), tuple(notes))


def stored_start(folder: RunFolder, model: BoRA) -> Start | None:
    """The adapter that a run has started from, from its run folder; None if the run has none.

    Raises:
        InputError: the file is damaged or of another model, or the PEFT folder has changed since.
    """
    if not (folder.path / f"{START}.safetensors").is_file():
        return None
    weights, about = folder.load_tensors(START), folder.load_metadata(START)
    shapes = {name: value.shape for name, value in weights.items()}
    if shapes != {name: value.shape for name, value in model.starts.items()}:
        raise InputError(f"{folder.path / START}.safetensors is of another model; start afresh with --overwrite true")
    source, digest = about.get(_SOURCE, ""), about.get(_DIGEST, "")
    if (Path(source) / TENSORS).is_file() and _digest(Path(source)) != digest:
        raise InputError(
            f"start_from {source} has changed since the run in {folder.path} began; give another --output_dir, or start afresh "
            "with --overwrite true"
        )
    return Start({name: value.to(model.backbone.device) for name, value in weights.items()}, source, digest)


def write_start(folder: RunFolder, start: Start) -> None:
    """Write the adapter into a run folder, with its digest."""
    folder.save_tensors(START, start.weights, {_SOURCE: start.source, _DIGEST: start.digest})


def begin_at(model: BoRA, start: Start, config: MapFitConfig) -> None:
    """Let a model begin at an adapter: Θ, and with it all tasks, or also the centre of their prior.

    Args:
        model: the model before the fit; its starts change, and for ``start_as`` centre its prior.
        start: the adapter.
        config: the configuration of the fit.
    """
    model.starts.update(start.weights)
    if config.start_as == CENTRE:
        hierarchy = prior_from_tau(float(config.tau), penalty=config.penalty)
        precisions = {name: hierarchy.precision(name, value) for name, value in model.starts.items()}
        model.prior = Given(start.weights, precisions, penalty=config.penalty)


def _with_directions(weights: Weights, starts: Weights) -> Weights:
    """The weights with the usual A where both matrices of an adapter are zero in a direction."""
    found = dict(weights)
    for name, a in weights.items():
        site, _, factor = name.rpartition(".")
        if factor == "lora_A":
            empty: Tensor = (a == 0).all(-1) & (weights[f"{site}.lora_B"] == 0).all(-2)  # (layers, r)
            found[name] = torch.where(empty[..., None], starts[name], a)
    return found


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        found.update((folder / name).read_bytes())
    return found.hexdigest()
