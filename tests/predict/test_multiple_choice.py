"""Choices: log-likelihoods are those of the base class's own loss and PEFT's LoRA, the rest is arithmetic on them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bora_pyro import Backbone, BoRA, LoRA
from bora_pyro.diagnostics.calibration import by_task, calibration
from bora_pyro.errors import InputError
from bora_pyro.predict.multiple_choice import Question, choose
from tests.tiny import of_task, peft_model, random_weights
from tests.tiny_base import save_base

NAMES = ["ada", "bo"]
QUESTIONS = [
    Question("red green", (" blue", " north south east", " one"), correct=1, task="bo"),
    Question("1 one two three", (" four", " red"), correct=0, task="ada"),
    Question("x", ("y", "z", " south", "!?"), correct=3, task="bo"),
    Question("north east", (" south", " blue"), correct=0, task="bo"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return BoRA(Backbone.from_pretrained(base, targets=["v_proj", "fc2"]), 2, adapter=LoRA(rank=2, alpha=3.0))


def tokens(model, text):
    return model.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def of_row(model, weights, task, prompt, option):
    """log p(option | prompt) by the base class's own loss, for one unpadded row of token ids without its start."""
    lm = model.backbone.model if weights is None else peft_model(model, of_task(weights, NAMES.index(task)))
    row = torch.tensor([[model.backbone.tokenizer.bos_token_id, *prompt, *option]])
    labels = row.clone()
    labels[:, : len(prompt) + 1] = -100
    with torch.no_grad():
        return -lm(input_ids=row, labels=labels).loss.item() * len(option)


def number_of_tokens(model, question):
    return torch.tensor([float(len(tokens(model, option))) for option in question.options], dtype=torch.float64)


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_log_likelihoods_are_those_of_the_base_class_s_loss(model, token_budget):
    draws = [None, random_weights(model), random_weights(model, seed=1)]
    found = choose(model, QUESTIONS, draws, NAMES, token_budget=token_budget)
    assert found.log_likelihood.shape == (3, 4, 4)
    for n, question in enumerate(QUESTIONS):
        for k, weights in enumerate(draws):
            expected = [
                of_row(model, weights, question.task, tokens(model, question.prompt), tokens(model, option))
                for option in question.options
            ]
            assert found.log_likelihood[k, n, : len(expected)].tolist() == pytest.approx(expected, rel=1e-5)
        assert (found.log_likelihood[:, n, len(question.options) :] == -math.inf).all()
    assert len({len(tokens(model, option)) for option in QUESTIONS[0].options}) > 1
    assert found.task.tolist() == [1, 0, 1, 1]
    assert found.label.tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize("normalise", ["tokens", "none"])
def test_the_mixture_is_the_mean_of_the_draws_softmaxes(model, normalise):
    draws = [random_weights(model, scale=2.0, seed=seed) for seed in range(3)]
    found = choose(model, QUESTIONS, draws, NAMES, normalise=normalise)
    for n, question in enumerate(QUESTIONS):
        number, label = len(question.options), question.correct
        lengths = number_of_tokens(model, question) if normalise == "tokens" else 1.0
        p = (found.log_likelihood[:, n, :number] / lengths).softmax(-1)  # (draws, options)
        mean = p.mean(0)
        assert found.probabilities[n, :number].tolist() == pytest.approx(mean.tolist(), rel=1e-12)
        assert (found.probabilities[n, number:] == 0).all()
        assert found.answer[n] == mean.argmax()
        assert found.correct[n] == (mean.argmax() == label)
        assert found.confidence[n].item() == pytest.approx(mean.max().item(), rel=1e-12)
        assert found.log_prob[n].item() == pytest.approx(mean[label].log().item(), rel=1e-12)
        wanted = torch.eye(number, dtype=torch.float64)[label]
        assert found.brier[n].item() == pytest.approx((mean - wanted).square().sum().item(), rel=1e-9)
        assert found.total[n].item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-9)
        assert found.aleatoric[n].item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-9)
    assert (found.epistemic > 1e-4).all()


def test_the_two_normalisations_differ(model):
    tokenwise, whole = (choose(model, QUESTIONS, [None], NAMES, normalise=how) for how in ("tokens", "none"))
    assert torch.equal(tokenwise.log_likelihood, whole.log_likelihood)
    assert (tokenwise.probabilities - whole.probabilities).abs().max() > 0.1


def test_a_model_that_knows_nothing_has_no_preference(model):
    model.backbone.model.get_output_embeddings().weight.data.zero_()
    found = choose(model, QUESTIONS, [None, random_weights(model)], NAMES)
    vocabulary = model.backbone.model.config.vocab_size
    for n, question in enumerate(QUESTIONS):
        number = len(question.options)
        expected = (-math.log(vocabulary) * number_of_tokens(model, question)).tolist()
        assert found.log_likelihood[0, n, :number].tolist() == pytest.approx(expected, rel=1e-6)
        assert found.probabilities[n, :number].tolist() == pytest.approx([1 / number] * number, rel=1e-6)
        assert found.brier[n].item() == pytest.approx(1 - 1 / number, rel=1e-6)
        assert found.total[n].item() == pytest.approx(math.log(number), rel=1e-6)
        assert found.epistemic[n].item() == pytest.approx(0, abs=1e-9)


