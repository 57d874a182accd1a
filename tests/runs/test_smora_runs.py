"""SMoRA through the commands: fitted, resumed, read back, adapted, served; what needs one ΔW is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, load_peft
from bora_pyro.adapters import SMoRA
from bora_pyro.diagnostics.rank_usage import rank_usage, usage_information
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.signals import StopSignals
from tests.tiny_base import WORDS, command_main, documents, line, quick_fit, without_times, write_table


def words(options):
    """A command line on which the options of the adapter are repeated."""
    options = dict(options)
    given = [word for value in options.pop("adapter_option", ()) for word in ("--adapter_option", value)]
    return [*line(options), *given]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A quick fit whose bias moves fast, with a vector of gates for each task."""
    own = {"adapter": "smora", "rank": 4, "learning_rate": 0.03, "token_budget": 128}
    given = ("active=2", "balance=0.01", "task_gates=true")
    return quick_fit(tmp_path_factory.mktemp("smora")) | own | {"adapter_option": given}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command_main()(words(inputs | {"output_dir": folder})) == 0
    return folder


def test_a_run_comes_back_with_its_bias(finished):
    run = load_run(finished)
    model, metrics = run.fitted.model, json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    assert repr(model.adapter) == "SMoRA(rank=4, alpha=2.0, active=2, balance=0.01, task_gates=True)"
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    stored = RunFolder.open(finished).load_tensors("posterior")
    for slot in ("v_proj", "fc2"):
        assert torch.equal(stored[f"buffers/{slot}.gate_bias"], model.tensors.buffers[f"{slot}.gate_bias"])
        assert bool(stored[f"buffers/{slot}.gate_bias"].any()) == bool(metrics["best_epoch"])
    assert metrics["notes"][-1].startswith("no adapters were exported: SMoRA(rank=4, alpha=2.0, active=2, balance=0.01")
    assert not list((finished / "adapters").iterdir())
    assert all(0 <= epoch["load_variation"] < 2 for epoch in RunFolder.open(finished).read_log())
    assert metrics["tau"] > 0
    theta, mean = run.fitted.weights()
    own = {name for name, value in theta.items() if not torch.equal(value, mean[name].expand_as(value))}
    assert own == {"v_proj.task_gate", "fc2.task_gate"}


def test_a_stopped_run_is_resumed_bit_for_bit(inputs, tmp_path, monkeypatch, capsys):
    options = inputs | {"adapter_option": ("active=2", "balance=0.01"), "tau": 10, "epochs": 3}
    assert command_main()(words(options | {"output_dir": tmp_path / "straight"})) == 0
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(StopSignals, "__call__", lambda self: bool(asked.append(1)) or len(asked) == 5)
        assert command_main()(words(options | {"output_dir": tmp_path / "run"})) != 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    capsys.readouterr()
    other = options | {"adapter_option": ("active=3", "balance=0.01")}
    assert command_main()(words(other | {"output_dir": tmp_path / "run", "resume": "true"})) == 2
    assert "adapter_option is" in capsys.readouterr().err
    assert command_main()(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "true"]) == 0
    straight, resumed = (RunFolder.open(tmp_path / name) for name in ("straight", "run"))
    assert without_times(resumed.read_metrics()) == without_times(straight.read_metrics())
    assert without_times(resumed.read_log()) == without_times(straight.read_log())
    for name, value in straight.load_tensors("posterior").items():
        assert torch.equal(resumed.load_tensors("posterior")[name], value), name


