"""Conversion of a model's tensors to labelled arrays, and of groups of these to an ArviZ container.

>>> import torch
>>> rms = {"q_proj.lora_A": torch.ones(3, 2), "q_proj.lora_B": torch.ones(3, 2), "fc1.lora_A": torch.ones(3, 2)}
>>> array = by_latent(rms, ("task", "layer"))
>>> dict(array.sizes), array["factor"].values.tolist()
({'task': 3, 'layer': 2, 'module': 2, 'factor': 2}, ['A', 'B'])
>>> array.sel(module="fc1", factor="B").isnull().all().item()  # fc1 has no lora_B
True
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import xarray as xr
from packaging.version import Version
from torch import Tensor

from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA


def as_container(groups: Mapping[str, xr.Dataset], fitted: Fitted) -> Any:
    """The groups as an ArviZ container: ``InferenceData`` with ArviZ 0.23, ``xarray.DataTree`` with ArviZ 1.x."""
    tree = xr.DataTree.from_dict(
        {"/": xr.Dataset(attrs={"inference_library": "bora_pyro", "model": repr(fitted.model)}), **groups}
    )
    if not has_inference_data(metadata.version("arviz")):
        return tree
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        import arviz  # not at the top: it imports matplotlib, takes seconds, and no fit needs it
    return arviz.InferenceData.from_datatree(tree)


def has_inference_data(version: str) -> bool:
    """Whether a version of ArviZ has ``InferenceData``. ArviZ 1.x has only an alias of ``DataTree`` under that name.

    >>> has_inference_data("0.23.4"), has_inference_data("1.0.0rc0"), has_inference_data("1.3.0")
    (True, False, False)
    """
    return Version(version).major < 1


def blocks_of(model: BoRA) -> dict[str, tuple[int, ...]]:
    """The numbers of the layers of each module: those of their blocks."""
    return {slot.name: slot.blocks for slot in model.backbone.slots}


def by_latent(
    values: Mapping[str, Tensor], dims: tuple[str, ...], blocks: Mapping[str, Sequence[int]] | None = None
) -> xr.DataArray:
    """Combine arrays (*dims) named ``<module>.<latent>`` into one array (*dims, module, factor).

    Entries are NaN where a module lacks a layer or a latent.

    Args:
        values: the arrays.
        dims: their dimensions.
        blocks: the numbers of the layers of each module, if ``layer`` is a dimension. None: they are counted from 0.
    """
    modules = list(dict.fromkeys(name.partition(".")[0] for name in values))
    by_factor: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        module, _, latent = name.partition(".")
        by_factor.setdefault(latent.removeprefix("lora_"), {})[module] = value
    arrays = [by_module(of_module, dims, blocks).reindex(module=modules) for of_module in by_factor.values()]
    return xr.concat(arrays, _names("factor", by_factor), join="outer").transpose(*dims, "module", "factor")


def by_module(
    values: Mapping[str, Tensor], dims: tuple[str, ...], blocks: Mapping[str, Sequence[int]] | None = None
) -> xr.DataArray:
    """Combine arrays (*dims), one per module, into one array (*dims, module). ``blocks`` are as for `by_latent`."""
    arrays = {name: xr.DataArray(value.cpu().double().numpy(), dims=dims) for name, value in values.items()}
    if "layer" in dims:
        numbers = {name: range(array.sizes["layer"]) for name, array in arrays.items()} | dict(blocks or {})
        arrays = {name: array.assign_coords(layer=[*numbers[name]]) for name, array in arrays.items()}
    return xr.concat([*arrays.values()], _names("module", arrays), join="outer").transpose(*dims, "module")


def _names(dim: str, names: Iterable[str]) -> xr.Variable:
    """A coordinate of fixed-width strings, which netCDF can store."""
    return xr.Variable(dim, np.array(list(names), dtype=np.str_))


def tau_by_layer(tau: Tensor, deviation: Tensor) -> Tensor:
    """τ of each task and layer, (D or 1, layers or 1). If τ varies within a layer, this is its geometric mean there.

    Args:
        tau: τ, which broadcasts against the deviation.
        deviation: δ, (D, layers, *shape).
    """
    padded = tau.reshape([1] * (deviation.dim() - tau.dim()) + [*tau.shape])
    entries = padded.flatten(2).double()
    return entries[..., 0] if entries.shape[2] == 1 else entries.log().mean(2).exp()


def tau_array(values: Mapping[str, Tensor], blocks: Mapping[str, Sequence[int]]) -> xr.DataArray:
    """τ of all latents in one array, which has the dimension task or layer only if τ varies over it.

    >>> import torch
    >>> tau = {"q.lora_A": torch.tensor([[1.0, 2.0]]), "q.lora_B": torch.tensor([[3.0]]), "v.lora_A": torch.tensor([[4.0]])}
    >>> array = tau_array(tau, {"q": (2, 3), "v": (3,)}).sel(factor="A")
    >>> array["layer"].values.tolist(), array.sel(module="v").values.tolist()
    ([2, 3], [nan, 4.0])

    Args:
        values: τ of each latent, (D or 1, layers or 1).
        blocks: as for `by_latent`.
    """
    tasks = max(value.shape[0] for value in values.values())
    by_layer = any(value.shape[1] > 1 for value in values.values())
    widths = {name: len(blocks[name.partition(".")[0]]) if by_layer else 1 for name in values}
    whole = {name: value.expand(tasks, widths[name]) for name, value in values.items()}
    array = by_latent(whole, ("task", "layer"), blocks if by_layer else None)
    return array.squeeze([dim for dim, varies in (("task", tasks > 1), ("layer", by_layer)) if not varies], drop=True)


def stack_draws(draws: Sequence[xr.Dataset]) -> xr.Dataset:
    """Combine draws into one chain."""
    return xr.concat(draws, "draw", join="exact").assign_coords(draw=np.arange(len(draws))).expand_dims(chain=[0])
