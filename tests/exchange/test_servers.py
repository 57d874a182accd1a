"""Exported folders in PEFT's own mixed batches, and by the rules of servers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from bora_pyro import LoRA, save_peft
from bora_pyro.backbone.slots import linear_modules
from tests.server_rules import LORAX_LAYERS, OLD_KEYS, lorax_problems, vllm_problems, vllm_resolves
from tests.tiny import TASKS, loaded_peft, of_task, peft_warnings, random_ids, random_weights, tiny_bora, tiny_model

# OPT flattens rows and tokens before its feed-forward layers, which PEFT's mixed batches do not survive
MIXED = {"opt": None, "gpt2": "all-linear", "llama": "all-linear", "qwen3": "all-linear"}


def exported(folder, architecture, targets, **options):
    model = tiny_bora(architecture, targets=targets, **options)
    weights = random_weights(model)
    for d in range(TASKS):
        save_peft(folder / f"task-{d}", model, of_task(weights, d), base_model="tiny")
    return model, weights


def all_loaded(folder, architecture):
    peft = loaded_peft(tiny_model(architecture), folder / "task-0")
    with peft_warnings():
        for d in range(1, TASKS):
            peft.load_adapter(folder / f"task-{d}", adapter_name=f"task-{d}")
    return peft.eval(), ["default", *(f"task-{d}" for d in range(1, TASKS))]


@pytest.mark.parametrize(("architecture", "targets"), MIXED.items())
def test_mixed_batches_row_by_row(architecture, targets, tmp_path):
    model, weights = exported(tmp_path, architecture, targets)
    peft, names = all_loaded(tmp_path, architecture)
    rows = [2, 0, 1, 0, 2]
    input_ids = random_ids(len(rows))
    with torch.no_grad():
        theirs = peft(input_ids=input_ids, adapter_names=[names[d] for d in rows]).logits
    ours = model.backbone.logits(input_ids, model.change(weights, torch.tensor(rows)))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (ours[1] - model.backbone.logits(input_ids[1:2])[0]).abs().mean() > 0.05


@pytest.mark.parametrize(("architecture", "targets"), MIXED.items())
def test_mixed_batches_that_write(architecture, targets, tmp_path):
    model, weights = exported(tmp_path, architecture, targets)
    peft, names = all_loaded(tmp_path, architecture)
    rows = torch.tensor([1, 0, 2, 1])
    tokens = random_ids(len(rows), 4)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=1, bos_token_id=0)
    theirs = peft.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        adapter_names=[names[d] for d in rows.tolist()],
        generation_config=settings,
    )
    ended = torch.zeros(len(rows), 1, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(6):
            last = model.backbone.logits(tokens, model.change(weights, rows))[:, -1]
            next_one = torch.where(ended, 1, last.argmax(-1, keepdim=True))
            ended |= next_one == 2
            tokens = torch.cat([tokens, next_one], 1)
    assert torch.equal(theirs, tokens)


def paths_of(architecture):
    return set(linear_modules(tiny_model(architecture)))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_vllm_takes_the_folders(architecture, targets, tmp_path):
    exported(tmp_path, architecture, targets)
    for d in range(TASKS):
        assert vllm_problems(tmp_path / f"task-{d}", linear=paths_of(architecture)) == []
        assert vllm_resolves(tmp_path, f"task-{d}", base_model="tiny") == str((tmp_path / f"task-{d}").resolve())
    assert vllm_resolves(tmp_path, "task-0", base_model="another") is None
    assert vllm_resolves(tmp_path, "../task-0", base_model="tiny") is None


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("architecture", LORAX_LAYERS)
def test_lorax_takes_the_folders(architecture, targets, tmp_path):
    exported(tmp_path, architecture, targets)
    for d in range(TASKS):
        assert lorax_problems(tmp_path / f"task-{d}", architecture, layers=2) == []


def test_the_keys_are_those_of_an_old_peft(tmp_path):
    exported(tmp_path, "opt", None)
    assert set(json.loads((tmp_path / "task-0" / "adapter_config.json").read_text())) <= OLD_KEYS


def test_the_rules_refuse_what_they_should(tmp_path):
    exported(tmp_path, "llama", None, adapter=LoRA(rank=17))
    folder, linear = tmp_path / "task-0", paths_of("llama")
    assert vllm_problems(folder, linear=linear) == ["rank 17"]
    assert vllm_problems(folder, linear=linear, max_lora_rank=32) == []
    assert vllm_problems(folder, linear=paths_of("gpt2"), max_lora_rank=32)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "bias": "all", "modules_to_save": ["x"]}))
    assert vllm_problems(folder, linear=linear, max_lora_rank=32) == ["modules_to_save", "DoRA", "bias"]
    assert lorax_problems(folder, "llama", layers=2) == ["key use_dora"]
    state = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in state if "layers.1.self_attn.q_proj.lora_A" in name)
    value = state.pop(gone)
    save_file(state | {gone.replace("lora_A", "lora_magnitude"): value}, folder / "adapter_model.safetensors")
    assert any("unsupported LoRA weight" in problem for problem in vllm_problems(folder, linear=linear))
    assert any("of some layers only" in problem for problem in lorax_problems(folder, "llama", layers=2))
