from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro import Backbone, InputError
from bora_pyro.backbone.slots import find_slots
from tests.tiny import (
    ARCHITECTURES,
    TASKS,
    hooks_left,
    of_task,
    peft_model,
    random_ids,
    random_weights,
    tiny_backbone,
    tiny_bora,
    tiny_model,
)
from tests.tiny_base import save_base, script

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TARGETS = pytest.mark.parametrize("targets", [None, "all-linear"])
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


def logits(model, input_ids, weights, task):
    return model.backbone.logits(input_ids, model.change(weights, torch.as_tensor(task)))


@TARGETS
@EVERY_ARCHITECTURE
def test_zero_change_gives_the_base_bit_for_bit(architecture, targets):
    model = tiny_bora(architecture, targets=targets)
    weights = {name: value if "lora_A" in name else torch.zeros_like(value) for name, value in random_weights(model).items()}
    input_ids = random_ids()
    expected = model.backbone.model(input_ids=input_ids).logits
    assert torch.equal(logits(model, input_ids, weights, [0, 2, 1]), expected)
    assert torch.equal(model.backbone.logits(input_ids), expected)


@TARGETS
@EVERY_ARCHITECTURE
def test_a_mixed_batch_equals_one_peft_model_a_task(architecture, targets):
    model = tiny_bora(architecture, targets=targets)
    weights, input_ids, task = random_weights(model), random_ids(rows=5), [2, 0, 1, 0, 2]
    mixed = logits(model, input_ids, weights, task)
    for d in range(TASKS):
        rows = [row for row, of in enumerate(task) if of == d]
        reference = peft_model(model, of_task(weights, d), targets)(input_ids=input_ids[rows]).logits
        torch.testing.assert_close(mixed[rows], reference, **CLOSE)
    base = model.backbone.logits(input_ids)
    assert (mixed - base).abs().mean() > 0.1


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
def test_a_row_does_not_depend_on_its_neighbours(architecture):
    model = tiny_bora(architecture, targets="all-linear")
    weights, input_ids, task = random_weights(model), random_ids(), [2, 0, 1]
    mixed = logits(model, input_ids, weights, task)
    for row, d in enumerate(task):
        alone = logits(model, input_ids[row : row + 1], weights, [d])
        torch.testing.assert_close(mixed[row : row + 1], alone, **CLOSE)


@EVERY_ARCHITECTURE
def test_padding_on_the_right_changes_no_real_token(architecture):
    model = tiny_bora(architecture, targets="all-linear")
    model.backbone.model.double()  # rows of another length take another way through a matrix product
    weights, input_ids, task = random_weights(model), random_ids(), [2, 0, 1]
    padded = torch.nn.functional.pad(input_ids, (0, 6), value=1)
    expected = logits(model, input_ids, weights, task)
    torch.testing.assert_close(logits(model, padded, weights, task)[:, : input_ids.shape[1]], expected, **CLOSE)


def test_an_attention_mask_reaches_the_model():
    model = tiny_model("llama")
    input_ids, mask = random_ids(), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    assert torch.equal(Backbone(model).logits(input_ids, layout={"attention_mask": mask}), expected)


@EVERY_ARCHITECTURE
def test_the_whole_context_can_be_read(architecture):
    backbone = tiny_backbone(architecture)
    assert backbone.context == 32
    assert backbone.logits(random_ids(1, backbone.context)).isfinite().all()


@TARGETS
@EVERY_ARCHITECTURE
def test_the_base_is_frozen_and_the_latents_are_not(architecture, targets):
    model = tiny_bora(architecture, targets=targets)
    weights = {name: value.requires_grad_() for name, value in random_weights(model).items()}
    logits(model, random_ids(), weights, [2, 0, 1]).square().mean().backward()
    assert not model.backbone.model.training
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.model.parameters())
    # every task, every layer, every latent
    assert all((value.grad.flatten(2).abs().amax(-1) > 0).all() for value in weights.values())


