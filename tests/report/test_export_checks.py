"""What cannot be exported is refused before the fit; what is exported is checked for PEFT and vLLM."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bora_pyro import InputError
from bora_pyro.backbone.slots import linear_modules
from bora_pyro.exchange import check as checks
from bora_pyro.exchange.factors import LoraForm
from bora_pyro.exchange.load import read_peft
from bora_pyro.exchange.vllm import RANKS, check_for_vllm, serve_command
from bora_pyro.runs.saved import load_run
from tests.mixtures import tiny_mixture
from tests.server_rules import vllm_problems, vllm_resolves
from tests.tiny import random_ids
from tests.tiny_base import command_main, line, map_run, quick_fit


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Options of a fit of all linear layers of a tiny mixture of experts, whose shared expert PEFT would misread."""
    folder = tmp_path_factory.mktemp("mixture")
    options = quick_fit(folder)
    tokenizer = AutoTokenizer.from_pretrained(options["base_model"])
    tiny_mixture("glm4_moe", vocab_size=len(tokenizer)).save_pretrained(options["base_model"])
    return options | {"targets": "all-linear", "epochs": 1}


def test_a_fit_that_cannot_be_exported_does_not_begin(mixture, tmp_path, capsys):
    run = tmp_path / "run"
    assert command_main()(line({**mixture, "output_dir": run})) == 2
    [error] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "cannot describe the adapter of 'model.layers.0.mlp.gate_proj' and 5 more layers" in error
    assert "adapt only the targets q_proj, k_proj, v_proj, o_proj, or give --export_adapters false" in error
    assert not run.exists()


