"""A fit from the command line to the run folder, and from the folder back to the same numbers."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from bora_pyro import Backbone, load_tasks
from bora_pyro.inference.checkpoint import Checkpoints
from bora_pyro.inference.memory import peak_memory_bytes
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from tests.tiny_base import SCRIPTS, command_main, finished_run, line, quick_fit, without_times

SLUGS = {"Ada": "ada", "Børge B.": "borge-b", "Cleo": "cleo"}
CONTRACT = {
    "test_perplexity", "base_test_perplexity", "validation_perplexity", "test_bits_per_character", "tau", "epochs",
    "fit_seconds", "training_tokens_per_second", "peak_memory_bytes", "predicted_memory_bytes", "tasks",
}  # fmt: skip
CONTRACT_OF_TASK = {
    "name", "train_documents", "test_documents", "base_test_perplexity", "test_perplexity", "deviation_norm",
}  # fmt: skip
SHAPES = {"v_proj": ((2, 16), (16, 2)), "fc2": ((2, 32), (16, 2))}  # of A and B at rank 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit."""
    return quick_fit(tmp_path_factory.mktemp("inputs")) | {"learning_rate": 0.03}


@pytest.fixture(scope="module")
def main():
    return command_main()


def data_of(options):
    tokenizer = Backbone.from_pretrained(options["base_model"]).tokenizer
    return load_tasks(options["data"], tokenizer, max_tokens=options["max_tokens"])


