"""The frozen causal language model: its target layers, and its logits with their outputs changed.

    >>> from bora_pyro import Backbone
    >>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "v_proj"])
    >>> [(slot.name, slot.layers, slot.in_features, slot.out_features) for slot in backbone.slots]
    [('v_proj', 4, 256, 256), ('q_proj', 4, 256, 256)]

The backbone knows neither adapters nor priors. It groups the linear layers that are to be adapted into *slots* (one slot
a kind of layer, stacked over the depth of the model). While it runs, a callable may change the output of each of them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro.backbone.allocator import give_back_freed_memory
from bora_pyro.backbone.attention import use_short_attention
from bora_pyro.backbone.digest import weights_digest
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.backbone.loading import check_no_adapter
from bora_pyro.backbone.slots import Slot, find_slots, linear_modules, linear_shape, linear_weight
from bora_pyro.errors import InputError, nearest

BUILTIN_BASES = {"builtin:nano": Path(__file__).parents[1] / "assets" / "nano"}

#: How a base's linear layers may be stored: bitsandbytes' NormalFloat4 and LLM.int8().
QUANTIZATIONS = ("4bit", "8bit")
#: The placements over several devices that transformers works out itself.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

#: The largest output of a layer on CPUs: half of glibc's largest threshold above which memory is mapped.
PASS_BYTES = 2**24

#: ``change(slot, layer, x, output)``: the changed output of one linear layer, (rows, tokens, out_features), given its input,
#: (rows, tokens, in_features), and its own output, both on the device of the layer; so is the result.
Change = Callable[[Slot, int, Tensor, Tensor], Tensor]


class Backbone:
    """A frozen causal language model whose linear layers can be changed row by row.

        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> sizes = {"hidden_size": 8, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "word_embed_proj_dim": 8}
        >>> backbone = Backbone(OPTForCausalLM(OPTConfig(vocab_size=16, max_position_embeddings=8, **sizes)), targets="fc2")
        >>> ids = torch.tensor([[2, 5, 6]])
        >>> doubled = backbone.logits(ids, lambda slot, layer, x, output: 2 * output)
        >>> doubled.shape, torch.equal(doubled, backbone.logits(ids)), [slot.name for slot in backbone.slots]
        (torch.Size([1, 3, 16]), False, ['fc2'])

    Args:
        model: any ``AutoModelForCausalLM``; its parameters stop requiring gradients and it goes to evaluation mode.
        tokenizer: the tokenizer that belongs to it, where texts are to be read.
        targets: suffixes of module paths (``["q_proj", "v_proj"]``), ``"all-linear"``, or None for the architecture's
            usual ones. The embedding and the head are never adapted.
        gradient_checkpointing: recompute each decoder layer in the backward pass: less memory, about a third more time. On CPUs
            the allocator is told to give freed memory back (``give_back_freed_memory``), which holds for the whole process.

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
        use_short_attention(model)
        self.tokenizer = tokenizer
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing and next(model.parameters()).device.type == "cpu":
            give_back_freed_memory()
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
        quantization: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Backbone:
        """Load a model and its tokenizer from ``builtin:nano``, a local folder or a hub id.

        Args:
            name: what to load.
            targets: as for :class:`Backbone`.
            precision: of the weights, and of the arithmetic where they are quantised.
            device: where the model goes, unless ``device_map`` says it.
            quantization: ``4bit`` or ``8bit`` stores the linear layers so (the head and the embedding excepted); they are
                multiplied in ``precision``, 8-bit ones in float16 (int8 where the device has it). It needs bitsandbytes.
            device_map: ``auto`` or another of ``DEVICE_MAPS`` spreads the layers over the devices; a mapping from module paths
                to devices does so by hand. It needs accelerate.
            gradient_checkpointing: as for :class:`Backbone`.
            trust_remote_code: let a model that brings code of its own run it.

        Raises:
            InputError: there is no such model, quantisation or placement, or a package is missing that they need; the model
                brings code that it was not allowed to run; its weights are not safetensors; it is an adapter of another model.
        """
        placement = _placement(quantization, device_map, precision, device)
        source = BUILTIN_BASES.get(str(name), name)
        if str(name).startswith("builtin:") and str(name) not in BUILTIN_BASES:
            raise InputError(f"no embedded base {name!r}; there is {', '.join(BUILTIN_BASES)}{nearest(str(name), BUILTIN_BASES)}")
        try:
            check_no_adapter(source)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            # weights that are pickled could run code as they are read
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=precision, trust_remote_code=trust_remote_code, use_safetensors=True, **placement
            )
        except InputError:
            raise
        except Exception as error:  # a damaged file raises what its reader pleases
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"base model {str(name)!r} brings code of its own, which is not run: read it, and if you trust it give "
                    "--trust_remote_code true; or use another base"
                ) from error
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"base model {str(name)!r} cannot be loaded: give builtin:nano, a folder saved with save_pretrained, "
                f"or the hub id of a causal language model ({reason})"
            ) from error
        model = _differentiable(model) if placement else model.to(device)
        return cls(model, tokenizer, targets=targets, gradient_checkpointing=gradient_checkpointing)

    @property
    def device(self) -> torch.device:
        """Where the inputs go: to the model's device, or to that of its embedding where the layers lie on several."""
        embedding = self.model.get_input_embeddings()
        # accelerate's, where weights wait elsewhere until they are used
        execution = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if execution is None else torch.device(execution)

    @property
    def context(self) -> int | None:
        """The longest document in tokens that the model can read, or None where its configuration sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @cached_property
    def pass_tokens(self) -> int:
        """The tokens of a forward and backward pass: with more of them it is the slower for each.

        On CPUs a tensor above glibc's largest threshold for mapped memory, 32 MiB, comes from the system anew whenever it is
        made, page by page; so the widest layer's output stays below half of it: smaller passes are no faster for each token,
        larger ones pad their rows more and hold more.
        """
        if self.device.type != "cpu":
            return sys.maxsize
        linear = linear_modules(self.model).values()
        widest = max((max(linear_shape(module)[:2]) for module in linear), default=1)
        return max(1, PASS_BYTES // (widest * self.model.get_input_embeddings().weight.element_size()))

    def weight(self, slot: Slot, layer: int) -> Tensor:
        """The frozen weight of one layer of a slot, (out, in) float32."""
        return linear_weight(self._modules[slot.paths[layer]])

    def logits(self, input_ids: Tensor, change: Change | None = None, *, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits (rows, tokens, vocabulary), with ``change`` made to the output of every target layer.

        Rows that are padded on the right need no ``attention_mask``: attention is causal, so no token sees the padding
        behind it, and without a mask attention takes its fast path.
        """
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, len(input_ids))
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def lazy_logits(self, input_ids: Tensor, change: Change | None = None) -> Tensor | LazyLogits:
        """As ``logits``, but the head is left to whoever needs the logits: a loss never holds those of all tokens at once.

        Models that do more than a linear map after their last hidden state, as Gemma 2's soft cap, give the logits themselves.
        """
        if not self.ends_with_head:
            return self.logits(input_ids, change)
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, len(input_ids))
            states = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return LazyLogits(states, self.model.get_output_embeddings())

    def dummy_pass(self, *, backward: bool = False) -> None:
        """A pass whose result nobody wants: for processes that each hold a part of the base and need the others' parts."""
        two = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        with torch.set_grad_enabled(backward):
            zero = torch.zeros((), device=self.device, requires_grad=backward)
            output = self.lazy_logits(two, lambda slot, layer, x, output: output + zero.to(output))
            states = output.states if isinstance(output, LazyLogits) else output
            if backward:
                states.float().sum().backward()

    @cached_property
    def digest(self) -> str | None:
        """By which a run knows its base again, as `weights_digest` gives it; None where there is no such thing."""
        return weights_digest(self.model)

    @cached_property
    def ends_with_head(self) -> bool:
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

    @contextmanager
    def changed(self, change: Change, rows: int) -> Iterator[PreTrainedModel]:
        """The model itself, with ``change`` made to the output of every target layer of each of so many rows meanwhile.

        For what runs the model as transformers does, its ``generate`` with its cache among it. Gradient checkpointing is for
        training and is not in force here.
        """
        with self._changed([path for slot in self.slots for path in slot.paths], change, rows):
            yield self.model

    def _enter(self, stack: ExitStack, change: Change, rows: int) -> None:
        """Put the changes on the layers until ``stack`` closes."""
        if not self.gradient_checkpointing:
            stack.enter_context(self.changed(change, rows))
            return
        inside = {path for paths in self._blocks.values() for path in paths}
        outside = [path for slot in self.slots for path in slot.paths if path not in inside]
        stack.enter_context(self._changed(outside, change, rows))
        for block, paths in self._blocks.items():
            stack.enter_context(self._checkpointed(self._modules[block], paths, change, rows))

    @contextmanager
    def _changed(self, paths: Sequence[str], change: Change, rows: int) -> Iterator[None]:
        """Forward hooks that make ``change`` to the outputs of the modules at ``paths``."""
        wanted = set(paths)
        handles = [
            self._modules[path].register_forward_hook(_hook(change, slot, layer, rows))
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
    def _checkpointed(self, block: nn.Module, paths: Sequence[str], change: Change, rows: int) -> Iterator[None]:
        """Recompute ``block`` in the backward pass, with the same changes on its layers as in the forward pass."""
        original = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            # the backward pass runs this again when the outer hooks are long gone: the block brings its own
            with self._changed(paths, change, rows):
                return original(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

        # accelerate, too, puts a forward of its own on a block whose inputs it moves
        own = vars(block).get("forward")
        block.forward = forward
        try:
            yield
        finally:
            if own is None:
                del block.forward
            else:
                block.forward = own

    def __repr__(self) -> str:
        parameters = self.model.num_parameters()
        targets = ", ".join(f"{slot.name} x {slot.layers}" for slot in self.slots)
        return f"Backbone({self.model.config.model_type}, {parameters / 1e6:.1f} M parameters, targets: {targets})"


def _placement(
    quantization: str | None, device_map: str | Mapping[str, Any] | None, precision: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """What ``from_pretrained`` of transformers is told of quantisation and devices; empty for a plain base on one device.

    Raises:
        InputError: an unknown value, or a package that is missing.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise InputError(
            f"quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}{nearest(quantization, QUANTIZATIONS)}"
        )
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise InputError(f"device_map is {device_map!r}; allowed: {', '.join(DEVICE_MAPS)}{nearest(device_map, DEVICE_MAPS)}")
    if quantization is not None:
        _require("quantization", quantization, ("bitsandbytes", "accelerate"), extra="quantization")
        # warnings that inputs become float16, with every layer and batch, and that a kernel is missing which has no backward pass
        for noisy in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        return {
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True)
            if quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision),
            "device_map": {"": device} if device_map is None else device_map,
        }
    if device_map is not None:
        _require("device_map", device_map, ("accelerate",), extra="peft")
        return {"device_map": device_map}
    return {}


def _differentiable(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs with bfloat16.

    It would do so wherever an input needs no gradient (the first layer, every evaluation), for good: the repacked layers multiply
    in bfloat16, have no backward pass, and refuse outputs that are no multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _require(option: str, value: object, packages: Sequence[str], *, extra: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{option} {value!r} needs {package}, which is not installed; pip install 'bora_pyro[{extra}]'")


def _hook(change: Change, slot: Slot, layer: int, rows: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # OPT flattens (rows, tokens) before its feed-forward layers; accelerate moves an input inside the layer, unseen here
        x = args[0].to(output.device).reshape(rows, -1, args[0].shape[-1])
        return change(slot, layer, x, output.reshape(rows, -1, output.shape[-1])).reshape(output.shape)

    return hook
