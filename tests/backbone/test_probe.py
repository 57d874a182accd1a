"""What a backbone finds out about its base is right, also where one pass of the base would not show it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from bora_pyro import Backbone, BoRA, InputError, LoRA
from bora_pyro.likelihoods import NextTokens
from tests.tiny import TASKS, VOCABULARY, hooks_left, of_task, peft_model, random_ids, random_weights, tiny_model
from tests.tiny_base import script

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Bases that scale or cap their logits. Row 0 of their embedding is zero, as ``pad_token_id=0`` leaves it.
SCALED = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8},
    "gemma2 with a high cap": {"final_logit_softcapping": 1000.0, "head_dim": 8},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3},
    "nanochat": {"final_logit_softcapping": 15.0},
}


def base(model_type, *, seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **changes})).eval()


def losses_of(logits, targets):
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), reduction="none").view(3, -1).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALED)
def test_the_loss_is_that_of_the_models_own_logits_where_these_are_scaled(name, dtype):
    model = base(name.split()[0], **SCALED[name]).to(dtype)
    assert not model.get_input_embeddings().weight[0].any()
    backbone, input_ids = Backbone(model, targets=["down_proj"] if name == "recurrent_gemma" else "all-linear"), random_ids()
    assert not backbone.ends_with_head
    found = -NextTokens(backbone.lazy_logits(input_ids)).log_prob(input_ids)
    torch.testing.assert_close(found, losses_of(model(input_ids=input_ids).logits, input_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "granite", "granitemoe", "gemma", "mistral", "bloom", "mamba"])
def test_a_plain_head_is_recognised(model_type, dtype):
    assert Backbone(base(model_type).to(dtype), targets="all-linear").ends_with_head


def add_steps(model, after_head, before_head):
    """Put a step between the head and the logits, and one between the states and the head, as a model's own code has them."""
    forward = model.forward

    def changed(*args, **kwargs):
        before = model.lm_head.register_forward_pre_hook(lambda module, args: (before_head(args[0]),))
        after = model.lm_head.register_forward_hook(lambda module, args, output: after_head(output))
        try:
            return forward(*args, **kwargs)
        finally:
            before.remove()
            after.remove()

    model.forward = changed


def unchanged(x):
    return x


