"""The frozen causal language model: its target layers, and its logits with their outputs changed.

    >>> from bora_pyro import Backbone
    >>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "v_proj"])
    >>> [(slot.name, slot.layers, slot.in_features, slot.out_features) for slot in backbone.slots]
    [('v_proj', 4, 256, 256), ('q_proj', 4, 256, 256)]

The backbone knows neither adapters nor priors. It groups the linear layers that are to be adapted into *slots* (one slot
a kind of layer, stacked over the depth of the model). While it runs, a callable may change the output of each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from bora_pyro.errors import InputError, nearest
from bora_pyro.token_loss import UnprojectedLogits

BUILTIN_BASES = {"builtin:nano": Path(__file__).parent / "assets" / "nano"}

#: The layers that are adapted where the user names none: attention's queries and values, as in the LoRA and BoRA papers.
USUAL_TARGETS = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
}
DEFAULT_TARGETS = ("q_proj", "v_proj")

#: ``change(slot, layer, x, output)``: the changed output of one linear layer, (rows, tokens, out_features), given its input,
#: (rows, tokens, in_features), and its own output.
Change = Callable[["Slot", int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Slot:
    """One kind of linear layer, stacked over the layers of the model.

    Attributes:
        name: short name without dots, unique in the model (``q_proj``, ``mlp_c_proj``).
        paths: the module path in each layer, in the order of the model.
        in_features, out_features: sizes of the linear map.
        fan_in_fan_out: the weight is stored (in, out), as GPT-2's ``Conv1D`` does.
    """

    name: str
    paths: tuple[str, ...]
    in_features: int
    out_features: int
    fan_in_fan_out: bool = False

    @property
    def layers(self) -> int:
        """How many layers of the model have this slot."""
        return len(self.paths)


class Backbone:
    """A frozen causal language model whose linear layers can be changed row by row.

    Args:
        model: any ``AutoModelForCausalLM``; its parameters stop requiring gradients and it goes to evaluation mode.
        tokenizer: the tokenizer that belongs to it, where texts are to be read.
        targets: suffixes of module paths (``["q_proj", "v_proj"]``), ``"all-linear"``, or None for the architecture's
            usual ones. The embedding and the head are never adapted.
        gradient_checkpointing: recompute each decoder layer in the backward pass: less memory, about a third more time.

    Raises:
        InputError: a target that no linear layer has; the message lists the valid ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        targets: Sequence[str] | str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.gradient_checkpointing = gradient_checkpointing
        self.slots = find_slots(model, targets)
        self._modules = dict(model.named_modules())
        self._blocks = {
            path: [inner for slot in self.slots for inner in slot.paths if inner.startswith(path + ".")]
            for path, module in self._modules.items()
            if isinstance(module, GradientCheckpointingLayer)
        }

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        targets: Sequence[str] | str | None = None,
        precision: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Backbone:
        """Load a model and its tokenizer from ``builtin:nano``, a local folder or a hub id.

        Raises:
            InputError: there is no such model.
        """
        source = BUILTIN_BASES.get(str(name), name)
        if str(name).startswith("builtin:") and str(name) not in BUILTIN_BASES:
            raise InputError(f"no embedded base {name!r}; there is {', '.join(BUILTIN_BASES)}{nearest(str(name), BUILTIN_BASES)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=precision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"base model {str(name)!r} cannot be loaded: give builtin:nano, a folder saved with save_pretrained, "
                f"or the hub id of a causal language model ({reason})"
            ) from error
        return cls(model.to(device), tokenizer, targets=targets, gradient_checkpointing=gradient_checkpointing)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def context(self) -> int | None:
        """The longest document in tokens that the model can read, or None where its configuration sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def logits(self, input_ids: Tensor, change: Change | None = None, *, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits (rows, tokens, vocabulary), with ``change`` made to the output of every target layer.

        Rows that are padded on the right need no ``attention_mask``: attention is causal, so no token sees the padding
        behind it, and without a mask attention takes its fast path.
        """
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, input_ids.shape)
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def unprojected(self, input_ids: Tensor, change: Change | None = None) -> Tensor | UnprojectedLogits:
        """As ``logits``, but the head is left to whoever needs the logits: a loss never holds those of all tokens at once.

        Models that do more than a linear map after their last hidden state, as Gemma 2's soft cap, give the logits themselves.
        """
        if not self._ends_with_head:
            return self.logits(input_ids, change)
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, input_ids.shape)
            states = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return UnprojectedLogits(states, self.model.get_output_embeddings())

    @cached_property
    def _ends_with_head(self) -> bool:
        """Whether the model's logits are its output embedding's map of its last hidden states, found out on two tokens."""
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or self.model.base_model is self.model or head.weight.device != self.device:
            return False
        with torch.no_grad():
            two = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
            output = self.model.base_model(input_ids=two, use_cache=False)
            states = getattr(output, "last_hidden_state", None)
            # exactly: a soft cap changes small logits by very little
            return states is not None and torch.equal(head(states), self.model(input_ids=two, use_cache=False).logits)

    def _enter(self, stack: ExitStack, change: Change, shape: torch.Size) -> None:
        """Put the changes on the layers until ``stack`` closes."""
        if not self.gradient_checkpointing:
            stack.enter_context(self._changed([path for slot in self.slots for path in slot.paths], change, shape))
            return
        inside = {path for paths in self._blocks.values() for path in paths}
        outside = [path for slot in self.slots for path in slot.paths if path not in inside]
        stack.enter_context(self._changed(outside, change, shape))
        for block, paths in self._blocks.items():
            stack.enter_context(self._checkpointed(self._modules[block], paths, change, shape))

    @contextmanager
    def _changed(self, paths: Sequence[str], change: Change, shape: torch.Size) -> Iterator[None]:
        """Forward hooks that make ``change`` to the outputs of the modules at ``paths``."""
        wanted = set(paths)
        handles = [
            self._modules[path].register_forward_hook(_hook(change, slot, layer, shape))
            for slot in self.slots
            for layer, path in enumerate(slot.paths)
            if path in wanted
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _checkpointed(self, block: nn.Module, paths: Sequence[str], change: Change, shape: torch.Size) -> Iterator[None]:
        """Recompute ``block`` in the backward pass, with the same changes on its layers as in the forward pass."""
        original = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # the backward pass runs this again when the outer hooks are long gone: the block brings its own
            with self._changed(paths, change, shape):
                return original(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

        block.forward = forward
        try:
            yield
        finally:
            del block.forward

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        targets = ", ".join(f"{slot.name} x {slot.layers}" for slot in self.slots)
        return f"Backbone({self.model.config.model_type}, {parameters / 1e6:.1f} M parameters, targets: {targets})"


def _hook(change: Change, slot: Slot, layer: int, shape: torch.Size) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    rows, tokens = shape

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # OPT flattens (rows, tokens) before its feed-forward layers
        x = args[0].reshape(rows, tokens, -1)
        return change(slot, layer, x, output.reshape(rows, tokens, -1)).reshape(output.shape)

    return hook


def _linear_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer by its path, the embedding and the head left out."""
    ends = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in ends
    }  # fmt: skip


def find_slots(model: PreTrainedModel, targets: Sequence[str] | str | None = None) -> list[Slot]:
    """Group the target layers of ``model`` into slots: same place in the block, same shape.

    Args:
        model: a causal language model.
        targets: as for :class:`Backbone`.

    Raises:
        InputError: a target that no linear layer has.
    """
    linear = _linear_modules(model)
    kinds: dict[str, list[str]] = {}
    for path in linear:
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), []).append(path)
    names = _short_names(list(kinds))
    if targets is None:
        targets = USUAL_TARGETS.get(model.config.model_type, DEFAULT_TARGETS)
    elif targets == "all-linear" or list(targets) == ["all-linear"]:
        targets = list(kinds)
    elif isinstance(targets, str):
        targets = [targets]
    chosen: dict[str, None] = {}
    for target in targets:
        # with and without the stars: a short name may reach across a list of layers ("experts.up_proj")
        matching = [kind for kind in kinds if any(f".{path}".endswith(f".{target}") for path in (kind, kind.replace(".*", "")))]
        if not matching:
            valid = sorted({*names.values(), "all-linear"})
            raise InputError(
                f"target {target!r} names no linear layer of this model; valid: {', '.join(valid)}{nearest(target, valid)}"
            )
        chosen.update(dict.fromkeys(matching))
    slots = []
    for kind in (kind for kind in kinds if kind in chosen):
        shapes: dict[tuple[int, int, bool], list[str]] = {}
        for path in kinds[kind]:
            shapes.setdefault(_shape(linear[path]), []).append(path)
        for (in_features, out_features, transposed), paths in shapes.items():
            # some models change the width of a layer with depth: each shape is a slot of its own
            name = names[kind].replace(".", "_") + ("" if len(shapes) == 1 else f"_{out_features}x{in_features}")
            slots.append(Slot(name, tuple(paths), in_features, out_features, transposed))
    return slots


def _shape(module: nn.Module) -> tuple[int, int, bool]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1], True
    weight = module.weight
    assert isinstance(module, nn.Linear) and isinstance(weight, Tensor)
    return module.in_features, module.out_features, False


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
    """For each pattern of paths its shortest suffix that no other pattern shares."""
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