@pytest.mark.parametrize("guide", ["map", "normal"])
def test_new_tasks_get_gates_of_their_own(finished, tmp_path, guide):
    data = write_table(tmp_path / "new.csv", documents(("Cleo", "Ada"), number=3).replace({"Cleo": "Dora", "Ada": "Emil"}))
    options = {"data": data, "steps": 2, "guide": guide, "learning_rate": 0.1, "output_dir": tmp_path / "new"}
    assert command_main("adapt")([str(finished), *line(options)]) == 0
    found, fit = load_run(tmp_path / "new").fitted, load_run(finished).fitted
    assert all(norm > 0 for norm in found.deviation_norms().tolist())
    for name, value in fit.model.tensors.buffers.items():
        assert torch.equal(found.model.tensors.buffers[name], value)
    theta, mean = found.weights()
    assert torch.equal(theta["fc2.gate"], mean["fc2.gate"].expand_as(theta["fc2.gate"]))


def test_a_posterior_a_page_and_the_diagnostics(finished, tmp_path):
    options = {"epochs": 1, "draws": 2, "output_dir": tmp_path / "posterior"}
    assert command_main("posterior-fit")([str(finished), *line(options)]) == 0
    before, after = load_run(finished).fitted.model.tensors, load_run(tmp_path / "posterior").fitted.model.tensors
    assert all(torch.equal(value, after.buffers[name]) for name, value in before.buffers.items())
    for run in (finished, tmp_path / "posterior"):
        assert command_main("report")([str(run), "--output", str(tmp_path / "page.html")]) == 0
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "SMoRA" in page
        assert "latents, θ_d − Θ, because the change of a layer depends on its input" in page
        assert command_main("diagnose")([str(run), "--output", str(tmp_path / "figures"), "--device", "cpu"]) == 0
    usage = rank_usage(load_run(finished).fitted, load_run(finished).data.test)
    assert usage["fc2"].shape == (3, 2, 4)
    assert all((value >= 0).all() for value in usage_information(usage).values())