@pytest.mark.parametrize(
    ("after_head", "before_head"),
    [
        (lambda x: torch.tanh(x / 1e4) * 1e4, unchanged),
        (lambda x: x.clamp(-50, 50), unchanged),
        (lambda x: x * 1.001, unchanged),
        (unchanged, lambda x: x * 0.5),
        (unchanged, lambda x: x.clamp(-50, 50)),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_step_that_the_models_own_numbers_would_not_show_is_found(architecture, after_head, before_head):
    model = tiny_model(architecture)
    add_steps(model, after_head, before_head)
    assert not Backbone(model).ends_with_head


#: Types whose attention reads in both directions unless they are told that they decode.
BOTH_WAYS = ["bert", "roberta", "electra", "xlm-roberta", "rembert", "ernie", "megatron-bert", "cpmant", "xlm", "xlnet"]


def both_ways(model_type):
    sizes = {"embedding_size": 32} if model_type == "electra" else {"input_embedding_size": 32} if model_type == "rembert" else {}
    if model_type == "xlnet":  # it has no limit of its context, and allows none to be set
        config = AutoConfig.for_model("xlnet", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0)
        return AutoModelForCausalLM.from_config(config).eval()
    return base(model_type, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", BOTH_WAYS)
def test_a_base_that_reads_in_both_directions_is_refused(model_type, dtype):
    with pytest.raises(InputError, match=r"a \w+, is not a causal language model: .* depends on later tokens; give another base"):
        Backbone(both_ways(model_type).to(dtype), targets="all-linear")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "megatron-bert"])
def test_the_same_base_as_a_decoder_is_accepted(model_type):
    with pytest.raises(InputError, match=r"or set is_decoder to true in its config\.json"):
        Backbone(base(model_type))
    assert Backbone(base(model_type, is_decoder=True), targets=["query", "value"]).slots


def changed_logits(model, change):
    """The model, with logits that are ``change(input_ids, logits)``."""
    forward = model.forward

    def changed(input_ids, **options):
        output = forward(input_ids=input_ids, **options)
        output.logits = change(input_ids, output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize(
    ("change", "on"),
    [
        (lambda ids, logits: logits + logits.mean(1, keepdim=True), "later tokens"),
        # less than rounding may change: the gradients show it
        (lambda ids, logits: logits + 1e-5 * logits.mean(1, keepdim=True), "later tokens"),
        (lambda ids, logits: logits + logits.mean(0, keepdim=True), "the other rows of a batch"),
        (lambda ids, logits: logits + (ids == 1).any(1)[:, None, None], "the padding after a text"),
        (lambda ids, logits: logits * ids.shape[1], "the padding after a text"),
    ],
)
def test_what_a_prediction_must_not_depend_on(change, on):
    with pytest.raises(InputError, match=rf"predicts after a token depends on {on};"):
        Backbone(changed_logits(tiny_model("llama"), change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rounding_for_other_tokens_is_no_dependence(dtype):
    # tokens of all rows share the experts' products, so that other tokens change their shapes
    model = tiny_model("llama").to(dtype)
    noise = torch.finfo(dtype).eps
    changed_logits(model, lambda ids, logits: logits * (1 + noise * (ids.sum() % 7).to(dtype)))
    assert Backbone(model).slots


def test_a_model_that_reads_no_plain_tokens_is_refused_in_one_line():
    model = tiny_model("llama")

    def forward(input_ids, **options):
        raise ValueError("give\nimages")

    model.forward = forward
    with pytest.raises(InputError, match=r"a LlamaForCausalLM, does not read plain tokens \(ValueError: give images\)"):
        Backbone(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt-350m"])
def test_a_probe_leaves_no_hook_and_no_seed_behind(architecture):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = tiny_model(architecture)
    before = model(input_ids=random_ids()).logits
    torch.manual_seed(5)
    backbone = Backbone(model)
    assert torch.equal(torch.rand(3), expected)
    assert hooks_left(backbone) == 0
    assert torch.equal(backbone.logits(random_ids()), before)


@pytest.mark.parametrize("context", [1, 2, 3, 5])
def test_a_short_context_is_enough(context):
    assert Backbone(tiny_model("gpt2", n_positions=context)).slots


def test_layers_that_are_never_called_have_no_adapter():
    backbone = Backbone(base("bart", decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, d_model=32))
    assert {slot.name: slot.layers for slot in backbone.slots} == {"v_proj": 2, "q_proj": 2}
    assert not any("encoder_attn" in path for slot in backbone.slots for path in slot.paths)
    assert backbone.notes == [
        "no adapter on 4 of the layers that the targets name; they are not called when the base reads text: "
        "model.decoder.layers.*.encoder_attn.v_proj, model.decoder.layers.*.encoder_attn.q_proj"
    ]
    assert not Backbone(backbone.model, targets=["self_attn.q_proj", "fc1"]).notes


@pytest.mark.parametrize(
    ("model_type", "changes", "target", "reason"),
    [
        ("bart", {"decoder_layers": 2, "d_model": 32, "decoder_attention_heads": 4}, "encoder_attn.q_proj", "are not called"),
        ("mamba", {}, "dt_proj", "are not called when the base reads text"),
        ("falcon_mamba", {}, "dt_proj", "are not called when the base reads text"),
        ("phimoe", {"num_local_experts": 4}, "router", "do not map one tensor to one tensor"),
        ("llama4_text", {"num_local_experts": 4, "head_dim": 8}, "router", "do not map one tensor to one tensor"),
    ],
)
def test_a_layer_that_no_adapter_can_change(model_type, changes, target, reason):
    model = base(model_type, **changes)
    with pytest.raises(InputError, match=rf"target '{target}' only names layers that {reason}.*; valid: all-linear, "):
        Backbone(model, targets=[target])
    backbone = Backbone(model, targets="all-linear")
    last = target.rsplit(".", maxsplit=1)[-1]
    assert not any(path.endswith(target) for slot in backbone.slots for path in slot.paths)
    [note] = [note for note in backbone.notes if reason in note]  # beside one about experts
    assert f".{last}" in note
    # all that is left can be changed, and changes the logits
    for slot in backbone.slots:
        for layer in range(slot.layers):
            changed = backbone.logits(
                random_ids(), lambda of, at, x, output, here=(slot, layer): output * (1 + ((of, at) == here))
            )
            assert not torch.equal(changed, backbone.logits(random_ids())), slot.paths[layer]


def test_the_default_of_a_multimodal_base_adapts_its_language_model():
    text = {**_SIZES, "head_dim": 8, "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    backbone = Backbone(AutoModelForImageTextToText.from_config(config))
    assert {slot.name: slot.paths for slot in backbone.slots} == {
        name: tuple(f"model.language_model.layers.{layer}.self_attn.{name}" for layer in range(2))
        for name in ("q_proj", "v_proj")
    }
    [note] = backbone.notes
    assert note.startswith("no adapter on 2 of the layers that the targets name; they are not called when the base reads text")
    assert "vision_tower" in note


class RoutedExperts(nn.Module):
    """Each token goes to one of several experts, which read the tokens that were gathered for them from all rows."""

    def __init__(self, width, number=3):
        super().__init__()
        self.gate = nn.Linear(width, number, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, x):
        flat, result = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            result[rows] = expert(flat[rows])
        return result.view(x.shape)


class TokensFirst(nn.Module):
    """A layer that reads (tokens, rows, width)."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(("module", "target"), [(RoutedExperts, "experts"), (TokensFirst, "mlp.inner")])
def test_a_layer_whose_rows_cannot_be_told_apart_has_no_adapter(module, target):
    model = tiny_model("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = module(32)
    with pytest.raises(
        InputError, match=rf"target '{target}' only names layers that do not read all tokens of each row in order"
    ):
        Backbone(model, targets=[target])
    backbone = Backbone(model, targets="all-linear")
    assert not any(target in path for slot in backbone.slots for path in slot.paths)
    assert sum("do not read all tokens of each row in order" in note for note in backbone.notes) == 1


def test_a_layer_that_is_called_twice_is_changed_twice():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    bora = BoRA(Backbone(model, targets=["down_proj"]), TASKS, adapter=LoRA(rank=2, alpha=3.0))
    assert [slot.layers for slot in bora.backbone.slots] == [1]
    weights, input_ids, task = random_weights(bora), random_ids(), [2, 0, 1]
    mixed = bora.backbone.logits(input_ids, bora.change(weights, torch.tensor(task)))
    for row, d in enumerate(task):
        reference = peft_model(bora, of_task(weights, d), ["down_proj"])(input_ids=input_ids[[row]]).logits
        torch.testing.assert_close(mixed[[row]], reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "jamba", "rwkv", "mpt", "falcon", "xglm"])
def test_many_kinds_of_layers_read_whole_rows(model_type, dtype):
    changes = {"head_dim": 8} if model_type in ("mixtral", "qwen3_moe") else {}
    if model_type == "deepseek_v3":
        changes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8,
                   "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
                   "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
    backbone = Backbone(base(model_type, **changes).to(dtype), targets="all-linear")
    assert [note for note in left_out(backbone) if "dt_proj" not in note] == []
    alone = torch.cat([backbone.logits(random_ids()[[row]], doubled) for row in range(3)])
    torch.testing.assert_close(backbone.logits(random_ids(), doubled), alone, rtol=0.05, atol=0.05 * float(alone.abs().max()))


def left_out(backbone):
    return [note for note in backbone.notes if note.startswith("no adapter")]


def doubled(slot, layer, x, output):
    assert x.shape[0] == output.shape[0]
    return 1.5 * output


def test_a_base_without_layers_to_adapt_is_refused():
    model = tiny_model("llama")
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), last, Product(layer))
    with pytest.raises(InputError, match="a LlamaForCausalLM, has no linear layer that an adapter can change"):
        Backbone(model, targets="all-linear")


class Product(nn.Module):
    """A linear map that is no ``nn.Linear``."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x):
        return x @ self.weight.mT


def test_layers_without_a_gradient_have_no_adapter():
    model = script("tiny_architectures").tiny_model("deepseek_v32")
    with pytest.raises(InputError, match=r"target 'indexer.wk' only names layers that pass no gradient to a prediction"):
        Backbone(model, targets="indexer.wk")
    backbone = Backbone(model, targets="all-linear")
    assert not any("indexer" in path for slot in backbone.slots for path in slot.paths)
    [note] = left_out(backbone)
    assert note.startswith("no adapter on 6 of the layers that the targets name; they pass no gradient to a prediction")
    scales = {path: torch.ones((), requires_grad=True) for slot in backbone.slots for path in slot.paths}
    backbone.logits(random_ids(), lambda slot, layer, x, out: out * scales[slot.paths[layer]]).square().mean().backward()
    assert all(scale.grad is not None for scale in scales.values())


def test_layers_that_only_a_longer_text_uses_have_an_adapter():
    # they compress eight tokens into one
    backbone = Backbone(script("tiny_architectures").tiny_model("deepseek_v4"), targets="all-linear")
    paths = {path for slot in backbone.slots for path in slot.paths}
    assert any(path.endswith("compressor.kv_proj") for path in paths)
    assert any(path.endswith("compressor.gate_proj") for path in paths)


def test_a_frozen_part_whose_gradient_is_zero_for_now_has_an_adapter():
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    assert [slot.layers for slot in Backbone(model).slots] == [2, 2]


def test_a_base_whose_backward_pass_leaves_out_adapters_is_refused():
    with pytest.raises(InputError, match="a ReformerModelWithLMHead, computes its backward pass without the adapters"):
        Backbone(script("tiny_architectures").tiny_model("reformer"), targets="all-linear")
