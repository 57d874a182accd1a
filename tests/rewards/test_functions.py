"""Rewards of the library and those that a name stands for: values, and code that runs only where it is trusted."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from bora_pyro import Backbone, BoRA, Fitted, InputError, LoRA, map_guide
from bora_pyro.guides import make_parameters
from bora_pyro.rewards import ClassProbability, Length, LogLikelihood, RegexCount, checked_reward
from bora_pyro.rewards.named import named_reward
from tests.tiny_base import save_base


@pytest.mark.parametrize("found", [1, 1.0, True, np.float32(1.0), np.int64(1), np.bool_(True)])
def test_numbers_of_all_kinds_are_rewards(found):
    assert checked_reward(lambda prompt, text, task: found, "", "", "Ada") == 1.0


def test_a_log_likelihood_is_that_of_one_pass(tmp_path):
    backbone = Backbone.from_pretrained(save_base(tmp_path / "base"), targets=["v_proj"])
    model = BoRA(backbone, 2, adapter=LoRA(rank=2))
    theta = {name: torch.randn(2, *start.shape) for name, start in model.starts.items()}
    guide = map_guide(model, model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()}))
    make_parameters(guide, model)
    fitted = Fitted(model, guide, ["Ada", "Bo"])
    tokenizer = backbone.tokenizer
    head = [tokenizer.bos_token_id, *tokenizer("red", add_special_tokens=False)["input_ids"]]
    body = [*tokenizer(" one", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        change = model.change(fitted.weights()[0], torch.tensor([1]))
        log_p = backbone.logits(torch.tensor([head + body]), change)[0].log_softmax(-1)
    expected = log_p[len(head) - 1 : -1].gather(1, torch.tensor(body)[:, None]).mean()
    reward = LogLikelihood(fitted)
    assert reward("red", " one", "Bo") == pytest.approx(float(expected), rel=1e-4)
    assert reward("red", " one", "Ada") != pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(InputError, match="has no task 'Boo'; did you mean 'Bo'"):
        reward("red", " one", "Boo")


def test_a_classifier_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear, pipeline = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.pipeline")
    texts, labels = ["red green", "green blue", "one two", "two three"] * 3, ["colour", "colour", "number", "number"] * 3
    classifier = pipeline.make_pipeline(text.TfidfVectorizer(), linear.LogisticRegression()).fit(texts, labels)
    reward = ClassProbability(classifier, "number")
    assert reward("", "one two", "Ada") == pytest.approx(classifier.predict_proba(["one two"])[0, 1])
    assert reward("", "one two", "Ada") > 0.5 > reward("", "green", "Ada")
    assert ClassProbability(classifier, log=True)("", "one", "number") == pytest.approx(np.log(reward("", "one", "Ada")))
    with pytest.raises(InputError, match="the classifier has no class 'Ada'; it has colour, number"):
        ClassProbability(classifier)("", "one", "Ada")
    with pytest.raises(InputError, match="is no fitted classifier"):
        ClassProbability(object())


def test_names_of_the_library():
    assert named_reward("builtin:length", ["target=4"])("", "one two", "Ada") == Length(4)("", "one two", "Ada") == -2.0
    assert named_reward("builtin:regex", ["pattern=o.", "per_character=true"])("", "one", "Ada") == pytest.approx(1 / 3)
    assert RegexCount("a")("", "", "Ada") == 0.0


@pytest.mark.parametrize(
    ("name", "options", "trusted", "words"),
    [
        ("builtin:lenght", [], False, "reward is 'lenght'; allowed: length, regex; did you mean 'length'"),
        ("builtin:regex", [], False, "reward builtin:regex needs an option; give --reward_option pattern=..."),
        ("builtin:regex", ["pattern=("], False, "pattern '(' is no regular expression"),
        ("builtin:length", ["goal=3"], False, "reward length has no option 'goal'"),
        ("builtin:length", ["target=-1"], False, "target is -1; give a whole number from 0 up"),
        ("length", [], False, "reward is 'length'; give module:function, or builtin:length, builtin:regex"),
        ("trusted_rewards:score", [], False, "is code that would run on this machine; give --trust_reward_code true"),
        ("trusted_rewards:score", ["a=1"], True, "but reward 'trusted_rewards:score' is no built-in one"),
        ("trusted_rewards:scores", [], True, "has no 'scores'; did you mean 'score'"),
        ("trusted_rewards:NUMBER", [], True, "is 3; give a function (prompt, text, task) -> number"),
        ("no_such_module:score", [], True, "cannot be imported (ModuleNotFoundError"),
        ("broken_rewards:score", [], True, "cannot be imported (ZeroDivisionError"),
    ],
)
def test_names_that_are_refused(name, options, trusted, words, tmp_path, monkeypatch):
    (tmp_path / "trusted_rewards.py").write_text("NUMBER = 3\ndef score(prompt, text, task):\n    return len(text)\n")
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        with pytest.raises(InputError) as refused:
            named_reward(name, options, trusted=trusted)
        assert words in str(refused.value)
        if not trusted:
            assert "trusted_rewards" not in sys.modules  # nothing has run
        else:
            assert named_reward("trusted_rewards:score", trusted=True)("", "four", "Ada") == 4
    finally:
        sys.modules.pop("trusted_rewards", None)
