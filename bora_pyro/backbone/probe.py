"""A few short passes through a base model, when a backbone is built, that find out what it does.

>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
>>> model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
>>> ends_with_head(model, probe_tokens(model, torch.device("cpu")))
True

The answers are those of the model in the precision and on the devices of the fit. The tokens and all other random numbers come
from a generator of their own, so that a probe changes no seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

#: Rows and tokens of a probe.
ROWS, TOKENS = 3, 7
#: The largest difference, relative to the largest value, that rounding makes in float32 and in shorter or quantised numbers.
ROUNDING, COARSE_ROUNDING = 1e-3, 0.2


def probe_tokens(model: PreTrainedModel, device: torch.device, *, context: int | None = None) -> Tensor:
    """Different ordinary tokens: (rows, tokens) int64, without padding and without tokens that stand for an image or the like.

    Args:
        model: the base.
        device: the device of the tokens.
        context: the most tokens that the base reads.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = set(_special_tokens(model.config))
    usual = [token for token in range(min(vocabulary, 2**16)) if token not in special]
    # a vocabulary of special tokens alone has no others
    allowed = torch.tensor(usual if len(usual) > 1 else range(vocabulary))
    tokens = TOKENS if not context or context < 1 else min(TOKENS, context)
    order = torch.randperm(len(allowed), generator=Generator().manual_seed(0))
    return allowed[order.repeat(-(-ROWS * tokens // len(order)))[: ROWS * tokens]].view(ROWS, tokens).to(device)


def _special_tokens(config: PreTrainedConfig) -> Iterator[int]:
    """The numbers in a configuration, or in one inside it, that are the ids of single tokens."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _special_tokens(value)
        elif "token" in name and name.endswith(("_id", "_ids", "_index")):
            yield from (number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int))


class FirstPass:
    """What one pass of the whole model showed: its logits, and each call of its base and of its head.

    Attributes:
        logits: (rows, tokens, vocabulary).
        base: the output of each call of ``model.base_model``.
        head: the input and the output of each call of the head.
    """

    def __init__(self) -> None:
        self.logits: Any = None
        self.base: list[Any] = []
        self.head: list[tuple[Any, Any]] = []


@torch.no_grad()
def first_pass(model: PreTrainedModel, input_ids: Tensor) -> FirstPass:
    """Run the model once and record what goes through its base and its head."""
    seen, head = FirstPass(), model.get_output_embeddings()
    with _hooks() as hook:
        hook(model.base_model, lambda module, args, output: seen.base.append(output))
        if head is not None:
            hook(head, lambda module, args, output: seen.head.append((args[0] if args else None, output)))
        seen.logits = model(input_ids=input_ids, use_cache=False).logits
    return seen


@torch.no_grad()
def ends_with_head(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether the logits are exactly the head, a linear map, applied to ``model.base_model(...).last_hidden_state``.

    Some models scale or cap their logits or states. Such a step can leave small numbers and zeros as they are, so it is not
    enough to compare the results of one pass. Here, the states and then the output of the head are replaced with random numbers
    of all sizes. They must arrive unchanged at the head and in the logits.

    Args:
        model: the base.
        input_ids: (rows, tokens), as ``probe_tokens`` returns them.
    """
    base, head = model.base_model, model.get_output_embeddings()
    # a head on another device, or without weights of its own yet, cannot be applied by the loss in chunks of tokens
    if base is model or type(head) is not nn.Linear or head.weight.device != input_ids.device or head.weight.is_meta:
        return False
    seen = first_pass(model, input_ids)
    if len(seen.head) != 1 or not all(isinstance(x, Tensor) for x in seen.head[0]) or seen.head[0][1].shape != seen.logits.shape:
        return False
    at_head, output = seen.head[0]
    states = getattr(base(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.shape != at_head.shape or not (_varied(states) and _varied(output)):
        return False
    replaced_states, replaced_logits = _random_like(at_head), _random_like(output)
    arrived: list[Tensor] = []
    with _hooks() as hook:
        if called := len(seen.base) == 1:
            hook.replace(base, lambda *args, **kwargs: _with_states(seen.base[0], replaced_states))

        def at_the_head(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
            arrived.append(args[0])
            return replaced_logits

        hook(head, at_the_head)
        logits = model(input_ids=input_ids, use_cache=False).logits
    same_logits = logits.shape == replaced_logits.shape and torch.equal(logits.float(), replaced_logits.float())
    if not called:  # the model calls a part of its base; then the states themselves are compared
        return same_logits and torch.equal(states, at_head)
    return same_logits and torch.equal(arrived[0], replaced_states) and is_close(states, at_head, rounding_of(model))


def rounding_of(model: PreTrainedModel) -> float:
    """The largest relative difference between results that differ only in rounding."""
    coarse = model.dtype not in (torch.float32, torch.float64) or getattr(model, "is_quantized", False)
    return COARSE_ROUNDING if coarse else ROUNDING


def is_close(x: Tensor, y: Tensor, rounding: float) -> bool:
    """Whether two tensors differ by no more than ``rounding`` times the largest value."""
    return bool((x.float() - y.float()).abs().max() <= rounding * y.float().abs().max())


def _varied(x: Tensor) -> bool:
    """Whether (rows, tokens, features) are finite, and no two tokens have the same features."""
    flat = x.float().flatten(0, -2)
    return bool(flat.isfinite().all()) and len(flat.unique(dim=0)) == len(flat) and bool((flat.std(-1) > 0).all())


def _random_like(x: Tensor) -> Tensor:
    """Random numbers with sizes from 10⁻³ to 10³, in the type and on the device of ``x``."""
    generator = Generator().manual_seed(1)
    size = 10 ** (6 * torch.rand(x.shape, generator=generator) - 3)
    return (size * torch.randn(x.shape, generator=generator)).to(x)


def _with_states(output: Any, states: Tensor) -> Any:
    """The output of a base with other last hidden states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    changed = copy.copy(output)
    changed["last_hidden_state"] = states
    return changed


class _Hooks:
    """Forward hooks and replaced forward functions, until ``close``."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __call__(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        self._undo.append(module.register_forward_hook(hook).remove)

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Call ``forward`` instead of the module's own function."""
        # accelerate may have replaced it already, to move its inputs between devices
        own: Any = vars(module).get("forward")
        self._undo.append(lambda: delattr(module, "forward") if own is None else setattr(module, "forward", own))
        module.forward = forward

    def close(self) -> None:
        for undo in reversed(self._undo):
            undo()


@contextmanager
def _hooks() -> Iterator[_Hooks]:
    hooks = _Hooks()
    try:
        yield hooks
    finally:
        hooks.close()
