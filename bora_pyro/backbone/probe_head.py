"""Whether a base's logits are exactly its head, a linear map, applied to its last hidden states.

>>> from transformers import CohereConfig, CohereForCausalLM
>>> from bora_pyro.backbone.passes import hooks, probe_tokens
>>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}
>>> model, seen = CohereForCausalLM(CohereConfig(**sizes, eos_token_id=1, logit_scale=0.5)).eval(), FirstPass()
>>> input_ids = probe_tokens(model, torch.device("cpu"))
>>> with hooks() as hook, torch.no_grad():
...     record_head(model, seen, hook)
...     seen.logits = model(input_ids=input_ids).logits
>>> ends_with_head(model, input_ids, seen)
False
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from bora_pyro.backbone.passes import Hooks, hooks, is_close, rounding_of


@dataclass
class FirstPass:
    """What one pass of the whole model shows: its logits, and each call of its base and of its head.

    Attributes:
        logits: (rows, tokens, vocabulary).
        base: the output of each call of ``model.base_model``.
        head: the input and the output of each call of the head.
    """

    logits: Any = None
    base: list[Any] = field(default_factory=list)
    head: list[tuple[Any, Any]] = field(default_factory=list)


def record_head(model: PreTrainedModel, seen: FirstPass, hook: Hooks) -> None:
    """Record what goes through the base and the head while the hooks are there."""
    hook(model.base_model, lambda module, args, output: seen.base.append(output))
    if (head := model.get_output_embeddings()) is not None:
        hook(head, lambda module, args, output: seen.head.append((args[0] if args else None, output)))


@torch.no_grad()
def ends_with_head(model: PreTrainedModel, input_ids: Tensor, seen: FirstPass) -> bool:
    """Whether the logits are exactly the head applied to ``model.base_model(...).last_hidden_state``.

    Some models scale or cap their logits or states. Such a step can leave small numbers and zeros as they are, so it is not
    enough to compare the results of one pass. Here, the states and then the output of the head are replaced with random numbers
    of all sizes. They must arrive unchanged at the head and in the logits.

    Args:
        model: the base.
        input_ids: (rows, tokens) of the first pass.
        seen: what the first pass showed.
    """
    base, head = model.base_model, model.get_output_embeddings()
    # a head on another device, or whose weights are not loaded, cannot be applied by the loss in chunks of tokens
    if base is model or type(head) is not nn.Linear or head.weight.device != input_ids.device or head.weight.is_meta:
        return False
    if len(seen.head) != 1 or not all(isinstance(x, Tensor) for x in seen.head[0]) or seen.head[0][1].shape != seen.logits.shape:
        return False
    at_head, output = seen.head[0]
    states = getattr(base(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.shape != at_head.shape or not (_varied(states) and _varied(output)):
        return False
    replaced_states, replaced_logits = _random_like(at_head), _random_like(output)
    arrived: list[Tensor] = []

    def at_the_head(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        arrived.append(args[0])
        return replaced_logits

    with hooks() as hook:
        if called := len(seen.base) == 1:
            hook.replace(base, lambda *args, **kwargs: _with_states(seen.base[0], replaced_states))
        hook(head, at_the_head)
        logits = model(input_ids=input_ids, use_cache=False).logits
    same_logits = logits.shape == replaced_logits.shape and torch.equal(logits.float(), replaced_logits.float())
    if not called:  # the model calls a part of its base; then the states themselves are compared
        return same_logits and torch.equal(states, at_head)
    return same_logits and torch.equal(arrived[0], replaced_states) and is_close(states, at_head, rounding_of(model))


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
