"""The restated rules of PEFT give what PEFT itself does, and what it would misread is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from bora_pyro import Backbone, BoRA, InputError, LoRA, load_peft, save_peft
from bora_pyro.backbone.slots import linear_modules
from bora_pyro.exchange import save
from bora_pyro.exchange.peft_check import check_with_peft
from bora_pyro.exchange.peft_rules import adapted_modules, misread_layers, target_modules
from bora_pyro.exchange.save import check_exportable, write_peft
from tests.exchange.peft_folder import CONFIG, TENSORS
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny import hooks_left, loaded_peft, of_task, peft_warnings, random_ids, random_weights, tiny_bora, tiny_model

ELSEWHERE = ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "qwen3_next"]
FAITHFUL = ["granitemoeshared", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]


def test_all_kinds_are_named():
    assert set(ELSEWHERE) | set(FAITHFUL) | {"laguna", "mamba"} == set(MIXTURES)


def adapted_by_peft(model, targets):
    """The modules to which PEFT itself gives an adapter; it changes the model."""
    with peft_warnings():
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return {path.replace(".base_layer", "") for path, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("architecture", ELSEWHERE)
def test_layers_that_peft_gives_to_the_fused_experts(architecture):
    model = tiny_mixture(architecture)
    paths = list(linear_modules(model))
    misread = misread_layers(model, paths)
    assert {path.rsplit(".", 1)[-1] for path in misread} == {"gate_proj", "up_proj", "down_proj"}
    assert all("to the fused experts" in reason for reason in misread.values())
    targets = target_modules(model, paths)
    found = adapted_by_peft(model, targets)
    assert found & set(paths) == adapted_modules(tiny_mixture(architecture), targets) == set(paths) - set(misread)
    assert any(path.endswith(".experts") for path in found)


@pytest.mark.parametrize("architecture", [*FAITHFUL, *ELSEWHERE])
def test_what_is_left_has_the_same_logits_in_peft(architecture, tmp_path):
    base = tiny_mixture(architecture)
    paths = list(linear_modules(base))
    misread = misread_layers(base, paths)
    assert bool(misread) == (architecture in ELSEWHERE)
    targets = sorted({path.rsplit(".", 1)[-1] for path in paths if path not in misread})
    model = BoRA(Backbone(base, targets=targets), 2, adapter=LoRA(rank=2, alpha=3.0))
    weights = of_task(random_weights(model), 1)
    save_peft(tmp_path, model, weights, task=1)
    before = [*base.modules()]
    assert check_with_peft(tmp_path, model, weights, task=1).difference < 1e-6
    assert all(one is other for one, other in zip(before, base.modules(), strict=True))
    assert hooks_left(model.backbone) == 0
    read = load_peft(tmp_path, model)
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.gate_proj"], ["shared_experts.down_proj"]])
def test_the_refusal_names_layer_and_targets(targets):
    backbone = Backbone(tiny_mixture("glm4_moe"), targets=targets)
    with pytest.raises(
        InputError, match=r"cannot describe the adapter of 'model\.layers\.\d\.mlp\..*_proj'.*fused experts"
    ) as one:
        check_exportable(backbone)
    left = {"all-linear": "adapt only the targets q_proj, k_proj, v_proj, o_proj"}
    assert left.get(str(targets), "adapt only the targets q_proj" if "q_proj" in targets else "choose other") in str(one.value)


def test_a_renamed_layer():
    model = tiny_mixture("laguna")
    paths = list(linear_modules(model))
    misread = misread_layers(model, paths)
    assert set(misread) == {path for path in paths if ".shared_experts." in path}
    assert (
        "changes its name to 'model.layers.1.mlp.shared_experts..gate_proj'"
        in misread["model.layers.1.mlp.shared_experts.gate_proj"]
    )


def test_peft_really_renames_it(tmp_path):
    base = tiny_mixture("laguna")
    model = BoRA(Backbone(base, targets="shared_experts.up_proj"), 2, adapter=LoRA(rank=2))
    with pytest.raises(InputError, match="PEFT changes its name"):
        save_peft(tmp_path, model, model.starts)
    factors = {path: {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(16, 2)} for path in model.backbone.slots[0].paths}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "misread_layers", lambda model, paths: {})
        write_peft(tmp_path, model.backbone, factors, alpha=2.0)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = loaded_peft(base, tmp_path)
    layer = loaded.base_model.model.get_submodule(model.backbone.slots[0].paths[0])
    assert float(layer.lora_B["default"].weight.abs().sum()) == 0


def test_state_space_layers_that_peft_refuses():
    model = tiny_mixture("mamba")
    paths = [path for path in linear_modules(model) if path.endswith("out_proj")]
    assert set(misread_layers(model, paths)) == set(paths)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        adapted_by_peft(model, ["out_proj"])


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(2, 2)


class Outer(nn.Module):
    """``inner.query`` is the end of the path ``tower.inner.query``."""

    def __init__(self):
        super().__init__()
        self.inner, self.tower = Inner(), nn.ModuleDict({"inner": Inner()})


def test_a_path_that_is_the_end_of_another():
    assert target_modules(Outer(), ["inner.query", "tower.inner.query"]) == ["query"]
    assert target_modules(Outer(), ["tower.inner.query"]) == ["tower.inner.query"]
    targets = target_modules(Outer(), ["inner.query"])
    assert targets == r"inner\.query"
    assert adapted_modules(Outer(), targets) == {"inner.query"} == adapted_by_peft_of(Outer(), targets)
    assert misread_layers(Outer(), ["inner.query"]) == {}


def adapted_by_peft_of(module, targets):
    get_peft_model(module, LoraConfig(r=1, target_modules=targets))
    return {path for path, one in module.named_modules() if hasattr(one, "lora_A")}


def test_a_layer_at_two_places():
    model = Outer()
    model.tower["inner"].query = model.inner.query
    assert "at several places" in misread_layers(model, ["inner.query"])["inner.query"]
    assert len(adapted_by_peft_of(model, ["query"])) == 1


def test_a_folder_that_peft_reads_otherwise_is_found(tmp_path):
    model = tiny_bora("llama")
    weights = of_task(random_weights(model), 1)
    save_peft(tmp_path, model, weights, task=1)
    check_with_peft(tmp_path, model, weights, task=1)
    with pytest.raises(InputError, match="gives other logits"):
        check_with_peft(tmp_path, model, {name: 2 * value for name, value in weights.items()}, task=1)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj", "v_proj"]}))
    before = model.backbone.logits(random_ids())
    with pytest.raises(InputError, match=r"adapts other layers .* 'model\.layers\.0\.self_attn\.k_proj'"):
        check_with_peft(tmp_path, model, weights, task=1)
    assert torch.equal(model.backbone.logits(random_ids()), before)
    assert not any(hasattr(module, "lora_A") for module in model.backbone.model.modules())


def test_a_foreign_adapter_of_misread_layers_is_read_by_its_names(tmp_path, caplog):
    backbone = Backbone(tiny_mixture("glm4_moe"), targets="q_proj")
    model = BoRA(backbone, 2, adapter=LoRA(rank=2))
    save_peft(tmp_path, model, of_task(random_weights(model), 0))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": ["shared_experts.up_proj"]}))
    name = "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_{}.weight"
    matrices = {name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(16, 2)}
    assert load_file(tmp_path / TENSORS).keys().isdisjoint(matrices)
    save_file(matrices, tmp_path / TENSORS)
    shared = Backbone(tiny_mixture("glm4_moe"), targets="shared_experts.up_proj")
    with caplog.at_level(logging.WARNING):
        read = load_peft(tmp_path, shared, same_base=False)
    assert torch.equal(read[f"{shared.slots[0].name}.lora_A"][0], matrices[name.format("A")])
    assert "is read as it names its layers, not as PEFT" in caplog.text


def test_usual_bases_are_read_as_they_are():
    for architecture in ("opt", "gpt2", "gemma2"):
        model = tiny_model(architecture)
        assert misread_layers(model, list(linear_modules(model))) == {}


@pytest.mark.parametrize(("targets", "named"), [("all-linear", True), (["all-linear"], True), ("q_proj", False), (None, False)])
def test_experts_that_all_linear_cannot_take_are_named(targets, named):
    notes = Backbone(tiny_mixture("qwen3_moe"), targets=targets).notes
    note = "all-linear adapts linear layers; the routed experts stay as they are: mlp.experts.down_proj, mlp.experts.gate_up_proj"
    assert notes == [note] * named
