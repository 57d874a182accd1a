"""Adapters on some blocks of the base: which layers they are on, and what is refused."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, LoRA
from bora_pyro.adapters import MTLoRA
from tests.tiny import of_task, random_ids, random_weights, tiny_backbone, tiny_model
from tests.tiny_base import script


def paths(backbone):
    return [path for slot in backbone.slots for path in slot.paths]


def deep(layers, *, targets="fc1"):
    return Backbone(tiny_model("opt", num_hidden_layers=6), targets=targets, layers=layers)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("0-1", (0, 1)),
        ("2", (2,)),
        ("-1", (5,)),
        ("-2:", (4, 5)),
        (":2", (0, 1)),
        ("1:3", (1, 2)),
        (["5", "0"], (0, 5)),
        ("0, 0-1 5", (0, 1, 5)),
        ("3-9", (3, 4, 5)),
        (None, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_the_blocks_that_a_text_names(layers, blocks):
    [slot] = deep(layers).slots
    assert (slot.name, slot.blocks) == ("fc1", blocks)


def test_targets_and_blocks_together():
    names = [slot.name for slot in deep("1", targets=None).slots]
    assert sorted(names) == ["q_proj", "v_proj"]
    assert all(".1." in path for path in paths(deep("1", targets="all-linear")))
    # a target with a number is one layer, whatever its kind
    backbone = deep(None, targets=["layers.0.fc1", "5.fc2", "q_proj"])
    assert {slot.name: slot.blocks for slot in backbone.slots} == {"q_proj": (0, 1, 2, 3, 4, 5), "fc1": (0,), "fc2": (5,)}


def test_the_end_is_that_of_the_stack_and_not_of_the_kind():
    model = script("tiny_architectures").tiny_model("nemotron_h")  # attention is not in every block
    whole = Backbone(model)
    last = max(block for slot in whole.slots for block in slot.blocks)
    count = len(model.model.layers)
    if last + 1 < count:
        with pytest.raises(InputError, match="there is no target layer"):
            Backbone(model, layers="-1")
    assert {block for slot in Backbone(model, layers=str(last - count)).slots for block in slot.blocks} == {last}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", r"layers has 'first'; give blocks by number, as 0, -1 \(the last one\), 0-3 or -4:"),
        (["0", "7"], "layers names the blocks '7', in which there is no target layer; there are some from block 0 to block 5"),
        ("5-3", "layers names the blocks '5-3'"),
        ("-7", "layers names the blocks '-7'"),
        ("", "layers is empty"),
        ([], "layers is empty"),
        ([" , "], "layers is empty"),
    ],
)
def test_bad_blocks(layers, message):
    with pytest.raises(InputError, match=message):
        deep(layers)


def test_other_blocks_are_those_of_the_base():
    model = BoRA(deep("0-1", targets="all-linear"), 2, adapter=LoRA(rank=2))
    assert {start.shape[0] for start in model.starts.values()} == {2}
    weights, seen = of_task(random_weights(model), slice(0, 1)), []
    change = model.change(weights, torch.zeros(3, dtype=torch.int64))

    def noted(slot, layer, x, output):
        seen.append(slot.paths[layer])
        return change(slot, layer, x, output)

    changed = model.backbone.logits(random_ids(), noted)
    assert sorted(seen) == sorted(paths(model.backbone))
    assert all(".0." in path or ".1." in path for path in seen)
    assert not torch.allclose(changed, model.backbone.logits(random_ids()))


def test_blocks_that_were_left_out_have_no_note():
    model = script("tiny_architectures").tiny_model("nemotron_h")
    assert Backbone(model).notes
    last = max(block for slot in Backbone(model).slots for block in slot.blocks)
    assert Backbone(model, layers=str(last)).notes == []


def test_options_of_an_adapter_count_among_its_own_layers():
    model = BoRA(deep("1-3"), 2, adapter=MTLoRA(rank=2, task_layers="-1"))
    active = {name: model.tensors.active(name, 2) for name in model.starts if "lora_A" in name}
    assert active
    assert all(int(of.min()) > 0 for of in active.values())


def test_a_checkpointed_base_with_adapters_on_some_blocks():
    for layers in ("0", "1"):
        backbone = Backbone(tiny_model("llama"), layers=layers, gradient_checkpointing=True)
        scale = torch.tensor(1.0, requires_grad=True)
        backbone.logits(random_ids(), lambda slot, layer, x, output, scale=scale: output * scale).square().mean().backward()
        plain = tiny_backbone("llama")
        other = torch.tensor(1.0, requires_grad=True)
        plain.logits(
            random_ids(),
            lambda slot, layer, x, output, layers=layers, other=other: output * other if str(layer) == layers else output,
        ).square().mean().backward()
        torch.testing.assert_close(scale.grad, other.grad, rtol=1e-4, atol=1e-6)