def test_a_text_of_unknown_task_needs_no_task(inputs, tmp_path):
    """One adapter for all (τ = ∞): gates read the token alone, so that Θ and every task write and predict the same."""
    options = inputs | {"adapter_option": ("active=2",), "tau": "inf", "epochs": 1, "output_dir": tmp_path / "run"}
    assert command_main()(words(options)) == 0
    run = load_run(tmp_path / "run")
    written = generate_side_by_side(run.fitted, "1 red", ["global-mean", *WORDS, "base"], max_new_tokens=6, raw=True)
    for text in written[1:-1]:
        assert torch.equal(text.tokens, written[0].tokens)
        torch.testing.assert_close(text.log_prob, written[0].log_prob)
    assert not torch.allclose(written[0].log_prob[:1], written[-1].log_prob[:1], atol=1e-5)
    test = run.data.test
    other = test.replace(task=(test.task + 1) % 3)
    perplexities = [run.fitted.evaluate(split)["test_perplexity"] for split in (test, other)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_an_unknown_task_has_the_mean_of_the_gates(finished):
    """With task gates, Θ has the mean of r_d, and A, B and R of all tasks."""
    fitted = load_run(finished).fitted
    [text] = generate_side_by_side(fitted, "1 red", ["global-mean"], max_new_tokens=4, raw=True)
    assert len(text.tokens)
    _, mean = fitted.weights()
    model = fitted.model
    ids = torch.tensor([[5, 6, 7]])
    own = model.backbone.logits(ids, model.change({name: value[None] for name, value in mean.items()}, torch.tensor([0])))
    assert own.isfinite().all()


NO_CHANGE = "cannot be written as LoRA matrices, because it gives no ΔW; use the run itself"


def refused(command, arguments, capsys, message):
    capsys.readouterr()
    assert command_main(command)(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_what_needs_one_change_of_weights_is_refused(inputs, finished, tmp_path, capsys):
    out = str(tmp_path / "out")
    refused("export-adapters", [str(finished), "--output_dir", out], capsys, NO_CHANGE)
    refused("export-adapters", [str(finished), "--output_dir", out, "--merged", "global-mean"], capsys, NO_CHANGE)
    other = shutil.copytree(finished, tmp_path / "other")
    refused("fold", [str(finished), str(other), "--output_dir", out], capsys, NO_CHANGE)
    tasks = {name: value for name, value in inputs.items() if name in ("data", "base_model", "adapter", "rank", "targets")}
    refused("continual-fit", line(tasks | {"output_dir": out, "epochs": 1}), capsys, NO_CHANGE)
    assert not (tmp_path / "out").exists()


def test_a_generator_of_gates_makes_no_folders_for_peft(inputs, tmp_path, capsys):
    tasks = {"data": write_table(tmp_path / "four.csv", documents((*WORDS, "Dora"))), "epochs": 1}
    finished, own = tmp_path / "run", {"threads": 1, "device": "cpu"}
    assert command_main()(words(inputs | tasks | {"output_dir": finished})) == 0
    given = line(own | {"method": "nearest", "left_out": "false", "output_dir": tmp_path / "generator"})
    assert command_main("generator-fit")([str(finished), *given]) == 0
    data = write_table(tmp_path / "new.csv", documents(("Cleo",), number=3).assign(task="Eve"))
    given = line(own | {"data": data, "output_dir": tmp_path / "out"})
    refused("generate-adapter", [str(tmp_path / "generator"), *given], capsys, NO_CHANGE)
    assert not (tmp_path / "out").exists()


def test_lora_matrices_are_no_start(inputs, tmp_path, capsys):
    plain = {name: value for name, value in inputs.items() if name not in ("adapter", "adapter_option")}
    assert command_main()(line(plain | {"epochs": 1, "output_dir": tmp_path / "lora"})) == 0
    folder = tmp_path / "lora" / "adapters" / "global-mean"
    start = {"start_from": folder, "output_dir": tmp_path / "run"}
    refused("map-fit", words(inputs | start), capsys, "start_from needs --adapter lora and --router by_task, not SMoRA(rank=4")
    assert not (tmp_path / "run").exists()
    backbone = Backbone.from_pretrained(inputs["base_model"], targets=["v_proj", "fc2"])
    with pytest.raises(InputError, match=r"LoRA matrices cannot be read as SMoRA\(rank=4"):
        load_peft(folder, BoRA(backbone, 2, adapter=SMoRA(rank=4)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["active=1"], "active is 1; give a multiple of the partition (1) from 2 to the rank (4), nearest: 2"),
        (["partition=4"], "rank is 4 and partition is 4; give a rank that is a multiple of the partition"),
        (["task_gate=true"], "adapter smora has no option 'task_gate'; did you mean 'task_gates'?"),
        (["balance=much"], "adapter_option balance is 'much'; give a number"),
        (["share=all"], "share is all, which leaves tasks no latent of their own"),
    ],
)
def test_a_bad_option_is_one_line_and_nothing_is_written(inputs, tmp_path, given, message, capsys):
    refused("map-fit", words(inputs | {"adapter_option": given, "output_dir": tmp_path / "run"}), capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_meta_fit_needs_a_fixed_bias(inputs, tmp_path, capsys):
    own = ("data", "base_model", "max_tokens", "targets", "threads", "adapter", "rank")
    options = {name: value for name, value in inputs.items() if name in own} | {"epochs": 1, "inner_steps": 1}
    moving = words(options | {"output_dir": tmp_path / "run"})
    refused("meta-fit", moving, capsys, "changes during a fit, which a meta-fit does not do")
    still = options | {"adapter_option": ["balance=0"], "output_dir": tmp_path / "run"}
    assert command_main("meta-fit")(words(still)) == 0


def test_an_ensemble_needs_a_fixed_bias(inputs, tmp_path, capsys):
    options = inputs | {"members": 2, "epochs": 1, "tau": 10, "output_dir": tmp_path / "run"}
    refused("ensemble", words(options), capsys, "each member of an ensemble would have load biases of its own")
    assert not (tmp_path / "run").exists()
    assert command_main("ensemble")(words(options | {"adapter_option": ["balance=0"]})) == 0
    assert load_run(tmp_path / "run").posterior().tasks == [*WORDS]