@TARGETS
@EVERY_ARCHITECTURE
def test_gradient_checkpointing_recomputes_and_changes_nothing(architecture, targets):
    model, results = tiny_bora(architecture, targets=targets), {}
    blocks = [m for m in model.backbone.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    calls = []
    # a module inside the block: checkpointing replaces the block's own forward
    counter = next(blocks[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        model.backbone.gradient_checkpointing = checkpointing
        weights = {name: value.requires_grad_() for name, value in random_weights(model).items()}
        calls.clear()
        output = logits(model, random_ids(), weights, [2, 0, 1])
        assert len(calls) == 1
        output.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        results[checkpointing] = {"logits": output.detach()} | {name: value.grad for name, value in weights.items()}
    counter.remove()
    assert len(blocks) == 2
    assert hooks_left(model.backbone) == 0
    torch.testing.assert_close(results[True], results[False], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "qwen3"])
def test_a_bf16_base_leaves_the_latents_float32(architecture):
    model = tiny_bora(architecture, targets="all-linear")
    weights = {name: value.requires_grad_() for name, value in random_weights(model, scale=0.1).items()}
    full = logits(model, random_ids(), weights, [2, 0, 1])
    low = copy.deepcopy(model.backbone.model).to(torch.bfloat16)
    model.backbone = Backbone(low, targets="all-linear")
    half = logits(model, random_ids(), weights, [2, 0, 1])
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    assert (half.float() - full).norm() < 0.05 * full.norm()
    half.float().square().mean().backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.abs().sum() > 0 for value in weights.values())


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("gpt2", {"c_attn"}), *((name, {"q_proj", "v_proj"}) for name in ARCHITECTURES if name != "gpt2")],
)
def test_default_targets(architecture, names):
    assert {slot.name for slot in tiny_backbone(architecture).slots} == names


@pytest.mark.parametrize("model_type", ["gpt_neox", "bloom", "falcon"])
def test_default_target_of_fused_attention(model_type):
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    [slot] = Backbone(AutoModelForCausalLM.from_config(config)).slots
    assert (slot.name, slot.layers) == ("query_key_value", 2)


def test_slots_know_their_shapes():
    shapes = {slot.name: (slot.in_features, slot.out_features) for slot in tiny_backbone("llama", targets="all-linear").slots}
    assert shapes == {
        "q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32),
        "gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32),
    }  # fmt: skip
    [slot] = tiny_backbone("gpt2").slots
    assert (slot.in_features, slot.out_features, slot.fan_in_fan_out) == (32, 96, True)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("fc1", ["fc1"]),
        (["self_attn.q_proj"], ["q_proj"]),
        (["q_proj", "self_attn.q_proj"], ["q_proj"]),
        (["model.decoder.layers.*.fc2"], ["fc2"]),
        (["project_in", "fc1"], ["project_in", "fc1"]),
        (["all-linear"], ["project_out", "project_in", "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]),
    ],
)
def test_targets_are_suffixes(targets, names):
    assert [slot.name for slot in tiny_backbone("opt-350m", targets=targets).slots] == names


def test_slot_names_stay_apart_where_last_names_do_not():
    slots = {slot.name: slot for slot in tiny_backbone("gpt2", targets=["c_proj"]).slots}
    assert list(slots) == ["attn_c_proj", "mlp_c_proj"]
    assert [slot.in_features for slot in slots.values()] == [32, 128]
    [slot] = tiny_backbone("gpt2", targets=["mlp.c_proj"]).slots
    assert slot == slots["mlp_c_proj"]


def test_paths_follow_the_layers():
    # with more than ten layers an order by name would differ
    [slot] = tiny_backbone("opt", targets=["q_proj"], num_hidden_layers=12).slots
    assert slot.paths == tuple(f"model.decoder.layers.{layer}.self_attn.q_proj" for layer in range(12))


@pytest.mark.parametrize("tied", [True, False])
@EVERY_ARCHITECTURE
def test_embedding_and_head_are_never_adapted(architecture, tied):
    backbone = tiny_backbone(architecture, targets="all-linear", tie_word_embeddings=tied)
    model = backbone.model
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    adapted = {model.get_submodule(path) for slot in backbone.slots for path in slot.paths}
    assert not adapted & {model.get_output_embeddings(), model.get_input_embeddings()}
    with pytest.raises(InputError, match="lm_head"):
        find_slots(model, ["lm_head"])


def test_an_unknown_target_lists_the_valid_ones():
    with pytest.raises(
        InputError, match=r"'q_prj'.*valid: all-linear, fc1, fc2, k_proj, out_proj, q_proj, v_proj; did you mean 'q_proj'\?"
    ):
        tiny_backbone("opt", targets=["v_proj", "q_prj"])


