"""The benchmark of a step: what it reports hangs together; how fast anything is stays a question for the script."""

import json

import pytest
import torch

from bora_pyro import BoRA, LoRA
from tests.tiny_base import script

benchmark_step = script("benchmark_step")

TINY = "--base_model random:tiny --num_tasks 3 --rows 4 --tokens 6 --rank 2 --repetitions 2 --warmup 1 --device cpu".split()


def config(**options):
    sizes = {"base_model": "random:tiny", "num_tasks": 3, "rows": 4, "tokens": 6, "rank": 2, "device": "cpu"}
    return benchmark_step.BenchmarkConfig(**(sizes | options))


@pytest.mark.parametrize(("precision", "tau", "adapters"), [("float32", "100", 3 + 1), ("bfloat16", "inf", 1)])
def test_the_report_hangs_together(precision, tau, adapters, tmp_path, capsys):
    file = tmp_path / "new" / "step.json"
    options = ["--precision", precision, "--tau", tau, "--targets", "q_proj", "fc1", "--output", str(file)]
    assert benchmark_step.main([*TINY, *options]) == 0
    report = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(report["machine"]) == {"device", "cpu", "cores", "threads", "python", "versions"}
    assert set(report["machine"]["versions"]) == {"torch", "peft", "transformers", "pyro"}
    assert report["batch"] == {"rows": 4, "tokens": 6, "tasks": 3}
    assert report["base"]["adapted_layers"] == {"q_proj": 2, "fc1": 2}
    assert report["precision"] == {"base": precision, "ours_adapter": "float32", "peft_adapter": precision}
    one = 2 * 2 * ((32 + 32) + (32 + 64))  # layers x rank x (in + out), q_proj and fc1
    assert report["trained_parameters"] == {"ours": adapters * one, "peft": one}

    seconds, summary = report["seconds"], report["summary"]
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 2, "peft": 2, "base_forward": 2}
    assert report["ratio"] == [our / their for our, their in zip(seconds["ours"], seconds["peft"], strict=True)]
    assert summary["ratio"]["median"] == pytest.approx(sum(report["ratio"]) / 2)
    for name, values in seconds.items():
        assert summary[name]["min"] == min(values) > 0
        assert summary[name]["max"] == max(values)
    out = capsys.readouterr().out
    assert "4 rows of 3 tasks x 6 tokens" in out
    assert f"{summary['ratio']['median']:.3f}" in out


def test_both_steps_start_from_the_same_loss(monkeypatch):
    # at their start both adapters add nothing: both losses are the base's, a token
    options = config()
    backbone = benchmark_step.base_of(options)
    split = benchmark_step.random_documents(options, 64)
    [batch] = split.batches(token_budget=24)
    losses = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss))[1])
    # what the prior adds to ours: -log Normal(0 | 0, 1) of every whitened deviation
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi)).item()
    model = BoRA(backbone, 3, adapter=LoRA(rank=2))
    deviations = 3 * sum(start.numel() for start in model.starts.values())
    benchmark_step.bora_step(options, backbone, split, batch, "map")[0]()
    benchmark_step.peft_step(options, backbone, batch)[0]()
    ours, theirs = losses
    assert ours - constant * deviations / split.num_tokens == pytest.approx(theirs, rel=1e-5)


def test_steps_train_and_leave_the_base_alone():
    options = config()
    backbone = benchmark_step.base_of(options)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    split = benchmark_step.random_documents(options, 64)
    [batch] = split.batches(token_budget=24)
    ours, _ = benchmark_step.bora_step(options, backbone, split, batch, "map")
    losses = [ours() for _ in range(10)]
    assert losses[-1] < losses[0]
    theirs, _ = benchmark_step.peft_step(options, backbone, batch)
    theirs()
    assert all(torch.equal(before[name], value) for name, value in backbone.model.state_dict().items())


def test_profile_names_the_operators_of_both(capsys):
    assert benchmark_step.main([*TINY, "--profile"]) == 0
    ours, theirs = capsys.readouterr().out.split("PEFT, 3 steps")
    assert "BoRA, 3 steps" in ours
    assert "aten::mm" in ours
    assert "aten::mm" in theirs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base_model", "random:tinny"], "did you mean 'random:tiny'?"),
        (["--base_model", "random:tiny", "--tokens", "4096"], "reads at most 1024"),
        (["--base_model", "random:tiny", "--targets", "q_prj"], "did you mean 'q_proj'?"),
        (["--base_model", "random:tiny", "--device", "abacus"], "'abacus' is not available"),
        (["--num_tasks", "1"], "num_tasks is 1; give a whole number from 2 up"),
        (["--warmup", "0"], "warmup is 0"),
        (["--tau", "-1"], "tau -1.0 is not allowed"),
        (["--precision", "float16"], "precision is 'float16'"),
        (["--repetition", "3"], "did you mean 'repetitions'?"),
        (["--output", "."], "is a folder"),
        (["--output", "file/step.json"], "cannot be written"),
    ],
)
def test_bad_options_end_with_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert benchmark_step.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_posterior_step_against_the_map_step():
    report = benchmark_step.measure(config(num_tasks=3, rows=3, repetitions=2, warmup=1, guide="normal", against="map"))
    trained = report["trained_parameters"]
    assert trained["ours"] == 2 * trained["map"]  # a mean and a scale for each entry
    assert set(report["seconds"]) == {"ours", "map", "base_forward"}
    assert "BoRA, 3 tasks, normal" in benchmark_step.table(report)
