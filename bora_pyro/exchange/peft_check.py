"""Load a written adapter with PEFT itself, and compare its logits with those of the model that wrote it.

>>> import tempfile
>>> import bora_pyro as bp
>>> from bora_pyro.exchange.save import save_peft
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
>>> weights = {name: start + 0.1 for name, start in model.starts.items()}
>>> with tempfile.TemporaryDirectory() as folder:
...     _ = save_peft(Path(folder), model, weights, task=0)
...     found = check_with_peft(folder, model, weights, task=0)
>>> found.difference < 1e-5
True
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.loading import quiet_bitsandbytes
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError
from bora_pyro.exchange.load import PeftAdapter, read_peft
from bora_pyro.exchange.save import adapted_paths
from bora_pyro.model import BoRA

#: Rows and tokens of the batch whose logits are compared.
ROWS, TOKENS = 2, 16
# The largest root mean square of the difference, in units of that of the logits. PEFT computes adapters in float32, this library
# in the precision of the base; layers and matrices are compared exactly in any precision.
_CLOSE, _CLOSE_IN_HALF = 1e-4, 0.1


@dataclass(frozen=True)
class PeftCheck:
    """The result of a comparison with PEFT.

    Attributes:
        version: the version of PEFT.
        difference: root mean square of the difference between the logits, in units of that of the logits.
    """

    version: str
    difference: float

    def __str__(self) -> str:
        return f"checked with PEFT {self.version}: logits agree {f'to {self.difference:.1g}' if self.difference else 'exactly'}"


def can_check(model: BoRA) -> bool:
    """Whether PEFT is installed and the base lies on one device, so that :func:`check_with_peft` can run."""
    return importlib.util.find_spec("peft") is not None and not hasattr(model.backbone.model, "hf_device_map")


def check_with_peft(
    folder: str | Path, model: BoRA, weights: Mapping[str, Tensor], *, task: int, exact: bool = True
) -> PeftCheck:
    """Load a folder with PEFT onto the base, compare, and leave the base as it was. No copy of the base is made.

    Args:
        folder: the folder of the adapter of one task.
        model: the model that wrote it.
        weights: the task's latents by name, (layers, *shape) each.
        task: index of the task.
        exact: whether the folder has exactly these weights; else the logits are those of the folder's own matrices.

    Raises:
        InputError: PEFT adapts other layers, puts other matrices there, or gives other logits.
    """
    written, backbone = read_peft(folder), model.backbone
    words = backbone.num_token_ids
    size = (ROWS, min(TOKENS, backbone.context or TOKENS))
    ids = torch.randint(words, size, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    rows = torch.zeros(ROWS, dtype=torch.int64, device=backbone.device)
    stacked = {name: value[None] for name, value in weights.items()}
    change = model.change(stacked, rows, rows + task) if exact else _change_of(written)
    with torch.no_grad():
        ours = backbone.logits(ids, change).float()
        with _children_restored(backbone.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's warnings are about what is compared here
            theirs = _loaded(folder, model, written)(input_ids=ids, use_cache=False).logits.float()
    difference = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())
    full = next(backbone.model.parameters()).dtype == torch.float32 and not getattr(backbone.model, "is_quantized", False)
    if not difference <= (_CLOSE if full else _CLOSE_IN_HALF):
        raise InputError(
            f"PEFT {version('peft')} gives other logits for {folder} than this library, with a relative difference of "
            f"{difference:.2g}; export a merged base, or check by the rules alone"
        )
    return PeftCheck(version("peft"), difference)


def _loaded(folder: str | Path, model: BoRA, written: PeftAdapter) -> Any:
    """The base with the adapter through PEFT, after a check of its layers and matrices."""
    quiet_bitsandbytes()
    from peft import PeftModel  # an optional package, and slow to import

    loaded = PeftModel.from_pretrained(model.backbone.model, str(folder)).eval()
    modules = dict(model.backbone.model.named_modules())
    adapted = {path for path, module in modules.items() if hasattr(module, "lora_A")}
    if others := sorted(adapted ^ set(adapted_paths(model.backbone))):
        raise InputError(f"PEFT {version('peft')} adapts other layers than {folder} says, for example {others[0]!r}")
    for path, factors in written.factors.items():
        layer: Any = modules[path]
        same = layer.scaling["default"] == written.scaling
        for name, value in factors.items():
            same &= torch.equal(getattr(layer, name)["default"].weight.float().cpu(), value)
        if not same:
            raise InputError(f"PEFT {version('peft')} reads other matrices of {path!r} than {folder} has")
    return loaded


def _change_of(adapter: PeftAdapter) -> Change:
    """The change of the outputs by the matrices of a folder."""

    def change(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
        factors = {name: value.to(x) for name, value in adapter.factors[slot.paths[layer]].items()}
        return output + adapter.scaling * (x @ factors["lora_A"].mT @ factors["lora_B"].mT)

    return change


@contextmanager
def _children_restored(model: nn.Module) -> Iterator[None]:
    """Put all modules back in their places afterwards, where PEFT has replaced them."""
    before = [(module, dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, children in before:
            module._modules.clear()
            module._modules.update(children)
