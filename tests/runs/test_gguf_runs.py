"""A run whose base is a GGUF file: it is recorded, resumed, read back, exported, and refused once the file has changed."""

from __future__ import annotations

import json

import pytest
import torch

from bora_pyro import Backbone, InputError
from bora_pyro.report.export import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny import loaded_peft
from tests.tiny_base import finished_run, line, without_times, write_table
from tests.tiny_gguf import toy_llama, toy_tokenizer, write_gguf


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), toy_tokenizer()
    base = write_gguf(folder / "model.gguf", toy_llama(tokenizer), tokenizer, kind="Q4_1")
    sizes = {"max_tokens": 32, "token_budget": 256, "rank": 2, "epochs": 2, "threads": 1, "learning_rate": 0.03}
    return {"data": write_table(folder / "documents.csv"), "base_model": base, **sizes}


@pytest.fixture(scope="module")
def finished(main, options, tmp_path_factory):
    return finished_run(main, options, tmp_path_factory.mktemp("run") / "run")


def test_a_run_names_its_file(finished, options):
    assert finished.read_config()["base_model"] == options["base_model"]
    for place in ("ada", "global-mean"):
        config = json.loads((finished.path / "adapters" / place / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == options["base_model"]


def test_a_run_is_read_back(finished):
    run = load_run(finished.path)
    assert run.config.base_model == finished.read_config()["base_model"]
    scores = run.fitted.evaluate(run.data.test)
    assert scores["test_perplexity"] == pytest.approx(finished.read_metrics()["test_perplexity"], rel=1e-6)
    assert run.data.notes[0] == "the base is dequantised from Q4_1 to float32"


def test_a_run_of_fewer_epochs_is_resumed(main, options, finished, tmp_path):
    first = finished_run(main, options, tmp_path / "run", epochs=1)
    again = finished_run(main, {**options, "resume": "true"}, tmp_path / "run", epochs=3)
    assert [entry["epoch"] for entry in again.read_log()] == [1, 2, 3]
    assert first.path == again.path
    same = finished_run(main, {**options, "resume": "true"}, finished.path)
    assert without_times(same.read_metrics()) == without_times(finished.read_metrics())


def test_another_file_is_another_base(main, options, finished, tmp_path, capsys):
    tokenizer = toy_tokenizer()
    other = {**options, "base_model": write_gguf(tmp_path / "model.gguf", toy_llama(tokenizer, seed=4), tokenizer, kind="Q4_1")}
    run = finished_run(main, other, tmp_path / "run")
    write_gguf(tmp_path / "model.gguf", toy_llama(tokenizer, seed=5), tokenizer, kind="Q4_1")
    with pytest.raises(InputError, match="base model"):
        load_run(run.path)
    assert main(line({**other, "output_dir": run.path, "resume": "true", "epochs": 4})) == 2
    assert "base model" in capsys.readouterr().err


def test_adapters_are_exported_with_a_card_that_loads_the_file(finished, options, tmp_path):
    assert COMMAND.main([str(finished.path), "--output_dir", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "ada" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == options["base_model"]
    card = (tmp_path / "out" / "ada" / "README.md").read_text(encoding="utf-8")
    assert f"backbone = Backbone.from_pretrained({options['base_model']!r})" in card
    run, ids = load_run(finished.path), torch.tensor([[3, 40, 41, 42]])
    model, (theta, _) = run.fitted.model, run.fitted.weights()
    with torch.no_grad():
        peft = loaded_peft(Backbone.from_pretrained(options["base_model"]).model, tmp_path / "out" / "ada")
        expected = model.backbone.logits(ids, model.change(theta, torch.tensor([0])))
        torch.testing.assert_close(peft(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, model.backbone.logits(ids), atol=1e-4)


def test_a_merged_base_is_a_folder(finished, tmp_path):
    assert COMMAND.main([str(finished.path), "--output_dir", str(tmp_path / "out"), "--merged", "ada"]) == 0
    backbone = Backbone.from_pretrained(tmp_path / "out")
    assert backbone.notes == []
    assert backbone.tokenizer.tokenize("  1") == ["ĠĠ", "1"]
