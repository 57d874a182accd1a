"""What a fit leaves is written in the order of its worth, and an adapter without a LoRA form does not cost the run."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open

from bora_pyro.adapters import ADAPTERS, Adapter
from bora_pyro.adapters.base import Start
from bora_pyro.errors import InputError
from bora_pyro.runs import run as module
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.saved import load_run
from tests.tiny_base import quick_fit


@dataclass(frozen=True)
class Shift(Adapter):
    """A number added to each output: no product of two matrices."""

    rank: int = 1
    alpha: float | None = None

    def start(self, slot, weight, generator):
        return Start({"shift": torch.zeros(slot.out_features)})

    def output(self, x, tensors):
        return tensors["shift"][:, None].to(x.dtype)


@pytest.fixture
def config(tmp_path):
    options = quick_fit(tmp_path) | {"targets": ["v_proj", "fc2"], "epochs": 1, "tau": 100.0}
    return MapFitConfig(output_dir=str(tmp_path / "run"), **options)


def test_an_adapter_without_a_lora_form_leaves_a_run(config, monkeypatch, capsys):
    monkeypatch.setitem(ADAPTERS, "shift", Shift)
    config.adapter = "shift"
    metrics = run_map_fit(config)
    [line] = metrics["notes"]
    assert line.startswith("no adapters were exported: Shift(rank=2, alpha=None) cannot be written as LoRA matrices")
    assert f"note: {line}\n" in capsys.readouterr().err
    assert list(RunFolder.open(config.output_dir).adapters.iterdir()) == []
    run = load_run(config.output_dir)
    assert run.metrics == metrics
    again = run.fitted.evaluate(run.data.test)["test_perplexity"]
    assert again == pytest.approx(metrics["test_perplexity"], rel=1e-6)


def test_what_an_export_loses_is_noted(config, monkeypatch):
    monkeypatch.setattr(module, "write_adapters", lambda *_: 0.25)
    metrics = run_map_fit(config, quiet=True)
    assert metrics["notes"] == ["the adapters have no exact LoRA form; they were exported with a relative error of up to 0.25"]


def test_the_posterior_is_written_first(config, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_adapters", killed)
    with pytest.raises(KeyboardInterrupt):
        run_map_fit(config, quiet=True)
    folder = RunFolder.open(config.output_dir)
    assert "theta.v_proj.lora_A_decentered" in folder.load_tensors("posterior")
    assert not (folder.path / "metrics.json").exists()


def test_a_full_disk_is_no_form_of_an_adapter(config, monkeypatch):
    def full(*_):
        raise InputError("the adapters cannot be written") from OSError("No space left on device")

    monkeypatch.setattr(module, "write_adapters", full)
    with pytest.raises(InputError, match="the adapters cannot be written"):
        run_map_fit(config, quiet=True)
    assert not (RunFolder.open(config.output_dir).path / "metrics.json").exists()


def test_a_posterior_says_of_which_model_it_is(config):
    run_map_fit(config, quiet=True)
    with safe_open(f"{config.output_dir}/posterior.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["description"])
    assert found["adapter"] == {"class": "LoRA", "rank": 2, "alpha": 2.0}
    assert found["prior"] == {"class": "HierarchicalNormal", "tau": 100.0, "form": "noncentered"}
    assert found["likelihood"] == {"class": "CausalLM", "unit": "tokens"}
    assert found["slots"] == {"v_proj": [2, 16, 16, [0, 1]], "fc2": [2, 16, 32, [0, 1]]}