def test_such_a_fit_is_exported_merged(mixture, tmp_path, capsys):
    run = tmp_path / "run"
    assert command_main()(line({**mixture, "export_adapters": "false", "output_dir": run})) == 0
    assert "the routed experts stay as they are: mlp.experts.down_proj, mlp.experts.gate_up_proj" in capsys.readouterr().err
    assert not [*(run / "adapters").iterdir()]
    export = command_main("export-adapters")
    assert export([str(run), "--output_dir", str(tmp_path / "out")]) == 2
    assert "or export a merged base of a task (--merged)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export([str(run), "--output_dir", str(tmp_path / "out"), "--merged", "ada"]) == 0
    fitted, ids = load_run(run).fitted, random_ids(1)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = fitted.model.backbone.logits(ids, fitted.model.change(fitted.weights()[0], torch.tensor([fitted.tasks.index("Ada")])))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_the_targets_that_are_left_are_fitted_and_checked(mixture, tmp_path, capsys):
    run = map_run({**mixture, "targets": "q_proj,k_proj,v_proj,o_proj", "output_dir": tmp_path / "run"})
    assert command_main("export-adapters")([str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert re.search(r"checked with PEFT [\d.]+: logits agree", capsys.readouterr().out)


def test_adapters_of_such_layers_are_not_pooled(mixture, tmp_path, capsys):
    name = "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_{}.weight"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["shared_experts.up_proj"], "bias": "none"}
    for task in ("ada", "cleo"):
        (tmp_path / "given" / task).mkdir(parents=True)
        (tmp_path / "given" / task / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
        matrices = {name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(16, 2)}
        save_file(matrices, tmp_path / "given" / task / "adapter_model.safetensors")
    words = [str(tmp_path / "given"), "--base_model", mixture["base_model"], "--shrinkage", "0.5"]
    assert command_main("pool-adapters")([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "cannot describe the adapter of 'model.layers.1.mlp.shared_experts.up_proj'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return map_run({**quick_fit(folder), "alpha": 3.0, "epochs": 1, "output_dir": folder / "run"})


@pytest.mark.parametrize("check", ["peft", "rules"])
def test_without_peft_the_rules_are_checked(check, run, tmp_path, capsys, monkeypatch):
    if check == "peft":
        monkeypatch.setattr(checks, "can_check", lambda model: False)
    else:
        monkeypatch.setattr(checks, "check_with_peft", None)
    assert command_main("export-adapters")([str(run), "--output_dir", str(tmp_path / "out"), "--check", check]) == 0
    assert "checked by the rules by which PEFT finds the layers" in capsys.readouterr().out


def test_folders_for_vllm(run, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "out"), "--check", "vllm", "--base_name", "org/base"]
    assert command_main("export-adapters")([str(run), *words]) == 0
    out = capsys.readouterr().out
    [command] = re.findall("serve them with: (.*)", out)
    assert command == serve_command(tmp_path / "out", "org/base", 8)
    assert "checked with PEFT" in out
    linear = set(linear_modules(load_run(run).fitted.model.backbone.model))
    for name in ("ada", "borge-b", "cleo", "global-mean"):
        folder, own = tmp_path / "out" / name, run / "adapters" / name
        assert vllm_problems(folder, linear=linear, max_lora_rank=8) == []
        assert vllm_resolves(tmp_path / "out", name, base_model="org/base") == str(folder.resolve())
        padded, exact = read_peft(folder), read_peft(own)
        assert (padded.rank, padded.alpha, exact.rank, exact.alpha) == (8, 8, 2, 3)
        for path, factors in exact.factors.items():
            delta = exact.scaling * factors["lora_B"] @ factors["lora_A"]
            torch.testing.assert_close(padded.factors[path]["lora_B"] @ padded.factors[path]["lora_A"], delta)


def test_the_command_is_one_of_a_shell():
    words = shlex.split(serve_command("my exports/it's", "org/base", 64))
    assert words[2].endswith("/my exports/it's")
    assert words[-6:] == ["vllm", "serve", "org/base", "--enable-lora", "--max-lora-rank", "64"]


@pytest.mark.parametrize(("rank", "least"), [(1, 8), (8, 8), (9, 16), (17, 32), (65, 128), (257, 320), (321, 512), (512, 512)])
def test_the_next_rank(rank, least):
    form = LoraForm({"fc": {"lora_A": torch.randn(rank, 3), "lora_B": torch.randn(4, rank)}}, alpha=2.0 * rank)
    padded = form.with_rank(RANKS)
    assert (padded.rank, padded.alpha) == (least, least)
    torch.testing.assert_close(
        padded.factors["fc"]["lora_B"] @ padded.factors["fc"]["lora_A"],
        2 * form.factors["fc"]["lora_B"] @ form.factors["fc"]["lora_A"],
        atol=1e-4,
        rtol=1e-4,
    )


def test_too_large_a_rank():
    form = LoraForm({"fc": {"lora_A": torch.zeros(513, 3), "lora_B": torch.zeros(4, 513)}}, alpha=1.0)
    with pytest.raises(InputError, match="the rank 513 is too large; the largest allowed rank is 512"):
        form.with_rank(RANKS)


def test_a_base_without_a_name_elsewhere(run, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path / "out"), "--check", "vllm", "--base_name", "builtin:nano"]
    assert command_main("export-adapters")([str(run), *words]) == 2
    assert "vLLM has no base 'builtin:nano'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lora_alpha": 3}, "its alpha is 3, and its rank 8"),
        ({"r": 12}, "its rank is 12, not one of 8, 16"),
        ({"modules_to_save": ["lm_head"]}, "it has modules_to_save"),
        ({"use_dora": True}, "it has use_dora"),
        ({"bias": "all"}, "it has a bias"),
        ({"base_model_name_or_path": "other"}, "no LoRA adapter of 'org/base'"),
    ],
)
def test_what_vllm_refuses(change, problem, run, tmp_path):
    words = ["--output_dir", str(tmp_path / "out"), "--check", "vllm", "--base_name", "org/base", "--tasks", "ada"]
    assert command_main("export-adapters")([str(run), *words]) == 0
    file = tmp_path / "out" / "ada" / "adapter_config.json"
    assert check_for_vllm(file.parent, "org/base") == 8
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=re.escape(problem)):
        check_for_vllm(file.parent, "org/base")
