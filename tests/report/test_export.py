"""The command: which adapters it writes, their cards, and what it sends to the hub."""

from __future__ import annotations

import json
import re

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForCausalLM

from bora_pyro.adapters import ADAPTERS
from bora_pyro.backbone.slots import linear_modules
from bora_pyro.exchange.factors import layer_deltas
from bora_pyro.exchange.load import load_peft, read_peft
from bora_pyro.report.export import COMMAND
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from tests.hub_stand_in import TOKEN, hub_stand_in
from tests.server_rules import vllm_problems, vllm_resolves
from tests.tiny import loaded_peft, peft_warnings
from tests.tiny_base import documents, map_run, quick_fit, write_table
from tests.toy_members import Spectral

main = COMMAND.main
TASKS = {"ada": "Ada", "borge-b": "Børge B.", "cleo": "Cleo"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    options = quick_fit(folder) | {"tau": 100, "learning_rate": 0.03, "output_dir": folder / "run"}
    map_run(options)
    posterior = PosteriorFitConfig(run=str(folder / "run"), output_dir=str(folder / "posterior"), epochs=1, draws=1, threads=1)
    run_posterior_fit(posterior, quiet=True)
    return folder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def of_task(weights, d):
    return {name: value[d] for name, value in weights.items()}


@pytest.mark.parametrize(("guide", "what"), [("map", "the MAP estimate"), ("normal", "the posterior's mean")])
def test_adapted_tasks(fitted, tmp_path, guide, what):
    data = write_table(tmp_path / "new.csv", documents(("Dora",), number=2))
    run_adapt(AdaptConfig(run=str(fitted / "run"), data=data, guide=guide, steps=1, output_dir=str(tmp_path / "new")), quiet=True)
    assert main([str(tmp_path / "new"), "--output_dir", str(tmp_path / "out")]) == 0
    assert f"{what} of an adaptation" in (tmp_path / "out" / "dora" / "README.md").read_text(encoding="utf-8")
    assert "was adapted to new tasks" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["adapters"]["dora"]["what"] == what


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_map_estimate(fitted, tmp_path, capsys):
    assert main([str(fitted / "run"), "--output_dir", str(tmp_path / "out"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(rf"adapters: {tmp_path / 'out'} \(4 folders\)\nchecked with PEFT [\d.]+: logits agree .*\n", out)
    assert names(tmp_path / "out") == sorted([*TASKS, "global-mean", "README.md", "export.json", "shrinkage.png"])
    for folder in (*TASKS, "global-mean"):
        assert names(tmp_path / "out" / folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # as the run itself has them
            stored = fitted / "run" / "adapters" / folder / name
            assert (tmp_path / "out" / folder / name).read_bytes() == stored.read_bytes()
    with Image.open(tmp_path / "out" / "shrinkage.png") as picture:
        assert picture.width > 300
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {folder: entry["task"] for folder, entry in described["adapters"].items()} == TASKS | {"global-mean": None}
    assert main([str(fitted / "run"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds an earlier result; give --overwrite true" in capsys.readouterr().err
    assert (
        main([str(fitted / "run"), "--output_dir", str(tmp_path / "out"), "--tasks", "Cleo", "ada", "--overwrite", "true"]) == 0
    )
    assert names(tmp_path / "out") == ["README.md", "ada", "cleo", "export.json", "global-mean", "shrinkage.png"]


def test_posterior_draws(fitted, tmp_path):
    words = ["--draws", "2", "--seed", "3", "--tasks", "Børge B.", "--base_name", "tiny-base"]
    assert main([str(fitted / "posterior"), "--output_dir", str(tmp_path / "out"), *words]) == 0
    folders = ["borge-b", "borge-b--draw-0", "borge-b--draw-1", "global-mean", "global-mean--draw-0", "global-mean--draw-1"]
    assert [name for name in names(tmp_path / "out") if (tmp_path / "out" / name).is_dir()] == folders
    run = load_run(fitted / "posterior", device="cpu")
    model, posterior = run.fitted.model, run.posterior(seed=3)
    theta, mean = run.fitted.weights()
    expected = {"borge-b": of_task(theta, 1), "global-mean": mean}
    for draw in range(2):
        drawn, of_draw = model.weights_given(posterior.sites(draw))
        expected |= {f"borge-b--draw-{draw}": of_task(drawn, 1), f"global-mean--draw-{draw}": of_draw}
    input_ids = torch.randint(3, model.backbone.model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    base, logits = AutoModelForCausalLM.from_pretrained(fitted / "base").eval(), []
    linear = set(linear_modules(base))
    for folder, weights in expected.items():
        assert equal(load_peft(tmp_path / "out" / folder, model, same_base=False), weights)
        assert vllm_problems(tmp_path / "out" / folder, linear=linear) == []
        assert vllm_resolves(tmp_path / "out", folder, base_model="tiny-base") is not None
        ours = model.backbone.logits(
            input_ids, model.change({name: value[None] for name, value in weights.items()}, torch.tensor([0, 0]))
        )
        with torch.no_grad():
            logits.append(loaded_peft(base, tmp_path / "out" / folder)(input_ids=input_ids).logits)
        torch.testing.assert_close(logits[-1], ours, atol=1e-5, rtol=1e-5)
    assert (logits[1] - logits[2]).abs().max() > 1e-4  # draws differ
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert described["seed"] == 3
    assert described["adapters"]["borge-b--draw-1"] == {"task": "Børge B.", "what": "draw 1 of the posterior", "draw": 1}
    assert "draw 1 of the posterior" in (tmp_path / "out" / "borge-b--draw-1" / "README.md").read_text()


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_cards_and_their_snippets(fitted, tmp_path, monkeypatch, capsys):
    words = ["--license", "cc-by-4.0", "--output_dir", str(tmp_path / "out")]
    assert main([str(fitted / "run"), *words]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", "cc-by-4.0", None)
    assert {"lora", "bora"} <= set(card.data.tags)
    metrics = load_run(fitted / "run", device="cpu").metrics
    for folder, name in TASKS.items():
        row = metrics["tasks"][folder]
        shown = [f"{row[key]:.2f}" for key in ("base_test_perplexity", "test_perplexity", "deviation_norm")]
        assert f"| {name} | `{folder}` | {row['train_documents']} | {' | '.join(shown)} |" in card.text
    assert "(shrinkage.png)" in card.text
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    single, beside = snippets(card.text)
    scope = {}
    with peft_warnings():
        exec(single, scope)
        exec(beside, scope)
    assert capsys.readouterr().out
    of_task = ModelCard.load(tmp_path / "out" / "cleo" / "README.md")
    assert "# Cleo" in of_task.text
    [snippet] = snippets(of_task.text)
    with peft_warnings():
        exec(snippet, {})
    assert "Θ, the global mean" in (tmp_path / "out" / "global-mean" / "README.md").read_text()


@pytest.mark.parametrize(("task", "d"), [("Børge B.", 1), ("cleo", 2), ("global-mean", None)])
def test_a_base_with_one_adapter_merged_into_it(fitted, tmp_path, capsys, task, d):
    assert main([str(fitted / "run"), "--output_dir", str(tmp_path / "out"), "--merged", task]) == 0
    assert "merged base: " in capsys.readouterr().out
    model, (theta, mean) = (fit := load_run(fitted / "run", device="cpu").fitted).model, fit.weights()
    weights = {name: value[None] for name, value in (mean if d is None else of_task(theta, d)).items()}
    input_ids = torch.randint(3, model.backbone.model.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=input_ids).logits
    torch.testing.assert_close(logits, model.backbone.logits(input_ids, model.change(weights, torch.tensor([0, 0]))))


def test_adapters_without_a_lora_form(tmp_path, capsys, monkeypatch):
    """The command, the cards and ``export.json`` say how far off they are."""
    monkeypatch.setitem(ADAPTERS, "spectral", Spectral)
    options = quick_fit(tmp_path) | {"adapter": "spectral", "adapter_option": "directions=3", "tau": 10, "learning_rate": 0.03}
    map_run(options | {"output_dir": tmp_path / "run"})
    assert main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), "--rank", "1"]) == 0
    assert "no exact LoRA form; rank 1 has a relative error of up to 0." in capsys.readouterr().err
    described = json.loads((tmp_path / "out" / "export.json").read_text())["adapters"]
    run = load_run(tmp_path / "run", device="cpu")
    for d, theta, _ in run.fitted.each_task():
        folder = list(TASKS)[d]
        expected = layer_deltas(run.fitted.model, theta, task=d)
        written = read_peft(tmp_path / "out" / folder)
        assert written.rank == 1
        found = {path: of_layer["lora_B"] @ of_layer["lora_A"] for path, of_layer in written.factors.items()}
        lost = sum((expected[path] - found[path]).square().sum() for path in expected)
        error = described[folder]["relative_error"]
        assert error == pytest.approx(float((lost / sum(value.square().sum() for value in expected.values())).sqrt()), rel=1e-3)
        assert f"a relative error of {error:.2g}" in (tmp_path / "out" / folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch):
    with hub_stand_in() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client, for LFS
def test_an_export_goes_to_the_hub(fitted, tmp_path, capsys, hub):
    words = ["--output_dir", str(tmp_path / "out"), "--push_to_hub", "ada/speeches", "--private", "true"]
    assert main([str(fitted / "run"), *words, "--base_name", "facebook/opt-350m"]) == 0
    assert capsys.readouterr().out.endswith(f"on the hub: {hub.url}/ada/speeches\n")
    local = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert hub.repositories == {"ada/speeches": local}
    assert len(local) == 3 + 3 * 4
    assert hub.created[0]["visibility"] == "private"
    card = ModelCard(hub.validated[0])
    assert card.data.base_model == "facebook/opt-350m"
    assert "PeftModel.from_pretrained(base, 'ada/speeches', subfolder='ada')" in card.text


def test_a_refused_export_is_kept(fitted, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main([str(fitted / "run"), "--output_dir", str(tmp_path / "out"), "--push_to_hub", "ada/speeches"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ada/speeches was not sent: the hub answers 401")
    assert error.count("\n") == 1
    assert read_peft(tmp_path / "out" / "ada").rank == 2
    assert not hub.repositories


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is given; name its folder, as in export_adapters.py"),
        (["{run}"], "no output_dir is given; name the folder to make"),
        (["{run}/gone", "--output_dir", "{out}"], "gone does not exist; give the --output_dir of a fit"),
        (["{run}", "--output_dir", "{out}", "--draws", "1"], "is a point estimate and has no posterior; fit one around it with"),
        (["{run}", "--output_dir", "{out}", "--draws", "-1"], "draws is -1; give a whole number from 0 up"),
        (
            ["{run}", "--output_dir", "{out}", "--tasks", "adaa"],
            "task 'adaa' is not in this run, which has 3; did you mean 'Ada'?",
        ),
        (["{run}", "--output_dir", "{out}", "--rank", "0"], "rank is 0; give a whole number from 1 up"),
        (
            ["{run}", "--output_dir", "{out}", "--merged", "adaa"],
            "task 'adaa' is not in this run, which has 3; did you mean 'Ada'?",
        ),
        (
            ["{run}", "--output_dir", "{out}", "--merged", "ada", "--draws", "2"],
            "draws is of exported adapters; leave it out with --merged, which writes a whole base",
        ),
        (["{run}", "--output_dir", "{run}"], "which is not part of an earlier result; give another --output_dir"),
        (["{run}", "--output_dir", "{run}/config.yaml"], "is a file or a link; give another --output_dir"),
        (
            ["{run}", "--output_dir", "{out}", "--push_to_hub", "speeches"],
            "push_to_hub 'speeches' is not a valid repository name on the hub",
        ),
    ],
)
def test_bad_lines(fitted, tmp_path, capsys, words, message):
    before = names(fitted / "run")
    words = [word.replace("{run}", str(fitted / "run")).replace("{out}", str(tmp_path / "out")) for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
    assert names(fitted / "run") == before
