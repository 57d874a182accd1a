"""Adapters that are refused: what a folder may not hold, and bases that do not fit."""

from __future__ import annotations

import json
import struct
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_pyro import Backbone, InputError
from bora_pyro.exchange.load import HEADER_BYTES, load_peft, read_peft
from tests.exchange.peft_folder import CONFIG, KEY, TENSORS
from tests.tiny import (
    tiny_backbone,
    tiny_bora,
)


def config(**changes):
    def apply(folder):
        stored = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**stored, **changes}.items() if v is not ...}))

    return apply


def tensors(change):
    def apply(folder):
        state = load_file(folder / TENSORS)
        change(state)
        save_file(state, folder / TENSORS)

    return apply


def setting(key, make):
    return tensors(lambda state: state.update({key: make(state.get(key))}))


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def header_of(length):
    return content(TENSORS, struct.pack("<Q", length) + b"{}")


def cut(folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def pickled(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def linked_out(name):
    def apply(folder):
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return apply


def looping(folder):
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(folder / TENSORS)


def half(value):
    value = value.clone()
    value[0, 0] = float("nan")
    return value


PLAIN = "only plain LoRA and rsLoRA are read: {} must be off"
REFUSED = {
    "another method": (config(peft_type="IA3"), '*peft_type "IA3"; only LoRA adapters whose peft_type is "LORA" are read'),
    "no method": (config(peft_type=...), "*peft_type null; *"),
    "another task": (config(task_type="SEQ_CLS"), '*task_type "SEQ_CLS"; *'),
    "bias": (config(bias="lora_only"), '*bias "lora_only"; *'),
    "moved base": (config(init_lora_weights="pissa_niter_4"), '*init_lora_weights "pissa_niter_4"; *'),
    "DoRA": (config(use_dora=True), f"*use_dora true; {PLAIN.format('use_dora')}"),
    "whole modules": (config(modules_to_save=["lm_head"]), f'*modules_to_save ["lm_head"]; {PLAIN.format("modules_to_save")}'),
    "ranks": (config(rank_pattern={"q_proj": 4}), "*q_proj.lora_*of shape *2*, which does not fit r = 4"),
    "rank 0 of a layer": (config(rank_pattern={"q": 0}), '*rank_pattern with 0 for "q"; it is a whole number from 1 up'),
    "alpha 0 of a layer": (config(alpha_pattern={"q": 0}), '*alpha_pattern with 0 for "q"; it is a positive, finite number'),
    "ranks in a list": (config(rank_pattern=["q_proj"]), '*rank_pattern ["q_proj"]; it is a mapping of names of layers'),
    "a pattern to run": (config(alpha_pattern={"(a+)+b": 4}), '*with the pattern "(a+)+b", which is not run; write *'),
    "a long pattern": (config(rank_pattern={"." * 401: 2}), "*with the pattern *, which is not run*"),
    "many patterns": (config(rank_pattern={f"q{n}": 2 for n in range(4097)}), "*with 4097 names of layers; *"),
    "bias of B": (config(lora_bias=True), f"*lora_bias true; {PLAIN.format('lora_bias')}"),
    "tokens": (config(trainable_token_indices=[3]), f"*trainable_token_indices [[]3]; {PLAIN.format('trainable_token_indices')}"),
    "of the future": (config(use_magic={"a": 1}), f'*use_magic {{"a": 1}}; {PLAIN.format("use_magic")}'),
    "rank 0": (config(r=0), "*r 0; it is a whole number from 1 up"),
    "rank true": (config(r=True), "*r true; *"),
    "rank of a layer": (config(r=3), "*of shape (2, 32), which does not fit r = 3"),
    "alpha nothing": (config(lora_alpha=...), "*lora_alpha null; it is a positive, finite number"),
    "alpha infinite": (config(lora_alpha=float("inf")), "*lora_alpha Infinity; it is a positive, finite number"),
    "alpha text": (config(lora_alpha="3"), '*lora_alpha "3"; *'),
    "stabilised text": (config(use_rslora="no"), '*use_rslora "no"; it is true or false'),
    "targets": (config(target_modules={"a": 1}), "*target_modules * is a text or a list of texts"),
    "not selected": (config(target_modules=["v_proj"]), "*does not name *q_proj' among its target_modules*"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "{folder} has no adapter_config.json; *"),
    "config cut": (content(CONFIG, b"{"), "{folder}/adapter_config.json cannot be read (*); *"),
    "config deep": (content(CONFIG, b"[" * 100_000), "{folder}/adapter_config.json cannot be read (*); *"),
    "config bytes": (content(CONFIG, b"\xff\xfe"), "{folder}/adapter_config.json cannot be read (*); *"),
    "config list": (content(CONFIG, b"[]"), "{folder}/adapter_config.json holds no mapping; *"),
    "config huge": (content(CONFIG, b" " * (2**20 + 1)), "{folder}/adapter_config.json has 1048577 bytes; *"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "{folder} has no adapter_model.safetensors; *"),
    "pickle": (pickled, "{folder} has its weights as a pickle, which can run code and is never read; *"),
    "tensors cut": (cut, "{folder}/adapter_model.safetensors is damaged (*"),
    "tensors empty": (content(TENSORS, b""), "{folder}/adapter_model.safetensors is damaged*"),
    "header huge": (header_of(HEADER_BYTES + 1), "{folder}/adapter_model.safetensors is damaged: its header *"),
    "header longest": (header_of(2**64 - 1), "{folder}/adapter_model.safetensors is damaged: its header *"),
    "header beyond": (header_of(3), "{folder}/adapter_model.safetensors is damaged: its header is said to have 3 bytes, *"),
    "none": (tensors(dict.clear), "{folder}/adapter_model.safetensors holds no matrices"),
    "one alone": (tensors(lambda state: state.pop(KEY.format("B"))), "*has lora_A of * alone; *"),
    "another key": (setting("base_model.model.lm_head.weight", lambda _: torch.ones(2, 2)), '*head.weight", which is no LoRA *'),
    "magnitude": (
        setting(KEY.format("A").replace("lora_A.weight", "lora_magnitude_vector"), lambda _: torch.ones(2)), "*no LoRA matrix *"
    ),
    "embedding": (setting("base_model.model.wte.lora_embedding_A", lambda _: torch.ones(2, 2)), "*no LoRA matrix *"),
    "vector": (setting(KEY.format("A"), lambda _: torch.ones(2)), "*of shape (2,), which does not fit r = 2"),
    "empty": (setting(KEY.format("A"), lambda _: torch.ones(2, 0)), "*of shape (2, 0), which does not fit r = 2"),
    "whole numbers": (setting(KEY.format("A"), lambda value: value.long()), "*as I64; only F32, F16, BF16 are read"),
    "double": (setting(KEY.format("A"), lambda value: value.double()), "*as F64; only F32, F16, BF16 are read"),
    "NaN": (setting(KEY.format("B"), half), "*no finite number; *"),
    "infinite": (setting(KEY.format("B"), lambda value: value / 0.0), "*no finite number; *"),
    "tensors linked": (linked_out(TENSORS), "{folder}/adapter_model.safetensors is a link that leaves the folder; *"),
    "config linked": (linked_out(CONFIG), "{folder}/adapter_config.json is a link that leaves the folder; *"),
    "loop": (looping, "{folder}*adapter_model.safetensors*"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError) as caught:
        read_peft(folder)
    said = str(caught.value)
    assert "\n" not in said
    pattern = message.replace("{folder}", str(folder)).replace('["', '[[]"')
    assert fnmatchcase(said, pattern), said


def test_one_rank_for_all_layers_may_be_more_than_memory(folder, monkeypatch):
    size = sum(value.numel() * 4 for value in load_file(folder / TENSORS).values())
    monkeypatch.setattr("bora_pyro.exchange.load.largest_text", lambda: size)
    assert read_peft(folder).rank == 2
    change = {KEY.format("A"): torch.ones(3, 32), KEY.format("B"): torch.ones(32, 3)}
    tensors(lambda state: state.update(change))(folder)
    config(rank_pattern={"layers.1.self_attn.q_proj": 3})(folder)
    with pytest.raises(InputError, match=f"takes {size * 3 // 2} bytes with r = 3 in all layers"):
        read_peft(folder)


def test_a_link_within_the_folder_is_followed(folder):
    (folder / TENSORS).rename(folder / "blob")
    (folder / TENSORS).symlink_to("blob")
    assert read_peft(folder).rank == 2


def test_a_pickle_beside_the_tensors_is_left_alone(folder):
    (folder / "adapter_model.bin").write_bytes(b"no pickle at all")
    assert read_peft(folder).rank == 2


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"gone is no folder; give one with adapter_config\.json"):
        read_peft(tmp_path / "gone")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: tiny_backbone("llama"), "has no matrices of 'model.layers.0.self_attn.*it has those of "),
        (lambda: tiny_backbone("opt", targets=["q_proj", "v_proj", "fc1"]), "has no matrices of .*fc1', which is to be adapted"),
        (lambda: tiny_backbone("opt", targets=["q_proj"]), "has matrices of .*v_proj', which is no target layer of the base; "),
        (lambda: tiny_backbone("opt", num_hidden_layers=1), "has matrices of .*layers.1.* which is no target layer"),
        (lambda: tiny_backbone("opt", num_hidden_layers=3), "has no matrices of .*layers.2"),
        (
            lambda: tiny_backbone("opt", hidden_size=16, word_embed_proj_dim=16),
            "maps 32 features to 32 in .*, the base maps 16 to 16; give the base that the adapter belongs to",
        ),
    ],
)
def test_another_base_by_its_layers(folder, backbone, message):
    with pytest.raises(InputError, match=message):
        load_peft(folder, backbone())


def test_another_base_by_its_name(folder, tmp_path):
    config(base_model_name_or_path="facebook/opt-125m")(folder)
    model = tiny_bora("opt")
    model.backbone.model.config.name_or_path = "facebook/opt-350m"
    with pytest.raises(InputError, match="is an adapter of 'facebook/opt-125m', not of 'facebook/opt-350m'; load that base, or"):
        load_peft(folder, model)
    assert load_peft(folder, model, same_base=False)
    # one folder by two paths is one base, and so is the embedded one by its place
    config(base_model_name_or_path=str(tmp_path))(folder)
    model.backbone.model.config.name_or_path = str(tmp_path / "adapter" / "..")
    assert load_peft(folder, model)
    config(base_model_name_or_path="builtin:nano")(folder)
    model.backbone.model.config.name_or_path = Backbone.from_pretrained("builtin:nano").model.config.name_or_path
    assert load_peft(folder, model)


def test_a_base_whose_name_no_path_can_have(folder):
    model = tiny_bora("opt")
    model.backbone.model.config.name_or_path = "facebook/opt-350m"
    for name in ("x" * 5000, "a\0b"):
        config(base_model_name_or_path=name)(folder)
        with pytest.raises(InputError, match="is an adapter of"):
            load_peft(folder, model)