def perplexity(model, split, task=None):
    """Perplexity by plain transformers, one document at a time."""
    total, tokens = 0.0, 0
    for n in range(len(split)):
        if task is None or split.task[n] == task:
            ids = split.document(n)[None]
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss.double()) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def loaded_peft(base, folder):
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has renamed: theirs to settle
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def check_metrics(folder, tau):
    """The log and the metrics are whole and go together; returns the metrics."""
    log = folder.read_log()
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert (folder.path / "metrics.jsonl").read_text().count("\n") == 2

    metrics = json.loads((folder.path / "metrics.json").read_text())
    assert set(metrics) >= CONTRACT
    assert metrics["tau"] == ("inf" if tau == "inf" else tau)
    assert metrics["epochs"] == 2
    assert metrics["validation_perplexity"] == min(entry["validation_perplexity"] for entry in log)
    assert metrics["validation_perplexity"] == log[metrics["best_epoch"] - 1]["validation_perplexity"]
    assert metrics["fit_seconds"] == round(log[-1]["seconds"], 2) > 0
    assert metrics["training_tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 2**27
    assert metrics["predicted_memory_bytes"] > 2**27
    assert {slug: task["name"] for slug, task in metrics["tasks"].items()} == {slug: name for name, slug in SLUGS.items()}
    for task in metrics["tasks"].values():
        assert set(task) >= CONTRACT_OF_TASK
        assert (task["train_documents"], task["test_documents"]) == (6, 2)
        assert (task["deviation_norm"] == 0) == (tau == "inf")
    return metrics


def check_posterior(folder, sites, *, frozen):
    """One tensor a site, with the dimensions of tasks and layers in front; returns the tensors."""
    tensors = folder.load_tensors("posterior")
    expected = {}
    for slot, shapes in SHAPES.items():
        for letter, shape in zip("AB", shapes, strict=True):
            name = f"{slot}.lora_{letter}"
            if frozen and letter == "A":
                expected[f"fixed_sample.{name}"] = (64,)  # to recognise it by, as it is built again
                continue
            for site in sites:
                head, _, tail = site.partition("_decentered") if site.startswith("theta") else (site, "", "")
                expected[f"{head}.{name}{'_decentered' if site.endswith('_decentered') else tail}"] = (
                    (2, *shape) if site == "prior_mean" else (3, 2, *shape)
                )
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert json.loads(folder.load_metadata("posterior")["tasks"]) == list(SLUGS)
    return tensors


def check_adapters(folder, inputs, metrics):
    """The adapters in plain transformers and PEFT: the same perplexities."""
    data = data_of(inputs)
    assert folder.read_split() == data.split_record
    base = Backbone.from_pretrained(inputs["base_model"]).model
    assert sorted(entry.name for entry in folder.adapters.iterdir()) == sorted([*SLUGS.values(), "global-mean", "tasks.json"])
    assert json.loads((folder.adapters / "tasks.json").read_text()) == {slug: name for name, slug in SLUGS.items()}
    assert metrics["base_test_perplexity"] == pytest.approx(perplexity(base, data.test), rel=1e-5)
    logarithm = 0.0
    for d, slug in enumerate(SLUGS.values()):
        scores = metrics["tasks"][slug]
        assert scores["base_test_perplexity"] == pytest.approx(perplexity(base, data.test, d), rel=1e-5)
        adapted = loaded_peft(base, folder.adapters / slug)
        assert scores["test_perplexity"] == pytest.approx(perplexity(adapted, data.test, d), rel=1e-5)
        assert scores["test_perplexity"] != scores["base_test_perplexity"]
        tokens = int((data.test.lengths[data.test.task == d] - 1).sum())
        logarithm += math.log(scores["test_perplexity"]) * tokens / data.test.num_tokens
    assert metrics["test_perplexity"] == pytest.approx(math.exp(logarithm), rel=1e-6)
    characters = sum(data.test.characters.tolist())
    bits = math.log2(metrics["test_perplexity"]) * data.test.num_tokens / characters
    assert metrics["test_bits_per_character"] == pytest.approx(bits, rel=1e-6)


def check_deviations(folder, inputs, metrics):
    """Θ, and what of a task is its own; returns the matrices of Θ."""
    mean = load_file(folder.adapters / "global-mean" / "adapter_model.safetensors")
    loaded_peft(Backbone.from_pretrained(inputs["base_model"]).model, folder.adapters / "global-mean")
    for slug in SLUGS.values():
        of_task = load_file(folder.adapters / slug / "adapter_model.safetensors")
        norm = math.sqrt(sum(float((of_task[name] - mean[name]).square().sum()) for name in mean))
        assert metrics["tasks"][slug]["deviation_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-7)
    return mean


@pytest.mark.parametrize(
    ("more", "sites"),
    [
        ({"tau": 0}, ["theta"]),
        ({"tau": "inf"}, ["prior_mean"]),
        ({"tau": 1000}, ["prior_mean", "theta_decentered"]),
        ({"tau": 1000, "likelihood_unit": "documents", "accumulate": 2}, ["prior_mean", "theta_decentered"]),
        ({"tau": 5, "prior_form": "centered"}, ["prior_mean", "theta"]),
        (
            {"tau": 5, "prior_form": "centered", "scale_learning_rate_with_tau": "true", "learning_rate": 0.005},
            ["prior_mean", "theta"],
        ),
        (
            {"tau": 5, "adapter": "lora_frozen_a", "gradient_checkpointing": "true", "alpha": 3},
            ["prior_mean", "theta_decentered"],
        ),
        ({"tau": 0, "adapter": "lora_frozen_a"}, ["theta"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_run_folder_from_end_to_end(main, inputs, tmp_path, more, sites):
    folder = finished_run(main, inputs, tmp_path / "run", **more)
    assert sorted(entry.name for entry in folder.path.iterdir()) == [
        "adapters", "checkpoints", "config.yaml", "metrics.json", "metrics.jsonl", "posterior.safetensors", "split.json",
    ]  # fmt: skip
    assert len(Checkpoints(folder.checkpoints).files()) == len([*folder.checkpoints.iterdir()]) == 2

    config = folder.read_config()
    assert MapFitConfig(**config).output_dir == str(folder.path)
    assert set(config) == set(vars(MapFitConfig()))
    assert (config["tau"], config["targets"]) == (float(more["tau"]), ["v_proj", "fc2"])

    metrics = check_metrics(folder, more["tau"])
    tensors = check_posterior(folder, sites, frozen=more.get("adapter") == "lora_frozen_a")
    check_adapters(folder, inputs, metrics)
    mean = check_deviations(folder, inputs, metrics)
    if "prior_mean" in sites:
        name = "base_model.model.model.decoder.layers.1.fc2.lora_B.weight"
        torch.testing.assert_close(mean[name], tensors["prior_mean.fc2.lora_B"][1], rtol=0, atol=0)


def test_config_file_and_line_the_line_wins(main, inputs, tmp_path):
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump({**inputs, "tau": 7.0, "epochs": 3, "output_dir": str(tmp_path / "run")}))
    assert main(["--config", str(file), "--epochs", "1"]) == 0
    folder = RunFolder.open(tmp_path / "run")
    config = folder.read_config()
    assert (config["tau"], config["epochs"], config["rank"]) == (7.0, 1, 2)
    assert len(folder.read_log()) == folder.read_metrics()["epochs"] == 1


@pytest.mark.parametrize("tau", [50, "inf"])
def test_the_configuration_of_a_run_gives_the_run_again(main, inputs, tmp_path, tau):
    first = finished_run(main, inputs, tmp_path / "first", tau=tau, seed=7, overwrite="true")
    second = tmp_path / "second"
    assert main(["--config", str(first.path / "config.yaml"), "--output_dir", str(second)]) == 0
    second = RunFolder.open(second)
    assert without_times(first.read_metrics()) == without_times(second.read_metrics())
    assert second.read_config() == first.read_config() | {"output_dir": str(second.path)}
    for name, value in first.load_tensors("posterior").items():
        torch.testing.assert_close(value, second.load_tensors("posterior")[name], rtol=0, atol=0)
    # it says nothing of overwriting: without a new folder the run is safe
    assert main(["--config", str(first.path / "config.yaml")]) == 2
    other = finished_run(main, inputs, tmp_path / "other", tau=tau, seed=8)
    assert other.read_metrics()["test_perplexity"] != first.read_metrics()["test_perplexity"]
    assert other.read_split() != first.read_split()


def test_overwrite_replaces_the_whole_run(main, inputs, tmp_path, capsys):
    first = finished_run(main, inputs, tmp_path / "run", epochs=2)
    before = {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()}
    assert main(line({**inputs, "output_dir": first.path})) == 2
    assert "--overwrite true to replace it" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in first.path.rglob("*") if file.is_file()} == before
    (first.adapters / "an-older-task").mkdir()
    again = finished_run(main, inputs, tmp_path / "run", epochs=1, overwrite="true")
    assert len(again.read_log()) == again.read_metrics()["epochs"] == 1
    assert not (again.adapters / "an-older-task").exists()


# What a person sees


def test_the_script_in_a_process_of_its_own(inputs, tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, SCRIPTS / "map_fit.py", *line({**inputs, "output_dir": folder})],
        capture_output=True, text=True, cwd=tmp_path, encoding="utf-8", timeout=600,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data, adapters, memory, *progress, note, measuring = done.stderr.splitlines()
    assert data.startswith("data: 30 rows read; ")
    assert adapters == "adapters: on 4 layers: v_proj x 2, fc2 x 2"
    assert memory.startswith("memory: about ")
    assert [text.split("  ")[:2] for text in progress] == [
        [f"step {step}/{2 * step if epoch == 1 else step}", f"epoch {epoch}/2"]
        for epoch, step in enumerate((entry["step"] for entry in RunFolder.open(folder).read_log()), start=1)
    ]
    assert all(re.search(r"  \d[\d,]* tokens/s  validation perplexity [\d.]+  (τ [\d.]+  )?\d+:\d\d", text) for text in progress)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"run folder: {folder}"
    metrics = RunFolder.open(folder).read_metrics()
    assert note == f"note: {metrics['notes'][-1]}"
    assert "still falling" in note
    assert measuring == f"measuring {sum(task['test_documents'] for task in metrics['tasks'].values())} test documents"
    assert set(metrics["gradient_norm"]) == {"start", "end", "ratio", "prior_mean_ratio", "deviations_ratio", "documents"}
    assert lines[-2] == f"learned τ: {metrics['tau']:g} (harmonic mean; by group in metrics.json)"
    assert f"{metrics['test_perplexity']:,.2f}" in lines[-3]
    assert [text.split()[0] for text in lines[3:6]] == ["Ada", "Børge", "Cleo"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_quiet_says_nothing(inputs, tmp_path, capsys):
    options = {**inputs, "targets": ["v_proj"], "epochs": 1, "max_tokens": 64}
    metrics = run_map_fit(MapFitConfig(output_dir=str(tmp_path / "run"), **options), quiet=True)
    assert capsys.readouterr() == ("", "")
    assert metrics["notes"] == ["max_tokens 64 is more than the base model reads; 32 is used"]
    assert metrics == RunFolder.open(tmp_path / "run").read_metrics()


def test_a_saved_adapter_names_its_base(main, inputs, tmp_path):
    folder = finished_run(main, inputs, tmp_path / "run", epochs=1, alpha=6, tau="inf")
    config = json.loads((folder.adapters / "cleo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == inputs["base_model"]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["fc2", "v_proj"])
    with safe_open(folder.path / "posterior.safetensors", framework="pt") as file:
        assert "Pooled()" in file.metadata()["model"]
    assert all(path.is_dir() for path in folder.adapters.iterdir() if path.name != "tasks.json")


def test_peak_memory_of_this_process():
    before = peak_memory_bytes(torch.device("cpu"))
    assert 2**26 < before < 2**37
    block = torch.ones(2**25)  # 128 MiB
    assert peak_memory_bytes(torch.device("cpu")) >= before
    del block
