"""Several tasks write in one batch what each writes alone, through transformers' cache."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, LoRA, fit, generate_side_by_side, load_tasks
from bora_pyro.files.slugs import GLOBAL_MEAN
from bora_pyro.predict.authors import BASE
from bora_pyro.predict.mixture_text import end_tokens, generate, prompt_tokens
from bora_pyro.runs.generate import COMMAND
from tests.tiny import hooks_left
from tests.tiny_base import documents, map_run, quick_fit, save_base

PROMPTS = ["3 red green", "one"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    backbone = Backbone.from_pretrained(save_base(tmp_path_factory.mktemp("base")), targets=["v_proj", "fc2"])
    data = load_tasks(documents(), backbone.tokenizer, max_tokens=32)
    return fit(BoRA(backbone, 3, adapter=LoRA(rank=4)), data, epochs=60, learning_rate=0.1, token_budget=256, patience=0)


def alone(fitted, prompt, task, **options):
    """The same text, token by token and without a cache."""
    theta, mean = fitted.weights()
    if task == BASE:
        return generate(fitted.model, prompt, draws=lambda: [None], task_index=0, **options)
    if task == GLOBAL_MEAN:
        theta = {name: value.expand(3, *value.shape) for name, value in mean.items()}
        return generate(fitted.model, prompt, draws=lambda: [theta], task_index=0, **options)
    return generate(fitted.model, prompt, draws=lambda: [theta], task_index=fitted.tasks.index(task), **options)


def test_a_batch_of_all_is_each_one_alone(fitted):
    tasks = ["Cleo", BASE, "Ada", GLOBAL_MEAN]
    written = generate_side_by_side(fitted, PROMPTS, tasks, max_new_tokens=8)
    assert [(text.prompt, text.task) for text in written] == [(prompt, task) for prompt in PROMPTS for task in tasks]
    for text in written:
        expected = alone(fitted, text.prompt, text.task, max_new_tokens=8)
        assert text.tokens.tolist() == expected.tokens.tolist()
        assert text.text == expected.text
        torch.testing.assert_close(text.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    assert len({text.text for text in written}) > 2
    assert hooks_left(fitted.model.backbone) == 0


def test_draws_follow_the_seed_and_differ_from_each_other(fitted):
    def texts(seed, **options):
        chosen = {"samples": 3, "temperature": 2.0, "seed": seed, "max_new_tokens": 6} | options
        return [text.text for text in generate_side_by_side(fitted, "3", ["Ada", "Cleo"], **chosen)]

    before = torch.get_rng_state()
    assert texts(1) == texts(1) != texts(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(texts(1))) > 3
    narrow = texts(1, top_p=1e-6)  # the most probable token alone
    assert narrow == [text for text in texts(0, temperature=0.0, samples=1) for _ in range(3)]


SETTINGS = {
    "repetition_penalty": 5.0, "num_beams": 3, "min_new_tokens": 8, "no_repeat_ngram_size": 1, "suppress_tokens": [5],
    "max_length": 4, "bad_words_ids": [[6]], "do_sample": True, "temperature": 9.0, "forced_eos_token_id": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_base_s_own_change_no_text(fitted, monkeypatch, name):
    model = fitted.model.backbone.model
    sampled = {"samples": 2, "temperature": 1.5, "seed": 4}
    expected = [generate_side_by_side(fitted, PROMPTS, ["Ada", BASE], max_new_tokens=8, **more) for more in ({}, sampled)]
    own = copy.deepcopy(model.generation_config)
    own.update(**{name: SETTINGS[name]})
    monkeypatch.setattr(model, "generation_config", own)
    found = [generate_side_by_side(fitted, PROMPTS, ["Ada", BASE], max_new_tokens=8, **more) for more in ({}, sampled)]
    assert [[text.tokens.tolist() for text in texts] for texts in found] == [
        [text.tokens.tolist() for text in texts] for texts in expected
    ]
    assert model.generation_config is own


@pytest.mark.parametrize("form", [lambda token: token, lambda token: [200, token]], ids=["one", "several"])
def test_a_text_ends_with_any_of_the_base_s_ends(fitted, monkeypatch, form):
    [long] = generate_side_by_side(fitted, "one", ["Cleo"], max_new_tokens=8)
    token, tokenizer = int(long.tokens[1]), fitted.model.backbone.tokenizer
    monkeypatch.setattr(fitted.model.backbone.model.generation_config, "eos_token_id", form(token))
    assert len(long.tokens) == 8
    expected = long.tokens[: 1 + long.tokens.tolist().index(token)].tolist()
    [short] = generate_side_by_side(fitted, "one", ["Cleo"], max_new_tokens=8)
    assert short.tokens.tolist() == alone(fitted, "one", "Cleo", max_new_tokens=8).tokens.tolist() == expected
    assert end_tokens(fitted.model.backbone, tokenizer) >= {token, tokenizer.eos_token_id}


def test_a_long_prompt_takes_no_room_from_a_short_one(fitted):
    prompts = [" ".join(["red"] * 27), "one", "one two"]
    lengths = [len(prompt_tokens(fitted.model.backbone, fitted.model.backbone.tokenizer, prompt)) for prompt in prompts]
    assert max(lengths) + 12 > 32 >= min(lengths) + 12
    written = generate_side_by_side(fitted, prompts, ["Cleo", "Ada"], max_new_tokens=12)
    assert [(text.prompt, text.task) for text in written] == [(prompt, task) for prompt in prompts for task in ("Cleo", "Ada")]
    for text in written:
        assert text.tokens.tolist() == alone(fitted, text.prompt, text.task, max_new_tokens=12).tokens.tolist()
    assert len({len(text.tokens) for text in written}) > 1


def test_names_of_those_who_write(fitted):
    asked = ["Ada", "ada", "borge-b", "Ada", "Θ", GLOBAL_MEAN, BASE]
    written = generate_side_by_side(fitted, ["", "3"], asked, max_new_tokens=2)
    assert [text.task for text in written] == ["Ada", "Børge B.", GLOBAL_MEAN, BASE] * 2
    for text in written:
        assert text.tokens.tolist() == alone(fitted, text.prompt, text.task, max_new_tokens=2).tokens.tolist()


def test_a_task_called_as_the_base_or_the_mean_is_the_task(fitted):
    renamed = dataclasses.replace(fitted, tasks=[BASE, GLOBAL_MEAN, "Θ"])
    asked = [BASE, GLOBAL_MEAN, "Θ", f"plain {BASE}", f"plain {GLOBAL_MEAN}"]
    written = generate_side_by_side(renamed, "one", asked, max_new_tokens=8)
    assert [text.task for text in written] == asked
    assert len({tuple(text.tokens.tolist()) for text in written}) >= 4
    for text, name in zip(written, [*fitted.tasks, BASE, GLOBAL_MEAN], strict=True):
        assert text.tokens.tolist() == alone(fitted, "one", name, max_new_tokens=8).tokens.tolist()


def test_a_text_ends_where_the_base_reads_no_more(fitted):
    [text] = generate_side_by_side(fitted, "3 red", ["Ada"], max_new_tokens=500)
    assert len(text.tokens) < 32
    assert len(text.log_prob) == len(text.tokens)


@pytest.mark.parametrize(
    ("prompts", "tasks", "options", "words"),
    [
        ([], ["Ada"], {}, "give a prompt and a task"),
        (["x"], [], {}, "give a prompt and a task"),
        (["x"], ["Adda"], {}, "task 'Adda' is not in this fit, which has 3; did you mean 'Ada'"),
        (["x"], ["Ada"], {"samples": 2}, "samples is 2 at temperature 0"),
        (["x"], ["Ada"], {"top_p": 0.0}, "top_p is 0.0"),
        (["x"], ["Ada"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["x"], ["Ada"], {"temperature": -1.0}, "temperature is -1.0"),
        (["red " * 60], ["Ada"], {}, "the base reads 32"),
        (["a\ud800"], ["Ada"], {}, "has half a surrogate pair"),
    ],
)
def test_bad_input(fitted, prompts, tasks, options, words):
    with pytest.raises(InputError, match=words) as caught:
        generate_side_by_side(fitted, prompts, tasks, **options)
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path, capsys, monkeypatch):
    options = quick_fit(tmp_path) | {"output_dir": tmp_path / "run", "epochs": 1}
    map_run(options)
    main, run = COMMAND.main, str(tmp_path / "run")
    chosen = [run, "--prompt", "one, two", "--task", "Ada", "--task", "Børge B.", "--max_new_tokens", "4"]
    monkeypatch.setenv("COLUMNS", "100")
    assert main(chosen) == 0
    out = capsys.readouterr().out
    assert out.index("Ada") < out.index("Børge B.") < out.index("one, two")
    assert main([*chosen, "--json"]) == 0
    records = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [record["task"] for record in records] == ["Ada", "Børge B."]
    assert all(record["prompt"] == "one, two" and record["perplexity"] >= 1 for record in records)
    monkeypatch.setenv("COLUMNS", "40")  # too narrow for two columns
    assert main(chosen) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("Ada", "Børge"))]) == 2
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*chosen, "--task", "ada"]) == 0  # named twice, and by its folder
    head, *_ = (row for row in capsys.readouterr().out.splitlines() if row.strip())
    assert head.split() == ["Ada", "Børge", "B."]
    assert main([run]) == 2
    assert capsys.readouterr().err.startswith("error: no prompt is given")
    assert main([run, "--prompt", "a\udcff"]) == 2
    error = capsys.readouterr().err
    assert "error: the prompt 'a\\udcff' has half a surrogate pair" in error
