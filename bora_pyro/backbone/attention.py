"""The backward pass of attention over short documents in bfloat16 on CPUs, where torch's own is slow.

    >>> from torch.nn import functional as F
    >>> q, k, v = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3))  # rows, heads, tokens, width of a head
    >>> own = ShortAttention.apply(q, k, v, 8**-0.5)
    >>> torch.equal(own, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**-0.5))
    True

torch's flash attention for CPUs works through blocks of each head by itself, in the backward pass with products too small for
the matrix units of a CPU in bfloat16. For short documents plain batched products over some heads at a time, whose attention
weights stay in the cache, are faster: by 1.2 with 256 tokens, by 3 with 128. The forward pass is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name by which transformers knows it.
NAME = "short_sdpa"
#: Numbers of a head, tokens times width; with more of them torch's own kernel is as fast.
MOST_NUMBERS = 8192
# Attention weights that are worked at together: 4 MiB of float32.
_CHUNK_ENTRIES = 2**20


class ShortAttention(torch.autograd.Function):
    """Causal attention, softmax(scale q kᵀ) v; all (rows, heads, tokens, width)."""

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
        q, k, v, of_output = (x.flatten(0, 1) for x in (query, key, value, outputs[0]))
        # Σ_j (∂/∂weight_ij) weight_ij, as the weights of each token sum to one
        common = (outputs[0].float() * output.float()).sum(-1).flatten(0, 1)
        # float32 where differences cancel, one product each: scale q kᵀ − log Σ exp, and ∂/∂weight less what is common
        q_and = _beside(q.float() * ctx.scale, -log_normaliser.flatten(0, 1))
        of_output_and = _beside(of_output.float(), -common)
        k_and, v_and = (_beside(x.float(), torch.ones_like(common)) for x in (k, v))
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        for part in _parts(len(q), tokens):
            weights = torch.bmm(q_and[part], k_and[part].mT).exp_().tril_()
            torch.bmm(weights.to(q.dtype).mT, of_output[part], out=of_v[part])
            of_scores = torch.bmm(of_output_and[part], v_and[part].mT).mul_(weights).to(q.dtype)
            torch.bmm(of_scores, k[part], out=of_q[part]).mul_(ctx.scale)
            torch.bmm(of_scores.mT, q[part], out=of_k[part]).mul_(ctx.scale)
        return of_q.unflatten(0, shape), of_k.unflatten(0, shape), of_v.unflatten(0, shape), None


def _beside(x: Tensor, column: Tensor) -> Tensor:
    return torch.cat([x, column[..., None]], -1)


def _parts(heads: int, tokens: int) -> list[slice]:
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
    """What transformers calls in each layer: short attention where it pays, its own ``sdpa`` elsewhere."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and all(kwargs.get(name) is None for name in _OTHERS)
    if not (plain and pays(query, key, value)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    groups = query.shape[1] // key.shape[1]
    output = ShortAttention.apply(
        query, repeat_kv(key, groups), repeat_kv(value, groups), query.shape[3] ** -0.5 if scaling is None else scaling
    )
    return output.transpose(1, 2).contiguous(), None


# What transformers may ask of attention beside a causal mask.
_OTHERS = ("position_bias", "cache", "softcap")


def pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a backward pass through attention over these, (rows, heads, tokens, width), is one that torch is slow at."""
    here = query.device.type == "cpu" and query.dtype == torch.bfloat16
    short = query.shape[2] * query.shape[3] <= MOST_NUMBERS and query.shape[2:] == key.shape[2:] == value.shape[2:]
    return here and query.requires_grad and short


def use_short_attention(model: PreTrainedModel) -> None:
    """Let a model that attends by torch's ``scaled_dot_product_attention`` use short attention where it pays."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
