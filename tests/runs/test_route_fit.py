"""Gates over the adapters of a run: from run folder to run folder, read back, and what reads such a run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro import Backbone, BoRA, LoRA, save_peft
from bora_pyro.exchange.factors import lora_form
from bora_pyro.exchange.load import read_peft
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.route_fit import frozen, gates_of
from bora_pyro.predict.gates import read_gates
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.generate import COMMAND as GENERATE
from bora_pyro.runs.infer_task import COMMAND as INFER
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.route_fit import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny import of_task, random_weights
from tests.tiny_base import WORDS, command_main, documents, line, map_run, quick_fit, write_table

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


@pytest.fixture(scope="module")
def elsewhere(folder):
    """PEFT folders of other ranks, scales and layers, and the options that name documents of their tasks."""
    options = quick_fit(folder)
    peft = folder / "peft"
    for seed, (slug, rank, targets) in enumerate(
        (("ada", 1, ["v_proj"]), ("borge-b", 3, ["v_proj", "fc2"]), ("cleo", 2, ["fc2"]))
    ):
        backbone = Backbone.from_pretrained(options["base_model"], targets=targets)
        model = BoRA(backbone, 2, adapter=LoRA(rank=rank, alpha=1.5), seed=seed)
        save_peft(peft / slug, model, of_task(random_weights(model, seed=seed), 0))
    documents = folder / "documents.yaml"
    documents.write_text(f"data: {options['data']}\nbase_model: {options['base_model']}\nmax_tokens: 32\ntoken_budget: 256\n")
    return peft, documents


def of_folders(elsewhere, out, **more):
    peft, documents = elsewhere
    return line({"adapters": peft, "fit_config": documents, "k": 1, "epochs": 2, "learning_rate": 0.1, "output_dir": out} | more)


def test_adapters_from_peft_folders(elsewhere, folder, capsys):
    out = folder / "routed-peft"
    assert main(of_folders(elsewhere, out)) == 0
    said = capsys.readouterr()
    assert "note: the adapters change 2 to 4 of 4 layers; the others they leave as they are" in said.err
    saved = load_run(out)
    model, weights = saved.fitted.model, saved.fitted.weights()[0]
    assert saved.fitted.tasks == ["Ada", "Børge B.", "Cleo"]
    theta = {name: value for name, value in weights.items() if not name.endswith("gate")}
    # each task has the change of its own folder in every layer
    plain = BoRA(model.backbone, 3, adapter=model.adapter)
    for d, slug in enumerate(("ada", "borge-b", "cleo")):
        given = read_peft(elsewhere[0] / slug)
        form = lora_form(plain, {name: value[d] for name, value in theta.items()})
        for path, of_layer in form.factors.items():
            own = given.factors.get(path)
            expected = torch.zeros(len(of_layer["lora_B"]), of_layer["lora_A"].shape[1])
            expected = expected if own is None else given.scaling * own["lora_B"] @ own["lora_A"]
            torch.testing.assert_close(form.alpha / form.rank * of_layer["lora_B"] @ of_layer["lora_A"], expected)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["tau"] is None
    (own,) = evaluate(plain, saved.data.test, theta)
    assert metrics["task_test_perplexity"] == pytest.approx(own.perplexity(), rel=1e-5)
    assert any("trained elsewhere" in note for note in metrics["notes"])
    assert GENERATE.main([str(out), "--prompt", "red", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run": "x"}, "a run or --adapters: both are given"),
        ({"adapters": None, "fit_config": None}, "a run or --adapters: neither is given"),
        ({"fit_config": None}, "adapters and fit_config belong together"),
        ({"draws": 2}, "draws is 2, but adapters from PEFT folders have no posterior"),
        ({"fit_config": "fitted.yaml"}, "has rank 4, but the adapters are fitted already; leave it out"),
        ({"fit_config": "two.yaml"}, "has no documents in .*, and its gate cannot be learned"),
        ({"fit_config": "more.yaml"}, "task 'Dora' of .* has no adapter in"),
        ({"fit_config": "gone.yaml"}, "gone.yaml"),
    ],
)
def test_bad_adapters_from_peft_folders(elsewhere, folder, change, error, capsys):
    text = elsewhere[1].read_text()
    (folder / "fitted.yaml").write_text(f"{text}rank: 4\n")
    (folder / "two.yaml").write_text(f"{text}num_tasks: 2\n")
    write_table(folder / "four.csv", documents((*WORDS, "Dora")))
    (folder / "more.yaml").write_text(text.replace("documents.csv", "four.csv"))
    change = {name: folder / value if name == "fit_config" and value else value for name, value in change.items()}
    options = {"adapters": elsewhere[0], "fit_config": elsewhere[1], "output_dir": folder / "none"} | change
    words = [str(options.pop("run"))] if "run" in options else []
    assert main([*words, *line({name: value for name, value in options.items() if value is not None})]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert not (folder / "none").exists()
