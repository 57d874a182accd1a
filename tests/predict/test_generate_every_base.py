"""Texts of a batch are those that each prompt gives alone and those that the base predicts, on bases of all kinds."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, LoRA, TaskData, fit, generate_side_by_side
from bora_pyro.backbone.generation import Generation
from bora_pyro.data import TokenSplit
from bora_pyro.predict.mixture_text import prompt_tokens
from tests.tiny_base import script

PROMPTS = ["w10 " * 9, "w40 w41", "w80 " * 5]
TASKS = ["ada", "bob"]
PADDED = [
    "opt", "gpt2", "llama", "gpt_neox", "bloom", "mpt", "falcon", "gemma2", "mistral", "mamba", "mamba2", "jamba", "mixtral",
    "qwen3_next", "lfm2", "deepseek_v3", "gpt_oss", "biogpt", "xglm", "ctrl",
]  # fmt: skip
OTHER_WAYS = {
    # positions are numbered from the first token, padding or not, or padding is read into a state
    "bart": Generation("equal"),
    "blenderbot": Generation("equal"),
    "recurrent_gemma": Generation("equal"),
    # the cache is wrong for several rows, or for all
    "rwkv": Generation("single"),
    "zamba2": Generation("padded", cached=False),
    "xlstm": Generation("equal", cached=False),
}
WAYS = {name: Generation() for name in PADDED} | OTHER_WAYS


@cache
def fitted(model_type):
    tiny = script("tiny_architectures")
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(5, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in (7, 4, 6, 5)]
    split = TokenSplit.from_documents(documents, task=[0, 1, 0, 1], num_tasks=2, pad_token_id=tiny.PAD)
    model = BoRA(Backbone(tiny.tiny_model(model_type), tiny.tiny_tokenizer()), 2, adapter=LoRA(rank=2))
    return fit(model, TaskData(TASKS, split, split, split), epochs=2, learning_rate=0.1)


@pytest.mark.parametrize("model_type", WAYS)
def test_a_batch_writes_what_each_prompt_gives_alone(model_type):
    fit_ = fitted(model_type)
    together = generate_side_by_side(fit_, PROMPTS, [*TASKS, "base"], max_new_tokens=5)
    theta, _ = fit_.weights()
    backbone = fit_.model.backbone
    for text in together:
        [alone] = generate_side_by_side(fit_, text.prompt, [text.task], max_new_tokens=5)
        assert text.tokens.tolist() == alone.tokens.tolist()
        torch.testing.assert_close(text.log_prob, alone.log_prob, rtol=1e-3, atol=1e-3)
        # one pass of the whole text, without padding or cache
        change = None if text.task == "base" else fit_.model.change(theta, torch.tensor([TASKS.index(text.task)]))
        ids = torch.cat([prompt_tokens(backbone, backbone.tokenizer, text.prompt), text.tokens])[None]
        expected = backbone.logits(ids, change)[0, -1 - len(text.tokens) : -1].log_softmax(-1)
        torch.testing.assert_close(text.log_prob, expected.gather(1, text.tokens[:, None])[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", WAYS)
def test_the_way_to_write(model_type):
    assert fitted(model_type).model.backbone.generation == WAYS[model_type]


@pytest.mark.parametrize(
    ("model_type", "notes"),
    [
        ("llama", []),
        ("bart", ["a BartForCausalLM, predicts otherwise behind padding; prompts of one length are written together"]),
        ("rwkv", ["a RwkvForCausalLM, predicts otherwise in a batch; texts are written one by one"]),
        ("zamba2", ["a Zamba2ForCausalLM, predicts otherwise with its cache; texts are written without it, which is slow"]),
    ],
)
def test_a_note_says_how_texts_are_written(model_type, notes, caplog):
    with caplog.at_level(logging.WARNING):
        generate_side_by_side(fitted(model_type), PROMPTS, TASKS, max_new_tokens=1)
    assert [record.getMessage() for record in caplog.records] == [f"note: the base, {note}" for note in notes]


def test_no_note_where_no_prompt_is_padded(caplog):
    with caplog.at_level(logging.WARNING):
        generate_side_by_side(fitted("bart"), PROMPTS[:1], TASKS, max_new_tokens=1)
    assert not caplog.records


def test_a_cache_that_is_wrong_only_for_long_texts_is_found(caplog):
    # its full pass reads all tokens, its cache those of a window
    with caplog.at_level(logging.WARNING):
        texts = generate_side_by_side(fitted("moshi"), PROMPTS, TASKS, max_new_tokens=5)
    assert fitted("moshi").model.backbone.generation == Generation()
    assert "predicts otherwise with its cache" in caplog.records[-1].getMessage()
    theta, _ = fitted("moshi").weights()
    backbone = fitted("moshi").model.backbone
    for text in texts:
        ids = torch.cat([prompt_tokens(backbone, backbone.tokenizer, text.prompt), text.tokens])[None]
        change = fitted("moshi").model.change(theta, torch.tensor([TASKS.index(text.task)]))
        expected = backbone.logits(ids, change)[0, -1 - len(text.tokens) : -1].log_softmax(-1)
        torch.testing.assert_close(text.log_prob, expected.gather(1, text.tokens[:, None])[:, 0], rtol=1e-3, atol=1e-3)


def with_cache_fault(forward, *, fails):
    """A model whose predictions with a cache are others, or that has none."""

    def changed(**options):
        output = forward(**options)
        if options.get("past_key_values") is not None and fails:
            raise ValueError("no cache\nhere")
        if options.get("past_key_values") is not None:
            output.logits = output.logits.roll(1, -1)
        return output

    return changed


@pytest.mark.parametrize("fails", [True, False])
def test_a_wrong_cache_is_not_used(fails, caplog):
    tiny = script("tiny_architectures")
    model = tiny.tiny_model("llama")
    model.forward = with_cache_fault(model.forward, fails=fails)
    backbone = Backbone(model, tiny.tiny_tokenizer())
    assert backbone.generation == Generation("padded", cached=False)


def test_a_base_that_does_not_write_what_it_predicts_is_refused():
    tiny = script("tiny_architectures")
    model = tiny.tiny_model("llama")

    def generate(**options):
        raise RuntimeError("not\nhere")

    model.generate = generate
    with pytest.raises(
        InputError, match=r"a LlamaForCausalLM, cannot write texts .* as it predicts them \(RuntimeError: not here\)"
    ):
        _ = Backbone(model).generation
