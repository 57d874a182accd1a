"""Attention's own backward pass: as exact as torch's, and used only where torch's is slow."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bora_pyro import Backbone
from bora_pyro.backbone import attention as module
from bora_pyro.backbone.attention import NAME, ShortAttention, attention
from tests.tiny import random_ids, tiny_model
from tests.tiny_base import script

# On a processor with AMX, torch packs the keys of longer texts in bfloat16, and its own code without AVX then refuses to.
TORCH_PACKS = pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="torch's own attention in bfloat16 raises where a processor with AMX is told to compute without AVX",
)


def inputs(rows=3, heads=4, tokens=7, width=8, *, kv_heads=None, dtype=torch.bfloat16, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, tokens, n, width) for n in (heads, kv_heads or heads, kv_heads or heads)]
    # as the projections leave them: tokens before heads in memory
    values = [(spread * torch.randn(shape, generator=generator)).to(dtype).transpose(1, 2) for shape in shapes]
    gradient = torch.randn((rows, heads, tokens, width), generator=generator).to(dtype)
    return [value.requires_grad_() for value in values], gradient


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_in_double_precision_the_gradient_is_that_of_torch(tokens, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", chunk)
    values, gradient = inputs(tokens=tokens, dtype=torch.float32)
    own = ShortAttention.apply(*values, 0.3)
    torchs = F.scaled_dot_product_attention(*values, is_causal=True, scale=0.3)
    assert torch.equal(own, torchs)
    expected = torch.autograd.grad(torchs, values, gradient)
    for mine, theirs in zip(torch.autograd.grad(own, values, gradient), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@TORCH_PACKS
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch(spread):
    values, gradient = inputs(tokens=64, spread=spread)
    exact = [value.detach().double().requires_grad_() for value in values]
    truth = torch.autograd.grad(F.scaled_dot_product_attention(*exact, is_causal=True), exact, gradient.double())
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*values, is_causal=True), values, gradient)
    mine = torch.autograd.grad(ShortAttention.apply(*values, 8**-0.5), values, gradient)
    for own, torchs, true in zip(mine, theirs, truth, strict=True):
        error, of_torch = ((x.double() - true).norm() / true.norm() for x in (own, torchs))
        assert error < max(2 * of_torch, 2**-7)


def calls(monkeypatch):
    made = []

    class Counted:
        @staticmethod
        def apply(*args):
            made.append(args[0].shape)
            return ShortAttention.apply(*args)

    monkeypatch.setattr(module, "ShortAttention", Counted)
    return made


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_heads_that_share_keys_and_values(kv_heads, monkeypatch):
    made, layer = calls(monkeypatch), torch.nn.Module()
    layer.num_key_value_groups = 4 // kv_heads
    values, gradient = inputs(kv_heads=kv_heads, tokens=16)
    own, _ = attention(layer, *values, None, scaling=0.3)
    theirs, _ = sdpa_attention_forward(layer, *values, None, scaling=0.3)
    assert len(made) == 1
    torch.testing.assert_close(own, theirs, rtol=0.02, atol=0.02)
    gradient = gradient.transpose(1, 2)
    for mine, expected in zip(
        torch.autograd.grad(own, values, gradient), torch.autograd.grad(theirs, values, gradient), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"dtype": torch.float32}, {}),
        pytest.param({"tokens": module.MOST_NUMBERS // 8 + 1}, {}, marks=TORCH_PACKS),
        ({}, {"is_causal": False}),
        ({}, {"attention_mask": torch.ones(7, 7, dtype=torch.bool)}),
        ({}, {"dropout": 1e-9}),
    ],
)
def test_everything_else_is_left_to_transformers(change, options, monkeypatch):
    made, layer = calls(monkeypatch), torch.nn.Module()
    values, _ = inputs(**change)
    mask = options.pop("attention_mask", None)
    own, _ = attention(layer, *values, mask, **options)
    with torch.no_grad():
        attention(layer, *values, mask, **options)
    theirs, _ = sdpa_attention_forward(layer, *values, mask, **options)
    assert not made
    assert torch.equal(own, theirs)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "qwen3", "gemma"])
def test_a_base_in_bfloat16_trains_with_it(architecture, monkeypatch):
    made = calls(monkeypatch)
    backbone = Backbone(tiny_model(architecture).bfloat16())
    assert backbone.model.config._attn_implementation == NAME
    ids, scale = random_ids(), torch.tensor(1.0, requires_grad=True)
    backbone.logits(ids, lambda slot, layer, x, output: output * scale.to(output.dtype)).float().square().mean().backward()
    assert made
    before = scale.grad.clone()
    scale.grad = None
    backbone.model.set_attn_implementation("sdpa")
    backbone.logits(ids, lambda slot, layer, x, output: output * scale.to(output.dtype)).float().square().mean().backward()
    torch.testing.assert_close(before, scale.grad, rtol=0.05, atol=0.05)


def test_a_window_of_attention_and_eager_attention_stay_what_they_are(monkeypatch):
    made = calls(monkeypatch)
    scale = torch.tensor(1.0, requires_grad=True)
    backbone = Backbone(tiny_model("mistral").bfloat16())  # a window of 4 tokens
    made.clear()
    backbone.logits(random_ids(), lambda slot, layer, x, output: output * scale.to(output.dtype)).float().sum().backward()
    assert not made
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    assert Backbone(eager).model.config._attn_implementation == "eager"


# sparse attention, sinks, a cap of the scores, windows, ALiBi, latent and linear attention
OTHER_ATTENTION = [
    "deepseek_v32", "glm_moe_dsa", "falcon", "gpt_oss", "gemma2", "mistral", "mpt", "bloom", "deepseek_v3", "qwen3_next",
    "llama4",
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", OTHER_ATTENTION)
def test_a_base_predicts_what_it_did_before(model_type, dtype, grad):
    changes = {"index_topk": 2} if model_type in ("deepseek_v32", "glm_moe_dsa") else {}
    model = script("tiny_architectures").tiny_model(model_type, **changes).to(dtype).requires_grad_(False)
    before = model(input_ids=random_ids(), use_cache=False).logits
    scale = torch.tensor(1.0, requires_grad=grad)
    after = Backbone(model).logits(random_ids(), lambda slot, layer, x, output: output * scale.to(output.dtype))
    assert after.requires_grad == grad
    assert torch.equal(after, before)


def test_a_model_that_asks_for_the_name_of_its_attention_keeps_it():
    model = script("tiny_architectures").tiny_model("deepseek_v32", index_topk=2)
    expected = model(input_ids=random_ids(), use_cache=False).logits
    model.set_attn_implementation(NAME)
    assert not torch.allclose(model(input_ids=random_ids(), use_cache=False).logits, expected, atol=1e-3)
    model.set_attn_implementation("sdpa")
    backbone = Backbone(model)
    assert backbone.model.config._attn_implementation == "sdpa"
    assert torch.equal(backbone.logits(random_ids()), expected)
