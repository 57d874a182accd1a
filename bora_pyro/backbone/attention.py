"""A faster backward pass of attention for short documents in bfloat16 on CPUs.

    >>> from torch.nn import functional as F
    >>> q, k, v = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3))  # rows, heads, tokens, width of a head
    >>> own = ShortAttention.apply(q, k, v, 8**-0.5)
    >>> torch.equal(own, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**-0.5))
    True

torch's flash attention for CPUs works through each head block by block. In the backward pass these blocks are too small for a
CPU's bfloat16 matrix units. For short documents, plain batched products over a few heads at a time are faster, because their
attention weights stay in the cache: 1.2 times as fast with 256 tokens, 3 times with 128. The forward pass is torch's.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name of this attention in transformers.
NAME = "short_sdpa"
#: The largest head, tokens times width, that is worked on here. For larger heads torch's own kernel is as fast.
MOST_NUMBERS = 8192
# The number of attention weights in one chunk of heads: 4 MiB of float32.
_CHUNK_ENTRIES = 2**20


class ShortAttention(torch.autograd.Function):
    """Causal attention, softmax(scale q kᵀ) v. All tensors have the shape (rows, heads, tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output, log_normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, log_normaliser)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, log_normaliser = ctx.saved_tensors
        shape, tokens = query.shape[:2], query.shape[2]
        q, k, v, grad_output = (x.flatten(0, 1) for x in (query, key, value, outputs[0]))
        # Σ_j (∂L/∂weight_ij) weight_ij, the term of softmax's gradient that all scores of a token share
        common = (outputs[0].float() * output.float()).sum(-1).flatten(0, 1)
        # The extra column subtracts within one product: scale q kᵀ − log Σ exp, and ∂L/∂weight − common. Both are
        # differences of near numbers, so they are in float32.
        q_and = _append_column(q.float() * ctx.scale, -log_normaliser.flatten(0, 1))
        grad_output_and = _append_column(grad_output.float(), -common)
        k_and, v_and = (_append_column(x.float(), torch.ones_like(common)) for x in (k, v))
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for part in _head_chunks(len(q), tokens):
            weights = torch.bmm(q_and[part], k_and[part].mT).exp_().tril_()
            torch.bmm(weights.to(q.dtype).mT, grad_output[part], out=grad_v[part])
            grad_scores = torch.bmm(grad_output_and[part], v_and[part].mT).mul_(weights).to(q.dtype)
            torch.bmm(grad_scores, k[part], out=grad_q[part]).mul_(ctx.scale)
            torch.bmm(grad_scores.mT, q[part], out=grad_k[part]).mul_(ctx.scale)
        return grad_q.unflatten(0, shape), grad_k.unflatten(0, shape), grad_v.unflatten(0, shape), None


def _append_column(x: Tensor, column: Tensor) -> Tensor:
    return torch.cat([x, column[..., None]], -1)


def _head_chunks(heads: int, tokens: int) -> list[slice]:
    size = max(1, _CHUNK_ENTRIES // tokens**2)
    return [slice(start, start + size) for start in range(0, heads, size)]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: short attention if it is faster, else transformers' ``sdpa``."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and all(kwargs.get(name) is None for name in _UNSUPPORTED)
    if not (plain and is_faster(query, key, value)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    groups = query.shape[1] // key.shape[1]
    output = ShortAttention.apply(
        query, repeat_kv(key, groups), repeat_kv(value, groups), query.shape[3] ** -0.5 if scaling is None else scaling
    )
    return output.transpose(1, 2).contiguous(), None


# Arguments of transformers that short attention does not support.
_UNSUPPORTED = ("position_bias", "cache", "softcap")


def is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether short attention is faster than torch's, for tensors of shape (rows, heads, tokens, width)."""
    bfloat16_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    short = query.shape[2] * query.shape[3] <= MOST_NUMBERS and query.shape[2:] == key.shape[2:] == value.shape[2:]
    return bfloat16_on_cpu and query.requires_grad and short


def use_short_attention(model: PreTrainedModel) -> None:
    """Set up short attention in a model that uses torch's ``scaled_dot_product_attention``.

    Some models ask for the name of their attention and do other things under a name that they do not know. DeepSeek V3.2, for
    example, would read all tokens instead of those that its indexer selects. These keep ``sdpa``.
    """
    if model.config._attn_implementation == "sdpa" and not asks_for_name(model):
        model.set_attn_implementation(NAME)


def asks_for_name(model: PreTrainedModel) -> bool:
    """Whether the code of a model compares the name of its attention with ``sdpa``, or cannot be read."""
    types = {base for module in model.modules() for base in type(module).__mro__}
    files = {kind.__module__ for kind in types if kind.__module__.partition(".")[0] not in _LIBRARIES}
    files |= {kind.__module__ for kind in types if kind.__module__.startswith("transformers.models.")}
    try:
        return any(_COMPARED.search(inspect.getsource(sys.modules[file])) for file in files)
    except (OSError, TypeError, KeyError):
        return True


# Packages whose classes many models share; their code gives no name a special treatment.
_LIBRARIES = {"builtins", "torch", "transformers", "bitsandbytes", "accelerate", "peft", "typing", "abc"}
_COMPARED = re.compile(r"""_attn_implementation\)?\s*(==|!=|in|not in)\s[^\n]*["']sdpa["']""")

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
