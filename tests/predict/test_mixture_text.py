"""Texts from one draw, the mean and a mixture, token by token against sums made by hand."""

from __future__ import annotations

import pytest
import torch

from bora_pyro import Backbone, BoRA, InputError, LoRA
from bora_pyro.guides import normal_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.mixture_text import generate, next_token
from bora_pyro.predict.posterior import Posterior
from tests.tiny import random_weights, tiny_bora
from tests.tiny_base import save_base

CONTEXT, TASK, PROMPT = 32, 1, "red green"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model with a tokenizer, and three draws whose texts vary; the third one's ends."""
    folder = save_base(tmp_path_factory.mktemp("base"), context=CONTEXT)
    model = BoRA(Backbone.from_pretrained(folder, targets=["v_proj", "fc2"]), 3, adapter=LoRA(rank=2))
    return model, [random_weights(model, scale=1.0, seed=seed) for seed in (1, 5, 13)]


def probabilities(model, ids, weights):
    """The base's own softmax behind ``ids``, (vocabulary,), under one task's adapter."""
    change = model.change({name: value[TASK][None] for name, value in weights.items()}, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        return model.backbone.logits(torch.tensor([ids]), change)[0, -1].softmax(-1)


def start(model, text=PROMPT):
    tokenizer = model.backbone.tokenizer
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def by_hand(model, draws, number):
    """The most probable token of the mean of the draws' probabilities, again and again."""
    ids, written = start(model), []
    while len(written) < number:
        token = int(torch.stack([probabilities(model, ids, weights) for weights in draws]).mean(0).argmax())
        written.append(token)
        ids.append(token)
        if token == model.backbone.tokenizer.eos_token_id:
            break
    return written


@pytest.mark.parametrize("chosen", [[0], [2], [0, 1, 2]], ids=str)
def test_temperature_0_takes_the_most_probable_token(case, chosen):
    model, draws = case
    draws = [draws[k] for k in chosen]
    written = generate(model, PROMPT, draws=lambda: draws, task_index=TASK, max_new_tokens=8)
    assert written.tokens.tolist() == by_hand(model, draws, 8)
    assert written.text == model.backbone.tokenizer.decode(written.tokens, skip_special_tokens=True)
    assert len(set(written.tokens.tolist())) > 2


def test_the_draws_and_their_mixture_write_different_texts(case):
    model, draws = case
    texts = [by_hand(model, chosen, 8) for chosen in ([draws[0]], [draws[1]], [draws[2]], draws)]
    assert len({*map(tuple, texts)}) == 4
    assert [len(text) < 8 for text in texts] == [False, False, True, False]


def test_a_mixture_is_the_mean_of_softmaxes(case):
    model, draws = case
    ids = start(model)
    p = torch.stack([probabilities(model, ids, weights) for weights in draws])
    log_p, epistemic = next_token(model, torch.tensor(ids), draws=lambda: iter(draws), task_index=TASK)
    torch.testing.assert_close(log_p.exp(), p.mean(0))
    expected = -(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(-1).mean()
    torch.testing.assert_close(epistemic, expected, rtol=1e-4, atol=1e-5)
    assert epistemic > 0.01


def test_a_mixture_of_one_draw_is_the_draw(case):
    model, draws = case
    one, repeated = (
        generate(model, PROMPT, draws=lambda n=n: [draws[0]] * n, task_index=TASK, max_new_tokens=6, temperature=1.0)
        for n in (1, 3)
    )
    assert one.tokens.tolist() == repeated.tokens.tolist()
    torch.testing.assert_close(one.log_prob, repeated.log_prob)
    assert one.epistemic.abs().max() == 0
    assert repeated.epistemic.abs().max() < 1e-5


def test_what_is_said_of_a_written_text_is_what_predictive_says_of_it(case):
    from bora_pyro.data import TokenSplit

    model, draws = case
    written = generate(model, PROMPT, draws=lambda: draws, task_index=TASK, max_new_tokens=10, temperature=1.5, seed=3)
    ids = start(model)
    split = TokenSplit.from_documents([[*ids, *written.tokens.tolist()]], task=[TASK], num_tasks=3)
    predicted = predictive(model, split, lambda: draws)
    torch.testing.assert_close(written.log_prob, predicted.log_prob[len(ids) - 1 :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written.epistemic, predicted.epistemic[len(ids) - 1 :], rtol=1e-4, atol=1e-5)


def test_an_empty_text_is_continued_from_the_start_token(case):
    model, draws = case
    options = {"draws": lambda: draws[:1], "task_index": TASK, "max_new_tokens": 4}
    written = generate(model, "", **options)
    assert written.tokens.tolist() == generate(model, [model.backbone.tokenizer.bos_token_id], **options).tokens.tolist()


def test_the_base_alone(case):
    model, _ = case
    written = generate(model, PROMPT, draws=lambda: [None], task_index=TASK, max_new_tokens=1)
    with torch.no_grad():
        logits = model.backbone.model(input_ids=torch.tensor([start(model)])).logits[0, -1]
    assert written.tokens.item() == int(logits.argmax())
    torch.testing.assert_close(written.log_prob[0], logits.log_softmax(-1).max())


def test_a_seed_makes_a_text_again(case):
    model, draws = case
    options = {"draws": lambda: draws, "task_index": TASK, "max_new_tokens": 12, "temperature": 1.0}
    before = torch.get_rng_state()
    texts = [tuple(generate(model, PROMPT, seed=seed, **options).tokens.tolist()) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_a_temperature_sharpens_the_mixture(case):
    model, draws = case
    ids = start(model)
    p = torch.stack([probabilities(model, ids, weights) for weights in draws]).mean(0) ** 2  # temperature 1/2
    options = {"draws": lambda: draws, "task_index": TASK, "max_new_tokens": 1}
    for seed in range(8):
        expected = torch.multinomial(p / p.sum(), 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(generate(model, ids, temperature=0.5, seed=seed, **options).tokens, expected)


def test_a_text_ends_with_its_document(case):
    model, draws = case
    written = generate(model, PROMPT, draws=lambda: [draws[2]], task_index=TASK, max_new_tokens=20)
    end = model.backbone.tokenizer.eos_token_id
    assert len(written.tokens) < 20
    assert [token == end for token in written.tokens.tolist()] == [False] * (len(written.tokens) - 1) + [True]
    assert "</s>" not in written.text


def test_a_text_ends_where_the_base_reads_no_more(case):
    model, draws = case
    long = [5] * (CONTEXT - 2)
    options = {"draws": lambda: draws, "task_index": TASK, "temperature": 1.0}
    assert len(generate(model, long, **options).tokens) <= 2
    with pytest.raises(InputError, match=rf"the prompt has {CONTEXT} tokens and the base reads {CONTEXT}, .* {CONTEXT - 1} tok"):
        generate(model, [5] * CONTEXT, **options)


def test_one_draw_is_held_at_a_time(case):
    model, _ = case
    alive, most = set(), 0

    class Counted(dict):
        def __del__(self):
            alive.discard(id(self))

    def draws():
        nonlocal most
        for seed in range(6):
            weights = Counted(random_weights(model, seed=seed))
            alive.add(id(weights))
            most = max(most, len(alive))
            yield weights
            del weights

    generate(model, PROMPT, draws=draws, task_index=TASK, max_new_tokens=2)
    # the one in use, and the one that is being made
    assert most <= 2


@pytest.fixture(scope="module")
def posterior(case):
    model, draws = case
    guide = normal_guide(model, model.sites_given(draws[0], {name: value[0] for name, value in draws[0].items()}), scale=0.5)
    from bora_pyro.data import TokenSplit

    split = TokenSplit.from_documents([[0, 5, 6]], task=[0], num_tasks=3)
    with torch.no_grad():
        guide(split.batches()[0])
    return Posterior(Fitted(model, guide, ["Ada", "Bo", "Cleo"]))


@pytest.mark.parametrize("how", ["mean", "draw", "mixture"])
def test_a_posterior_writes(posterior, how):
    draws = {
        "mean": [posterior.mean()],
        "draw": [posterior.draw(3)],
        "mixture": [posterior.draw(k) for k in range(4)],
    }[how]
    options = {"max_new_tokens": 6, "temperature": 0.9, "seed": 5}
    expected = generate(posterior.model, PROMPT, draws=lambda: draws, task_index=TASK, **options)
    found = posterior.generate(PROMPT, "Bo", how=how, draws=4, draw=3, **options)
    assert found.text == expected.text
    for name in ("tokens", "log_prob", "epistemic"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert bool((found.epistemic > 0).all()) == (how == "mixture")


BAD = {
    "task_index": ({"task_index": 3}, r"task_index is 3; give 0 to 2, nearest: 2"),
    "tokens": ({"max_new_tokens": 0}, r"max_new_tokens is 0; give a whole number from 1 up"),
    "temperature": ({"temperature": -1.0}, r"temperature is -1.0; give 0 for the most probable token, or a finite number"),
    "no draw": ({"draws": list}, r"0 draws given; a text needs 1 or more"),
    "empty": ({"prompt": []}, r"the prompt has the shape \(0,\); give one text"),
    "half": ({"prompt": "a\udcff"}, r"the prompt 'a\\udcff' has half a surrogate pair, '\\udcff'; write the whole character"),
    "two": ({"prompt": [[5], [6]]}, r"the prompt has the shape \(2, 1\); give one text"),
    "foreign": ({"prompt": [5, 10**6]}, r"the prompt has token ids from 5 to 1000000; give ids from 0 to"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(case, changes, message):
    model, draws = case
    options = {"prompt": PROMPT, "draws": lambda: draws, "task_index": TASK} | changes
    with pytest.raises(InputError, match=message):
        generate(model, options.pop("prompt"), **options)


def test_bad_input_of_a_posterior(posterior):
    with pytest.raises(InputError, match=r"how is 'mixtur'; allowed: mixture, mean, draw; did you mean 'mixture'\?"):
        posterior.generate(PROMPT, "Bo", how="mixtur")
    with pytest.raises(InputError, match=r"draws is 0; give a whole number from 1 up"):
        posterior.generate(PROMPT, "Bo", draws=0)
    with pytest.raises(InputError, match=r"task 'Boo' is not in this fit"):
        posterior.generate(PROMPT, "Boo")


def test_a_base_without_tokenizer():
    model = tiny_bora()
    with pytest.raises(InputError, match=r"the base has no tokenizer to read and write texts with; give Backbone one"):
        generate(model, [5], draws=lambda: [None], task_index=0)
