"""What is read of a base's configuration, and that nothing is written for a base that cannot read the documents."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from bora_pyro import Backbone, BoRA, InputError, LoRA, fit
from bora_pyro.backbone.configuration import (
    Widths,
    base_name,
    context_of,
    longest_text,
    model_type,
    text_config,
    token_rows,
    widths_of,
)
from bora_pyro.backbone.texts import check_token_ids, token_split
from bora_pyro.inference.layer_memory import _MeasuredLayers, layers_of
from bora_pyro.inference.memory import estimate_memory
from tests.tiny import tiny_backbone, tiny_data, tiny_model, tiny_split
from tests.tiny_base import command_main, line, quick_fit, save_base, script

# type -> fields, context, widths (hidden, queries, keys, inner) or None
CONFIGURATIONS = {
    "llama": ({"head_dim": 4, "num_key_value_heads": 2}, 2048, (8, 16, 8, 24)),
    "gpt2": ({"n_positions": 100, "n_embd": 8, "n_head": 2}, 100, (8, 8, 8, 32)),
    "mpt": ({"max_seq_len": 100, "d_model": 8, "n_heads": 2}, 100, (8, 8, 8, 32)),
    "dbrx": ({"max_seq_len": 100, "d_model": 8, "n_heads": 2}, 100, (8, 8, 4, 32)),
    "bloom": ({"hidden_size": 8, "n_head": 2}, None, (8, 8, 8, 32)),
    "gemma3": ({"text_config": {"hidden_size": 8, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 2,
                                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 100}},
               100, (8, 8, 4, 24)),
    "bart": ({"d_model": 8, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "encoder_ffn_dim": 99,
              "max_position_embeddings": 100}, 100, (8, 8, 8, 24)),
    "whisper": ({"d_model": 8, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_target_positions": 100}, 100,
                (8, 8, 8, 24)),
    "xlnet": ({"d_model": 8, "n_head": 2, "d_inner": 24}, None, (8, 8, 8, 24)),
    "mamba": ({}, None, None),
    "mamba2": ({}, None, None),
    "rwkv": ({"context_length": 100}, 100, None),
    "xlstm": ({}, None, None),
    "qwen3_next": ({"num_hidden_layers": 4}, 32768, None),
    "gemma4_text": ({}, 131072, None),  # its layers differ in width
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_table_of_configurations(name):
    fields, context, widths = CONFIGURATIONS[name]
    small = {"hidden_size": 8, "num_attention_heads": 4, "intermediate_size": 24} if name == "llama" else {}
    config = AutoConfig.for_model(name, **small, **fields)
    assert model_type(config) == name
    assert base_name(config) == ""
    assert context_of(config) == context
    found = widths_of(config)
    assert found == (None if widths is None else Widths(*widths, found.activation))


def test_the_configuration_of_the_part_that_writes_text():
    nested = AutoConfig.for_model("gemma3", text_config={"vocab_size": 99})
    assert text_config(nested) is nested.text_config
    plain = AutoConfig.for_model("llama")
    assert text_config(plain) is plain


def test_positions_begin_after_the_padding_row_in_roberta():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    config = AutoConfig.for_model("roberta", **sizes, max_position_embeddings=14, pad_token_id=1, is_decoder=True)
    model = transformers.RobertaForCausalLM(config).eval()
    assert (context_of(config), longest_text(model), token_rows(model)) == (14, 12, 20)
    model(torch.full((1, 12), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 13), 5))


def extended(folder, *, tokens=("<new>",)):
    """A base whose tokenizer got new tokens without new rows of the embedding."""
    save_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return Backbone.from_pretrained(folder)


def test_documents_with_tokens_that_the_base_cannot_read(tmp_path):
    backbone = extended(tmp_path)
    rows = backbone.num_token_ids
    assert len(token_split(backbone, ["a red one"], task=[0], num_tasks=1)) == 1  # the new token is not used
    with pytest.raises(InputError, match=rf"token id {rows} \('<new>'\), and the base reads ids from 0 to {rows - 1}; give the"):
        token_split(backbone, ["a <new> one"], task=[0], num_tasks=1)
    without = Backbone(tiny_model("opt", vocab_size=20))
    with pytest.raises(InputError, match=r"token id \d+, and the base reads ids from 0 to 19"):
        fit(BoRA(without, 3, adapter=LoRA(rank=2)), tiny_data(), epochs=1)
    check_token_ids(Backbone(tiny_model("opt")), tiny_split())


def test_nothing_is_written_for_documents_that_the_base_cannot_read(tmp_path, capsys):
    options = quick_fit(tmp_path) | {"output_dir": tmp_path / "run"}
    extended(tmp_path / "base")
    table = tmp_path / "documents.csv"
    table.write_text(table.read_text().replace("red", "<new>"))
    assert command_main()(line(options)) == 2
    assert not (tmp_path / "run").exists()
    assert "'<new>'" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "xlstm", "jamba", "qwen3_next", "mixtral", "gemma4_text", "blt"])
def test_the_memory_of_layers_that_no_formula_describes_is_measured(name):
    backbone = Backbone(script("tiny_architectures").tiny_model(name))
    model = BoRA(backbone, 3, adapter=LoRA(rank=2))
    data = tiny_data()
    few, many = (estimate_memory(model, data, token_budget=budget) for budget in (32, 64))
    assert 0 < few.activations < many.activations
    checkpointed = Backbone(backbone.model, gradient_checkpointing=True) if any(backbone._blocks.values()) else None
    if checkpointed is not None:
        less = estimate_memory(BoRA(checkpointed, 3, adapter=LoRA(rank=2)), data, token_budget=64)
        assert checkpointed.gradient_checkpointing
        assert 0 < less.total < many.total


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_the_measure_agrees_with_the_formula(architecture, targets):
    model = BoRA(tiny_backbone(architecture, targets=targets, num_hidden_layers=8), 2, adapter=LoRA(rank=2))
    formula, measured = layers_of(model), _MeasuredLayers.of(model, 8)
    for checkpointing in (False, True):
        expected = formula.kept(checkpointing=checkpointing)
        assert measured.kept(checkpointing=checkpointing) == pytest.approx(expected, rel=0.25)
