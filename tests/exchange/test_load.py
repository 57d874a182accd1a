"""From PEFT folders to latents: bit for bit from our own, with the same logits from PEFT's, and what is refused."""

from __future__ import annotations

import json
import struct
from fnmatch import fnmatchcase

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bora_pyro import Backbone, BoRA, InputError, LoRA, save_peft
from bora_pyro.adapters import ADAPTERS
from bora_pyro.exchange.load import HEADER_BYTES, load_peft, read_peft
from tests.tiny import (
    ARCHITECTURES,
    loaded_peft,
    of_task,
    peft_warnings,
    random_ids,
    random_weights,
    tiny_backbone,
    tiny_bora,
    tiny_model,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_export_import_export(adapter, architecture, targets, tmp_path):
    model = tiny_bora(architecture, targets=targets, adapter=ADAPTERS[adapter](rank=2, alpha=3.5))
    weights = of_task(random_weights(model), 1)
    save_peft(tmp_path / "first", model, weights)
    again = load_peft(tmp_path / "first", model)
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    save_peft(tmp_path / "second", model, again)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def trained_by_peft(folder, architecture, **options):
    """A folder that PEFT wrote, of an adapter with random matrices, and its logits."""
    with peft_warnings():
        peft = get_peft_model(tiny_model(architecture), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **options)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    with torch.no_grad():
        return peft(input_ids=random_ids()).logits


BY_PEFT = {
    "list": ("opt", {"target_modules": ["q_proj", "v_proj"]}),
    "pattern": ("opt", {"target_modules": r".*\.layers\.\d+\.(self_attn\.k_proj|fc1)"}),
    "all": ("opt-350m", {"target_modules": "all-linear"}),
    "paths": ("llama", {"target_modules": [f"model.layers.{n}.mlp.down_proj" for n in range(2)]}),
    "fused, transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "all transposed": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "stabilised": ("qwen3", {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "some layers": ("opt", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "one layer": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 0}),
    "pattern of some": ("opt", {"target_modules": r".*\.layers\.0\.self_attn\.(q|v)_proj"}),
    "paths of some": ("opt", {"target_modules": ["layers.0.fc1", "layers.1.fc1", "layers.1.self_attn.q_proj"]}),
    "all but one": ("opt", {"target_modules": ["fc1"], "exclude_modules": ["model.decoder.layers.0.fc1"]}),
    "all but a pattern": ("opt", {"target_modules": ["fc1", "fc2"], "exclude_modules": r".*layers\.1\.fc2"}),
    "ranks": ("opt", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 1}}),
    "alphas": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 2, "v_proj": 9}},
    ),
    "ranks and alphas": (
        "gpt2",
        {
            "target_modules": "all-linear",
            "fan_in_fan_out": True,
            "rank_pattern": {"c_attn|h.1.mlp.c_fc": 4},
            "alpha_pattern": {"c_fc": 1, "h.0.attn.c_proj": 3},
        },
    ),
    "all of it": (
        "opt",
        {
            "target_modules": ["q_proj", "fc1"],
            "layers_to_transform": [0],
            "use_rslora": True,
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"q_proj": 7},
        },
    ),
    "narrow": ("llama", {"target_modules": ["k_proj", "v_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize(("architecture", "options"), BY_PEFT.values(), ids=BY_PEFT)
def test_adapters_by_peft_itself(architecture, options, tmp_path):
    expected = trained_by_peft(tmp_path, architecture, r=3, lora_alpha=5, **options)
    found = read_peft(tmp_path)
    backbone = tiny_backbone(architecture, targets=found.targets)
    weights = load_peft(tmp_path, backbone)
    model = BoRA(backbone, 2, adapter=LoRA(found.rank, found.alpha))
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in model.starts.items()}
    change = model.change({name: value[None] for name, value in weights.items()}, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(backbone.logits(random_ids(), change), expected, atol=1e-5, rtol=1e-5)
    assert found.scaling == pytest.approx(5 / 3**0.5 if options.get("use_rslora") else 5 / 3)


def test_another_scale_of_the_model_goes_into_b(tmp_path):
    trained_by_peft(tmp_path, "opt", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model, found = tiny_bora("opt", adapter=LoRA(rank=2, alpha=3.0)), read_peft(tmp_path)
    weights = load_peft(tmp_path, model)
    path = model.backbone.slots[0].paths[1]
    name = model.backbone.slots[0].name
    product = 1.5 * weights[f"{name}.lora_B"][1] @ weights[f"{name}.lora_A"][1]
    torch.testing.assert_close(product, 4 * found.factors[path]["lora_B"] @ found.factors[path]["lora_A"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(folder, dtype):
    state = {key: value.to(dtype) for key, value in load_file(folder / TENSORS).items()}
    save_file(state, folder / TENSORS)
    factors = read_peft(folder).factors["model.decoder.layers.1.self_attn.q_proj"]
    assert factors["lora_A"].dtype == torch.float32
    assert torch.equal(factors["lora_A"].to(dtype), state[KEY.format("A")])


@pytest.fixture
def folder(tmp_path):
    """An adapter of the tiny OPT, to damage."""
    model = tiny_bora("opt")
    save_peft(tmp_path / "adapter", model, of_task(random_weights(model), 0), base_model="")
    return tmp_path / "adapter"


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


def test_layers_that_are_not_adapted_are_noted(tmp_path, caplog):
    expected = trained_by_peft(tmp_path / "theirs", "opt", r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    model = tiny_bora("opt", targets=["q_proj", "v_proj"], adapter=LoRA(rank=2, alpha=8))
    weights = load_peft(tmp_path / "theirs", model)
    assert caplog.messages == [f"note: {tmp_path / 'theirs'} adapts 2 of 4 layers; the others stay as they are"]
    assert all(not value[0].any() and value[1].any() for value in weights.values())
    save_peft(tmp_path / "ours", model, weights)
    with torch.no_grad():
        logits = loaded_peft(tiny_model("opt"), tmp_path / "ours")(input_ids=random_ids()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


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


def test_an_adapter_that_cannot_have_these_matrices(folder):
    with pytest.raises(
        InputError, match=r"has the rank 2, which LoRA\(rank=4, alpha=4.0\) cannot have; give the model an adapter"
    ):
        load_peft(folder, tiny_bora("opt", adapter=LoRA(rank=4)))
    with pytest.raises(InputError, match="rank 2, which SharedPlusTaskLoRA"):
        load_peft(folder, tiny_bora("opt", adapter=ADAPTERS["lora_shared_plus_task"](rank=2)))
    with pytest.raises(InputError, match="is not the frozen one of FrozenALoRA"):
        load_peft(folder, tiny_bora("opt", adapter=ADAPTERS["lora_frozen_a"](rank=2)))
