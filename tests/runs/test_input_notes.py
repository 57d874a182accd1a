"""Input that can be used, and of which the user should know: the notes of a fit."""

from __future__ import annotations

import pandas as pd
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bora_pyro.runs.folder import RunFolder
from tests.runs.input_tables import TWO_SMALL
from tests.tiny_base import documents, line, save_base, write_table


def noted(main, options, capsys, folder):
    assert main(line({**options, "output_dir": folder, "epochs": 1})) == 0
    notes = [text.removeprefix("note: ") for text in capsys.readouterr().err.splitlines() if text.startswith("note: ")]
    assert RunFolder.open(folder).read_metrics()["notes"] == notes
    return notes


def test_a_clean_table_has_no_notes(main, inputs, tmp_path, capsys):
    assert noted(main, inputs, capsys, tmp_path / "run") == []


def test_a_base_that_reads_less_than_max_tokens(main, inputs, tmp_path, capsys):
    base = save_base(tmp_path / "base", context=16)
    notes = noted(main, {**inputs, "base_model": base, "max_tokens": 256}, capsys, tmp_path / "run")
    assert notes[0] == "max_tokens 256 is more than the base model reads; 16 is used"


def test_a_base_without_a_padding_token(main, inputs, tmp_path, capsys):
    base = save_base(tmp_path / "base", pad=False)
    assert noted(main, {**inputs, "base_model": base}, capsys, tmp_path / "run") == []


def test_empty_texts_are_dropped_and_counted(main, inputs, tmp_path, capsys):
    frame = documents()
    frame.loc[[0, 11], "text"] = ["", " \n"]
    notes = noted(main, {**inputs, "data": write_table(tmp_path / "t.csv", frame)}, capsys, tmp_path / "run")
    assert notes == ["2 documents with empty text were dropped"]
    metrics = RunFolder.open(tmp_path / "run").read_metrics()
    split = RunFolder.open(tmp_path / "run").read_split()
    assert sum(len(groups) for groups in split["tasks"].values()) == 28
    assert metrics["train_documents"] + metrics["test_documents"] < 28


def test_documents_longer_than_the_context_are_cut_and_counted(main, inputs, tmp_path, capsys):
    frame = documents()
    frame.loc[[0, 11, 20], "text"] = [f"{n} " + "red green blue grey " * 40 for n in range(3)]
    notes = noted(main, {**inputs, "data": write_table(tmp_path / "t.csv", frame)}, capsys, tmp_path / "run")
    assert notes == ["3 of 30 documents are longer than 32 tokens and were cut"]


def test_texts_on_both_sides_of_the_split_are_counted(main, inputs, tmp_path, capsys):
    frame = pd.concat([documents(), pd.DataFrame([{"task": "Ada", "text": "the same again"}] * 10)])
    notes = noted(main, {**inputs, "data": write_table(tmp_path / "t.csv", frame)}, capsys, tmp_path / "run")
    assert notes == ["1 text stands in more than one split (kept)"]


def test_small_tasks_are_dropped_where_that_is_asked_for(main, inputs, tmp_path, capsys):
    frame = pd.concat([documents((task,), number=number) for task, number in TWO_SMALL])
    options = {**inputs, "data": write_table(tmp_path / "t.csv", frame), "small_tasks": "drop"}
    notes = noted(main, options, capsys, tmp_path / "run")
    assert notes == ["2 tasks with fewer than 3 documents left out: 'Bo', 'Dan'"]
    assert list(RunFolder.open(tmp_path / "run").read_metrics()["tasks"]) == ["ada", "cleo"]


def other_base(folder, model_type, **sizes):
    """The tokenizer of the tiny base, with a model of another type."""
    save_base(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, pad_token_id=1, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_layers_that_the_base_never_calls_are_noted(main, inputs, tmp_path, capsys):
    sizes = {
        "d_model": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 40,
    }
    base = other_base(tmp_path / "base", "bart", **sizes)
    [note] = noted(main, {**inputs, "base_model": base, "targets": "v_proj"}, capsys, tmp_path / "run")
    assert note == (
        "no adapter on 2 of the layers that the targets name; they are not called when the base reads text: "
        "model.decoder.layers.*.encoder_attn.v_proj"
    )


def test_a_base_that_reads_in_both_directions_leaves_nothing(main, inputs, tmp_path, capsys):
    base = other_base(tmp_path / "base", "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert main(line({**inputs, "base_model": base, "targets": "query", "output_dir": tmp_path / "run"})) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the base, a BertLMHeadModel, is not a causal language model: ")
    assert not (tmp_path / "run").exists()
