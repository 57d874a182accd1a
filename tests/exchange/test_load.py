"""From PEFT folders to latents: bit for bit from our own, with the same logits from PEFT's, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bora_pyro import BoRA, InputError, LoRA, save_peft
from bora_pyro.adapters import ADAPTERS
from bora_pyro.exchange.load import load_peft, read_peft
from tests.exchange.peft_folder import CONFIG, KEY, TENSORS
from tests.tiny import (
    ARCHITECTURES,
    loaded_peft,
    of_task,
    peft_warnings,
    random_ids,
    random_weights,
    tiny_backbone,
    tiny_bora,
    tiny_model,
)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name.startswith("lora")])
def test_export_import_export(adapter, architecture, targets, tmp_path):
    model = tiny_bora(architecture, targets=targets, adapter=ADAPTERS[adapter](rank=2, alpha=3.5))
    weights = of_task(random_weights(model), 1)
    save_peft(tmp_path / "first", model, weights)
    again = load_peft(tmp_path / "first", model)
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    save_peft(tmp_path / "second", model, again)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def trained_by_peft(folder, architecture, **options):
    """A folder that PEFT wrote, of an adapter with random matrices, and its logits."""
    with peft_warnings():
        peft = get_peft_model(tiny_model(architecture), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **options)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    with torch.no_grad():
        return peft(input_ids=random_ids()).logits


BY_PEFT = {
    "list": ("opt", {"target_modules": ["q_proj", "v_proj"]}),
    "pattern": ("opt", {"target_modules": r".*\.layers\.\d+\.(self_attn\.k_proj|fc1)"}),
    "all": ("opt-350m", {"target_modules": "all-linear"}),
    "paths": ("llama", {"target_modules": [f"model.layers.{n}.mlp.down_proj" for n in range(2)]}),
    "fused, transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "all transposed": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "stabilised": ("qwen3", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "some layers": ("opt", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one layer": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 0}),
    "pattern of some": ("opt", {"target_modules": r".*\.layers\.0\.self_attn\.(q|v)_proj"}),
    "paths of some": ("opt", {"target_modules": ["layers.0.fc1", "layers.1.fc1", "layers.1.self_attn.q_proj"]}),
    "all but one": ("opt", {"target_modules": ["fc1"], "exclude_modules": ["model.decoder.layers.0.fc1"]}),
    "all but a pattern": ("opt", {"target_modules": ["fc1", "fc2"], "exclude_modules": r".*layers\.1\.fc2"}),
    "ranks": ("opt", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 1}}),
    "alphas": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 2, "v_proj": 9}},
    ),
    "ranks and alphas": (
        "gpt2",
        {
            "target_modules": "all-linear",
            "fan_in_fan_out": True,
            "rank_pattern": {"c_attn|h.1.mlp.c_fc": 4},
            "alpha_pattern": {"c_fc": 1, "h.0.attn.c_proj": 3},
        },
    ),
    "all of it": (
        "opt",
        {
            "target_modules": ["q_proj", "fc1"],
            "layers_to_transform": [0],
            "use_rslora": True,
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"q_proj": 7},
        },
    ),
    "narrow": ("llama", {"target_modules": ["k_proj", "v_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize(("architecture", "options"), BY_PEFT.values(), ids=BY_PEFT)
def test_adapters_by_peft_itself(architecture, options, tmp_path):
    expected = trained_by_peft(tmp_path, architecture, r=3, lora_alpha=5, **options)
    found = read_peft(tmp_path)
    backbone = tiny_backbone(architecture, targets=found.targets)
    weights = load_peft(tmp_path, backbone)
    model = BoRA(backbone, 2, adapter=LoRA(found.rank, found.alpha))
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in model.starts.items()}
    change = model.change({name: value[None] for name, value in weights.items()}, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(backbone.logits(random_ids(), change), expected, atol=1e-5, rtol=1e-5)
    assert found.scaling == pytest.approx(5 / 3**0.5 if options.get("use_rslora") else 5 / 3)


def test_another_scale_of_the_model_goes_into_b(tmp_path):
    trained_by_peft(tmp_path, "opt", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model, found = tiny_bora("opt", adapter=LoRA(rank=2, alpha=3.0)), read_peft(tmp_path)
    weights = load_peft(tmp_path, model)
    path = model.backbone.slots[0].paths[1]
    name = model.backbone.slots[0].name
    product = 1.5 * weights[f"{name}.lora_B"][1] @ weights[f"{name}.lora_A"][1]
    torch.testing.assert_close(product, 4 * found.factors[path]["lora_B"] @ found.factors[path]["lora_A"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(folder, dtype):
    state = {key: value.to(dtype) for key, value in load_file(folder / TENSORS).items()}
    save_file(state, folder / TENSORS)
    factors = read_peft(folder).factors["model.decoder.layers.1.self_attn.q_proj"]
    assert factors["lora_A"].dtype == torch.float32
    assert torch.equal(factors["lora_A"].to(dtype), state[KEY.format("A")])


def test_layers_that_are_not_adapted_are_noted(tmp_path, caplog):
    expected = trained_by_peft(tmp_path / "theirs", "opt", r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    model = tiny_bora("opt", targets=["q_proj", "v_proj"], adapter=LoRA(rank=2, alpha=8))
    weights = load_peft(tmp_path / "theirs", model)
    assert caplog.messages == [f"note: {tmp_path / 'theirs'} adapts 2 of 4 layers; the others stay as they are"]
    assert all(not value[0].any() and value[1].any() for value in weights.values())
    save_peft(tmp_path / "ours", model, weights)
    with torch.no_grad():
        logits = loaded_peft(tiny_model("opt"), tmp_path / "ours")(input_ids=random_ids()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_cannot_have_these_matrices(folder):
    with pytest.raises(
        InputError, match=r"has the rank 2, which LoRA\(rank=4, alpha=4.0\) cannot have; give the model an adapter"
    ):
        load_peft(folder, tiny_bora("opt", adapter=LoRA(rank=4)))
    with pytest.raises(InputError, match="rank 2, which SharedPlusTaskLoRA"):
        load_peft(folder, tiny_bora("opt", adapter=ADAPTERS["lora_shared_plus_task"](rank=2)))
    with pytest.raises(InputError, match="is not the frozen one of FrozenALoRA"):
        load_peft(folder, tiny_bora("opt", adapter=ADAPTERS["lora_frozen_a"](rank=2)))