def test_draws_that_agree_have_no_epistemic_uncertainty(model):
    theta = random_weights(model)
    [alone, twice] = [choose(model, QUESTIONS, draws, NAMES) for draws in ([theta], [theta, theta])]
    assert torch.equal(alone.total, alone.aleatoric)
    assert twice.epistemic.abs().max() < 1e-12
    torch.testing.assert_close(alone.probabilities, twice.probabilities)


def test_the_task_s_own_adapter_answers(model):
    question, theta = QUESTIONS[0], random_weights(model)
    other = dataclasses.replace(question, task="ada")
    both = choose(model, [question, other], [theta], NAMES)
    swapped = choose(model, [question], [theta], NAMES[::-1])
    assert (both.log_likelihood[0, 0] - both.log_likelihood[0, 1]).abs().max() > 0.01
    torch.testing.assert_close(swapped.log_likelihood[0, 0], both.log_likelihood[0, 1])


def test_draws_may_be_a_list_a_generator_or_a_function(model):
    def generate():
        yield from (None, random_weights(model))

    results = [choose(model, QUESTIONS, draws, NAMES, token_budget=20) for draws in (list(generate()), generate(), generate)]
    for result in results:
        assert torch.equal(result.log_likelihood, results[0].log_likelihood)
        assert len(result.log_likelihood) == 2


def test_a_prompt_whose_tokens_do_not_begin_the_text_is_tokenised_apart(model):
    prompt, option = "one r", "ed"
    assert tokens(model, prompt + option)[: len(tokens(model, prompt))] != tokens(model, prompt)
    found = choose(model, [Question(prompt, (option, " blue"), correct=0, task="ada")], [None], NAMES)
    expected = [of_row(model, None, "ada", tokens(model, prompt), tokens(model, text)) for text in (option, " blue")]
    assert found.log_likelihood[0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_calibration_of_choices(model):
    found = choose(model, QUESTIONS, [None, random_weights(model)], NAMES)
    result = calibration(found)
    assert result.tokens == 4
    assert result.accuracy == found.correct.double().mean().item()
    assert result.nll == pytest.approx(-found.log_prob.mean().item(), rel=1e-12)
    assert by_task(found, NAMES)["tokens"].tolist() == [1, 3]


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt of a question is ''; give a text"),
        ({"task": None}, "task of a question is None; give a text"),
        ({"options": ("yes",)}, "1 options, 1 of them different, in the question 'Is it\\?'; give 2 or more"),
        ({"options": ("yes", "yes", "no")}, "3 options, 2 of them different"),
        ({"options": ("yes", "")}, "options is .'yes', ''. in the question 'Is it"),
        ({"options": "yes"}, "options is 'yes' in the question .* give a tuple"),
        ({"correct": 2}, "correct is 2 in the question 'Is it\\?'; its 2 options are numbered 0 to 1"),
        ({"correct": -1}, "correct is -1"),
        ({"correct": True}, "correct is True"),
    ],
)
def test_a_question_is_checked(change, message):
    with pytest.raises(InputError, match=message):
        Question(**{"prompt": "Is it?", "options": ("yes", "no"), "correct": 0, "task": "ada"} | change)


def test_options_may_be_given_as_a_list():
    assert Question("Is it?", ["yes", "no"], correct=0, task="ada").options == ("yes", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "token"}, "normalise is 'token'; it can be tokens or none; did you mean 'tokens'"),
        ({"questions": []}, "0 questions given"),
        ({"draws": []}, "0 draws given"),
        ({"tasks": ["ada"]}, "1 names of tasks given; the model has 2 tasks"),
        (
            {"tasks": ["ada", "boo"]},
            r"question 0 \('red green'\) is of the task 'bo'; the .* ada, boo; did you mean 'boo'",
        ),
        (
            {"questions": [QUESTIONS[0], Question("red\n" * 20, (" blue", " one"), correct=0, task="ada")]},
            r"question 1 \('red\\n.*…'\) has \d+ tokens .*; the base model reads 32 at most, shorten it by \d+",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(model, options, message):
    with pytest.raises(InputError, match=message) as caught:
        choose(model, **{"questions": QUESTIONS, "draws": [None], "tasks": NAMES} | options)
    assert "\n" not in str(caught.value)


def test_a_context_is_used_to_its_last_token(model):
    context, prompt = model.backbone.context, "x"
    longest = context - 1 - len(tokens(model, prompt))
    question = Question(prompt, ("!" * longest, " one"), correct=0, task="ada")
    assert len(tokens(model, question.options[0])) == longest
    assert choose(model, [question], [None], NAMES).probabilities.isfinite().all()
    with pytest.raises(InputError, match=r"shorten it by 1$"):
        choose(model, [dataclasses.replace(question, options=("!" * (longest + 1), " one"))], [None], NAMES)


def test_a_backbone_without_a_tokenizer_is_told(model):
    model.backbone.tokenizer = None
    with pytest.raises(InputError, match="the backbone has no tokenizer"):
        choose(model, QUESTIONS, [None], NAMES)