def test_the_valid_targets_of_the_message_are_valid():
    with pytest.raises(InputError, match=r"valid: all-linear, attn\.c_proj, c_attn, c_fc, mlp\.c_proj$"):
        tiny_backbone("gpt2", targets=["xyz"])
    assert len(tiny_backbone("gpt2", targets=["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]).slots) == 4


class Experts(PreTrainedModel):
    """Only the modules matter: a layer list inside a layer list, and a second kind with the same last name."""

    config_class = AutoConfig.for_model("llama").__class__

    def __init__(self, config):
        super().__init__(config)

        def layer():
            experts = torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8)}) for _ in range(2)])
            return torch.nn.ModuleDict({"experts": experts, "shared": torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8)})})

        self.layers = torch.nn.ModuleList([layer() for _ in range(2)])

    def get_output_embeddings(self):
        return None

    def get_input_embeddings(self):
        return None


def test_nested_layer_lists_have_usable_names():
    model = Experts(AutoConfig.for_model("llama"))
    with pytest.raises(InputError, match=r"valid: all-linear, experts\.up, shared\.up$"):
        find_slots(model, "xyz")
    [experts] = find_slots(model, "experts.up")
    assert (experts.name, experts.layers) == ("experts_up", 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_are_gone_after_a_call(checkpointing):
    model = tiny_bora(targets="all-linear")
    model.backbone.gradient_checkpointing = checkpointing
    logits(model, random_ids(), random_weights(model), [2, 0, 1])
    assert hooks_left(model.backbone) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_are_gone_after_an_exception(checkpointing):
    backbone = tiny_backbone("opt", targets="all-linear", gradient_checkpointing=checkpointing)

    def fails_late(slot, layer, x, output):
        if layer == 1:
            raise RuntimeError("stop")
        return output

    before = backbone.logits(random_ids())
    with pytest.raises(RuntimeError, match="stop"):
        backbone.logits(random_ids(), fails_late)
    assert hooks_left(backbone) == 0
    assert torch.equal(backbone.logits(random_ids()), before)


@pytest.mark.parametrize("architecture", ["opt-350m", "gpt2", "llama"])
def test_each_layer_is_asked_once_and_sees_rows_and_tokens(architecture):
    backbone, asked = tiny_backbone(architecture, targets="all-linear"), []

    def record(slot, layer, x, output):
        assert x.shape == (3, 7, slot.in_features)
        asked.append((slot.name, layer))
        assert output.shape == (3, 7, slot.out_features)
        return output

    backbone.logits(random_ids(), record)
    assert sorted(asked) == sorted((slot.name, layer) for slot in backbone.slots for layer in range(slot.layers))


def test_from_pretrained_reads_a_folder_and_names_what_is_wrong(tmp_path):
    from tests.data_fixtures import word_tokenizer

    model = tiny_model("opt")
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    backbone = Backbone.from_pretrained(tmp_path, precision=torch.bfloat16, targets="fc1")
    assert backbone.model.dtype == torch.bfloat16
    assert [slot.name for slot in backbone.slots] == ["fc1"]
    assert backbone.tokenizer("red")["input_ids"] == [3]
    assert torch.equal(Backbone.from_pretrained(tmp_path).logits(random_ids()), model(input_ids=random_ids()).logits)
    with pytest.raises(InputError, match="cannot be loaded"):
        Backbone.from_pretrained(tmp_path / "none")
    with pytest.raises(InputError, match=r"'builtin:nan'.*did you mean 'builtin:nano'\?"):
        Backbone.from_pretrained("builtin:nan")


def test_repr():
    assert repr(tiny_backbone("opt")) == "Backbone(opt, 0.0 M parameters, targets: v_proj x 2, q_proj x 2)"


def test_a_base_is_known_again_by_its_weights(tmp_path):
    model = tiny_model("llama")
    digest = Backbone(model).digest
    assert digest == Backbone(tiny_model("llama")).digest != Backbone(tiny_model("llama", seed=1)).digest
    save_base(tmp_path)
    model.save_pretrained(tmp_path)
    found = {Backbone.from_pretrained(tmp_path, precision=precision).digest for precision in (torch.float32, torch.bfloat16)}
    assert found == {digest}
    for number, name in enumerate(("model.layers.1.mlp.up_proj", "model.norm", "model.embed_tokens")):
        changed = tiny_model("llama")
        changed.get_submodule(name).weight.data[-1] *= 1.01 + 0.1 * number
        assert Backbone(changed).digest != digest, name


def test_weights_that_have_no_numbers_here_have_no_digest():
    assert Backbone(tiny_model("llama").to("meta")).digest is None


def test_a_base_whose_backward_pass_leaves_out_adapters():
    with pytest.raises(InputError, match="a ReformerModelWithLMHead, computes its backward pass without the adapters"):
        Backbone(script("tiny_architectures").tiny_model("reformer"))
