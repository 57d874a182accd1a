"""Gates over the adapters of a run: from run folder to run folder, read back, and what reads such a run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro.inference.route_fit import frozen, gates_of
from bora_pyro.predict.gates import read_gates
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.generate import COMMAND as GENERATE
from bora_pyro.runs.infer_task import COMMAND as INFER
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.route_fit import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, map_run, quick_fit, write_table

main = COMMAND.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("route")


@pytest.fixture(scope="module")
def run(folder):
    options = quick_fit(folder) | {"data": write_table(folder / "more.csv", documents(number=20)), "epochs": 3}
    return map_run(options | {"learning_rate": 0.1, "tau": 1, "output_dir": folder / "run"})


@pytest.fixture(scope="module")
def routed(run, folder):
    words = {"k": 2, "epochs": 12, "patience": 0, "token_budget": 64, "learning_rate": 0.1, "output_dir": folder / "routed"}
    assert main([str(run), *line(words)]) == 0
    return folder / "routed"


def test_the_folder_is_read_back(run, routed):
    metrics = json.loads((routed / "metrics.json").read_text())
    saved, source = load_run(routed), load_run(run)
    weights, adapters = saved.fitted.weights()[0], source.fitted.weights()[0]
    for name, value in adapters.items():
        assert torch.equal(weights[name], value)
    stored = load_file(routed / "posterior.safetensors")
    for name, value in gates_of(weights).items():
        assert torch.equal(stored[f"theta.{name}"], value)
        assert bool(value.any())
    assert saved.fitted.evaluate(saved.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    found = read_gates(saved.fitted.model, weights, saved.data.test)
    assert metrics["gate"] == pytest.approx(found.numbers())
    assert metrics["gate"]["joint"] > 0.4  # each task has words of its own, and three tasks are a third by chance
    of_run = json.loads((run / "metrics.json").read_text())
    assert metrics["task_test_perplexity"] == of_run["test_perplexity"]
    for slug, row in metrics["tasks"].items():
        assert row["deviation_norm"] == of_run["tasks"][slug]["deviation_norm"]
    assert repr(saved.fitted.model.router) == metrics["router"]
    assert not [*(routed / "adapters").glob("*")]


def test_it_says_how_good_the_gates_are(run, folder, capsys):
    assert main([str(run), *line({"k": 1, "epochs": 1, "output_dir": folder / "said"})]) == 0
    metrics, said = json.loads((folder / "said" / "metrics.json").read_text()), capsys.readouterr()
    printed = said.out
    kept_start = metrics["best_epoch"] == 0
    assert ("note: no epoch had a lower validation perplexity than gates of 0" in said.err) == kept_start
    assert any(note.startswith("no epoch had") for note in metrics["notes"]) == kept_start
    assert f"gates: right at {metrics['gate']['accuracy']:.1%} of the test tokens and layers" in printed
    assert f"test perplexity: {metrics['test_perplexity']:.2f} with gates" in printed


def test_a_text_needs_no_task(routed, capsys):
    assert GENERATE.main([str(routed), "--prompt", "red", "--max_new_tokens", "3", "--json", "true"]) == 0
    written = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [text["task"] for text in written] == ["routed", "base"]
    assert GENERATE.main([str(routed), "--prompt", "red", "--task", "Ada"]) == 2
    assert "task 'Ada' cannot be named: gates choose the adapters of each token; give routed or base" in capsys.readouterr().err
    for words in ([], ["--by", "token"]):
        assert INFER.main([str(routed), "--text", "red", *words]) == 2
        assert "reads a text by the adapters of all tasks, whatever its task" in capsys.readouterr().err


def test_generated_tokens_are_those_of_the_routed_model(routed, capsys):
    assert (
        GENERATE.main([str(routed), "--prompt", "red green", "--task", "routed", "--max_new_tokens", "4", "--json", "true"]) == 0
    )
    [text] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    fitted = load_run(routed).fitted
    tokenizer, weights = fitted.model.backbone.tokenizer, fitted.weights()[0]
    start = tokenizer("red green").input_ids
    ids, row = torch.tensor([[tokenizer.bos_token_id, *start]]), torch.zeros(1, dtype=torch.int64)
    for _ in range(4):
        logits = fitted.model.backbone.logits(ids, fitted.model.change(weights, row))
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert tokenizer.decode(ids[0, 1 + len(start) :], skip_special_tokens=True) == text["text"]


def test_gates_over_draws(run, folder, capsys):
    config = PosteriorFitConfig(run=str(run), epochs=1, output_dir=str(folder / "posterior"), draws=2)
    run_posterior_fit(config, quiet=True)
    words = {"draws": 2, "epochs": 1, "output_dir": folder / "routed-draws"}
    assert main([str(folder / "posterior"), *line(words)]) == 0
    metrics = json.loads((folder / "routed-draws" / "metrics.json").read_text())
    assert f"mixture of 2 draws with the same gates: {metrics['mixture_test_perplexity']:.2f}" in capsys.readouterr().out
    saved, posterior = load_run(folder / "routed-draws"), load_run(folder / "posterior").posterior()
    prior = frozen(saved.fitted.model)
    assert prior.num_draws == 2
    for k in range(2):
        for name, value in posterior.draw(k).items():
            assert torch.equal(prior.draw(k)[name], value)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--k", "4"], "k is 4, and there are 3 adapters; give a whole number from 1 to 3"),
        (["--k", "0"], "k is 0"),
        (["--draws", "2"], "is a point estimate"),
        (["--gate_weight", "0"], "gate_weight is 0"),
        (["--token_weight", "-1"], "token_weight is -1"),
        (["--router", "meteor"], "did you mean 'meteora'"),
    ],
)
def test_bad_input(run, folder, words, error, capsys):
    assert main([str(run), "--output_dir", str(folder / "none"), *words]) == 2
    assert error in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_what_cannot_be_routed(run, routed, folder, capsys):
    assert main([str(routed), "--output_dir", str(folder / "none")]) == 2
    assert "the adapters are read by MeteoRA(k=2, temperature=1.0, execution='gathered') already" in capsys.readouterr().err
    assert main([str(run), "--output_dir", str(run)]) == 2
    assert "is the run itself" in capsys.readouterr().err
    assert command_main("map-fit")([*line({"router": "meteora", "output_dir": folder / "none"})]) == 2
    assert "router meteora is fitted to the adapters of a finished run" in capsys.readouterr().err
    assert command_main("export-adapters")([str(routed), "--output_dir", str(folder / "none")]) == 2
    assert "cannot be exported from MeteoRA" in capsys.readouterr().err
    assert not (folder / "none").exists()
