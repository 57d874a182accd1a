from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro import BoRA, InputError, LoRA, save_peft
from bora_pyro.adapters import ADAPTERS
from bora_pyro.exchange import save as peft_format
from tests.tiny import (
    ARCHITECTURES,
    TASKS,
    VOCABULARY,
    loaded_peft,
    of_task,
    random_ids,
    random_weights,
    tiny_adapter,
    tiny_backbone,
    tiny_bora,
    tiny_model,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KEYS = {
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "target_modules", "task_type",
}  # fmt: skip


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "smora"])  # whose change depends on the token
def test_a_saved_adapter_gives_the_same_logits_in_peft(adapter, architecture, targets, tmp_path):
    model = tiny_bora(architecture, targets=targets, adapter=tiny_adapter(adapter, alpha=3.0))
    weights, input_ids = random_weights(model), random_ids()
    # a change without an exact form is written whole: no layer is wider on both sides
    error = save_peft(tmp_path, model, of_task(weights, 1), rank=VOCABULARY)
    assert error < 1e-5
    peft = loaded_peft(tiny_model(architecture), tmp_path)
    expected = model.backbone.logits(input_ids, model.change(weights, torch.tensor([1, 1, 1])))
    close = {"atol": 1e-4, "rtol": 1e-4} if error else CLOSE  # an SVD in float32 lies between
    torch.testing.assert_close(peft(input_ids=input_ids).logits, expected, **close)
    assert (expected - model.backbone.logits(input_ids)).abs().mean() > 0.01


def test_theta_of_each_task_and_prior_mean(tmp_path):
    model = tiny_bora("llama")
    mean = of_task(random_weights(model, seed=1), 0)
    z = random_weights(model)
    sites = {f"theta.{name}_decentered": value for name, value in z.items()} | {
        f"prior_mean.{name}": value for name, value in mean.items()
    }
    theta, given_mean = model.weights_given(sites)
    folders = {**{d: of_task(theta, d) for d in range(TASKS)}, "prior_mean": given_mean}
    input_ids, logits = random_ids(1), {}
    for name, weights in folders.items():
        save_peft(tmp_path / "adapters" / str(name), model, weights)
        logits[name] = loaded_peft(tiny_model("llama"), tmp_path / "adapters" / str(name))(input_ids=input_ids).logits
    for d in range(TASKS):
        expected = model.backbone.logits(input_ids, model.change(theta, torch.tensor([d])))
        torch.testing.assert_close(logits[d], expected, **CLOSE)
    only_mean = {name: value[None] for name, value in mean.items()}
    expected = model.backbone.logits(input_ids, model.change(only_mean, torch.tensor([0])))
    torch.testing.assert_close(logits["prior_mean"], expected, **CLOSE)


def test_a_folder_holds_two_files_with_the_keys_of_peft(tmp_path):
    model = tiny_bora("opt")
    save_peft(tmp_path, model, of_task(random_weights(model), 0))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = config_of(tmp_path)
    assert set(config) == KEYS
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2, 3, False)
    assert isinstance(config["lora_alpha"], int)
    state = load_file(tmp_path / "adapter_model.safetensors")
    attention = "base_model.model.model.decoder.layers.{}.self_attn.{}_proj.lora_{}.weight"
    assert set(state) == {attention.format(layer, name, factor) for layer in range(2) for name in "qv" for factor in "AB"}
    assert all(value.dtype == torch.float32 for value in state.values())
    shapes = {key.split(".lora_")[1][0]: tuple(value.shape) for key, value in state.items()}
    assert shapes == {"A": (2, 32), "B": (32, 2)}


def test_conv1d_is_fan_in_fan_out(tmp_path):
    model = tiny_bora("gpt2")
    save_peft(tmp_path, model, of_task(random_weights(model), 0))
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 2)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["c_proj"], ["c_proj"]),
        (["mlp.c_proj"], ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
        (["c_attn", "mlp.c_proj"], [f"transformer.h.{n}.{name}" for n in range(2) for name in ("attn.c_attn", "mlp.c_proj")]),
    ],
)
def test_ambiguous_last_names_are_written_as_whole_paths(targets, expected, tmp_path):
    model = tiny_bora("gpt2", targets=targets)
    weights, input_ids = random_weights(model), random_ids()
    save_peft(tmp_path, model, of_task(weights, 2))
    assert config_of(tmp_path)["target_modules"] == expected
    peft = loaded_peft(tiny_model("gpt2"), tmp_path)
    adapted = {path for path, module in peft.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {path for slot in model.backbone.slots for path in slot.paths}
    expected_logits = model.backbone.logits(input_ids, model.change(weights, torch.tensor([2, 2, 2])))
    torch.testing.assert_close(peft(input_ids=input_ids).logits, expected_logits, **CLOSE)


def test_a_broken_alpha_stays_broken(tmp_path):
    model = tiny_bora(adapter=LoRA(rank=2, alpha=2.5))
    save_peft(tmp_path, model, of_task(random_weights(model), 0))
    assert config_of(tmp_path)["lora_alpha"] == 2.5


def test_a_folder_can_be_written_again(tmp_path):
    model = tiny_bora()
    for seed in (0, 1):
        weights = of_task(random_weights(model, seed=seed), 0)
        save_peft(tmp_path, model, weights)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(state[name], weights["q_proj.lora_A"][1])


def test_the_folder_names_its_base(tmp_path):
    tiny_model("opt").save_pretrained(tmp_path / "base")
    tiny = tiny_backbone("opt")
    from transformers import AutoModelForCausalLM

    tiny.model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = BoRA(tiny, 2, adapter=LoRA(rank=2))
    save_peft(tmp_path / "adapter", model, model.starts)
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_mixture_of_conv1d_and_linear_is_refused(tmp_path):
    model = tiny_bora("gpt2", targets=["c_attn"])
    [slot] = model.backbone.slots
    linear = slot.__class__("other", slot.paths, slot.in_features, slot.out_features, fan_in_fan_out=False)
    model.backbone.slots.append(linear)
    weights = of_task(random_weights(model), 0)
    weights |= {name.replace("c_attn", "other"): value for name, value in weights.items()}
    with pytest.raises(InputError, match="cannot mix Conv1D and Linear"):
        save_peft(tmp_path / "adapter", model, weights)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    model = tiny_bora()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(peft_format, "write_safetensors", full)
    with pytest.raises(InputError, match=r"ada cannot be written \(No space left on device\)"):
        save_peft(tmp_path / "ada", model, model.starts)
