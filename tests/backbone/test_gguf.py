"""Bases from GGUF files: the weights and the tokenizer are the file's, notes say what was changed, bad files are one line."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from bora_pyro import Backbone, InputError
from bora_pyro.backbone.tokenizer import load_tokenizer
from bora_pyro.exchange.load import base_place
from tests.tiny_gguf import CHAT, toy_llama, toy_tokenizer, unpacked_state, write_gguf

TEXTS = ["7 red green", "  12 north\n\n  3", "it's one   2", "", "<|im_start|>user\nAda<|im_end|>\n", "Børge 日本 ½", "\t 4"]


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return toy_llama(tokenizer)


def logits(model):
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        return model(ids).logits


def test_plain_numbers_give_the_logits_of_the_folder(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    folder = Backbone.from_pretrained(tmp_path / "folder")
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer))
    assert torch.equal(logits(file.model), logits(folder.model))
    assert file.digest == folder.digest
    assert file.notes == folder.notes == []
    assert (file.context, file.num_token_ids) == (folder.context, folder.num_token_ids)
    assert [slot.paths for slot in file.slots] == [slot.paths for slot in folder.slots]


def test_a_head_of_its_own(tmp_path, tokenizer):
    model = toy_llama(tokenizer, tie_word_embeddings=False)
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer))
    assert torch.equal(logits(file.model), logits(model))
    assert file.notes == []


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0"])
def test_blocks_are_dequantised_exactly(tmp_path, model, tokenizer, kind):
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer, kind=kind))
    expected = unpacked_state(model, kind)
    state = file.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not torch.equal(logits(file.model), logits(model))
    assert file.notes == [f"the base is dequantised from {kind} to float32"]
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_the_precision_is_that_of_the_fit(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, kind="Q4_1")
    file = Backbone.from_pretrained(path, precision=torch.bfloat16)
    assert all(
        torch.equal(file.model.state_dict()[name], value.bfloat16()) for name, value in unpacked_state(model, "Q4_1").items()
    )
    assert file.notes == ["the base is dequantised from Q4_1 to bfloat16"]
    assert file.digest == Backbone.from_pretrained(path).digest


def test_a_dequantised_base_is_saved_and_loaded_as_a_folder(tmp_path, model, tokenizer):
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer, kind="Q4_1"))
    file.model.save_pretrained(tmp_path / "folder")
    file.tokenizer.save_pretrained(tmp_path / "folder")
    folder = Backbone.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(file.model), logits(folder.model))
    assert [file.tokenizer(text).input_ids for text in TEXTS] == [folder.tokenizer(text).input_ids for text in TEXTS]
    assert folder.notes == []


def test_the_tokenizer_is_the_one_that_was_written(tmp_path, model, tokenizer):
    found, context = load_tokenizer(write_gguf(tmp_path / "model.gguf", model, tokenizer))
    assert [found(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert [found.decode(found(text).input_ids) for text in TEXTS] == TEXTS
    assert found.get_vocab() == tokenizer.get_vocab()
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (1, 2, 2, 0)
    assert found.chat_template == CHAT
    assert context == 32
    assert found.name_or_path == str(tmp_path / "model.gguf")


def test_the_rule_of_the_file_decides_where_texts_are_cut(tmp_path, model, tokenizer):
    digits, _ = load_tokenizer(write_gguf(tmp_path / "digits.gguf", model, tokenizer))
    whole, _ = load_tokenizer(write_gguf(tmp_path / "whole.gguf", model, tokenizer, pre="gpt-2"))
    assert digits.tokenize("  1") == ["ĠĠ", "1"]
    assert whole.tokenize("  1") == ["Ġ", "Ġ", "1"]


@pytest.mark.parametrize(
    ("pre", "named"),
    [("poro-chat", "the rule 'poro-chat', which is not known here"), (None, "no rule"), ("gpt-2", None), ("llama-bpe", None)],
)
def test_a_rule_that_is_not_known_is_noted(tmp_path, model, tokenizer, pre, named):
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer, pre=pre))
    about = (
        f"the GGUF file names {named} for cutting texts; they are cut as GPT-2 does, so some tokens may differ from its training"
    )
    assert file.notes == ([] if named is None else [about])


def test_neighbours_of_the_file_are_not_read(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    before = Backbone.from_pretrained(path)
    toy_tokenizer(single_digits=False).save_pretrained(tmp_path)
    toy_llama(tokenizer, seed=3).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "facebook/opt-350m"}')
    after = Backbone.from_pretrained(path)
    assert after.digest == before.digest
    assert after.tokenizer.tokenize("  1") == ["ĠĠ", "1"]


def test_the_base_is_named_by_its_file(tmp_path, model, tokenizer, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    assert Backbone.from_pretrained(path).model.config.name_or_path == path
    monkeypatch.chdir(tmp_path)
    assert Backbone.from_pretrained("model.gguf").model.config.name_or_path == "model.gguf"
    assert base_place("model.gguf") == base_place(path)
    shutil.copy(path, "weights.bin")  # the name decides nothing
    assert Backbone.from_pretrained("weights.bin").digest == Backbone.from_pretrained(path).digest


def test_numbers_that_have_no_place_are_noted(tmp_path, model, tokenizer):
    more = {"blk.0.attn_q.bias": np.ones(32, np.float32), "rope_freqs.weight": np.ones(4, np.float32)}
    file = Backbone.from_pretrained(write_gguf(tmp_path / "model.gguf", model, tokenizer, more=more))
    rope, left = file.notes
    assert "scaled rotary frequencies (rope_freqs.weight)" in rope
    total = sum(p.numel() for p in model.parameters()) + 36
    assert left.startswith(f"36 of the {total:,} numbers in the GGUF file have no place in transformers' LlamaForCausalLM")


def test_a_file_that_lacks_weights(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, leave_out=["blk.1.ffn_up.weight"])
    with pytest.raises(InputError, match=r"has no weights for 'model.layers.1.mlp.up_proj.weight', which a LlamaForCausalLM"):
        Backbone.from_pretrained(path)


def test_another_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    with pytest.raises(
        InputError, match=r"model.gguf' is no GGUF file: it does not begin with the letters GGUF; give a GGUF file"
    ):
        Backbone.from_pretrained(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config.json' is no GGUF file"):
        Backbone.from_pretrained(str(tmp_path / "config.json"))
    with pytest.raises(InputError, match=r"none.gguf' cannot be opened \(No such file or directory\); give the path of a file"):
        load_tokenizer(tmp_path / "none.gguf")


@pytest.mark.parametrize("part", [4, 30, 3000, 0.5, 0.9, -1])
def test_a_file_that_was_cut_off(tmp_path, model, tokenizer, part):
    path = tmp_path / "model.gguf"
    write_gguf(path, model, tokenizer)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole)) if 0 < part < 1 else part])
    with pytest.raises(InputError, match=r"cannot be read: the GGUF file is cut off or damaged \(.*\); get it again") as caught:
        Backbone.from_pretrained(path)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_transformers_does_not_read(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, architecture="lama")
    with pytest.raises(
        InputError, match=r"of architecture 'lama', which transformers does not read; it reads bloom, .* 'llama'\?"
    ):
        Backbone.from_pretrained(path)
    with pytest.raises(InputError, match=r"of architecture 'lama'"):
        load_tokenizer(path)


def test_a_part_of_a_base(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, fields={"split.count": 3})
    with pytest.raises(InputError, match=r"is one of 3 parts; join them with llama-gguf-split --merge"):
        Backbone.from_pretrained(path)


def test_a_base_without_tensors(tmp_path, model, tokenizer):
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        tokenizer,
        leave_out=[t.name for t in GGUFReader(write_gguf(tmp_path / "whole.gguf", model, tokenizer)).tensors],
    )
    with pytest.raises(InputError, match=r"is a GGUF file without tensors; give one of a language model"):
        Backbone.from_pretrained(path)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package(tmp_path, model, tokenizer, monkeypatch, package):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    with pytest.raises(InputError, match=rf"which needs {package}, which is not installed; pip install 'bora_pyro\[gguf\]'"):
        Backbone.from_pretrained(path)


def test_quantisation_is_refused(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, kind="Q8_0")
    with pytest.raises(
        InputError, match=r"quantization is '4bit', but base model .* is a GGUF file, whose weights are dequantised"
    ):
        Backbone.from_pretrained(path, quantization="4bit")


def test_layers_are_placed_by_a_device_map(tmp_path, model, tokenizer):
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer, kind="Q8_0")
    placed = Backbone.from_pretrained(path, device_map={"": "cpu"})
    assert torch.equal(logits(placed.model), logits(Backbone.from_pretrained(path).model))
