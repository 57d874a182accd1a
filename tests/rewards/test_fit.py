"""Fits from rewards on a tiny model: what the steps are made of, what a fit changes, and that it resumes bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from bora_pyro import Backbone, BoRA, HierarchicalNormal, InputError, LearnedPrecision, LoRA, load_tasks, table
from bora_pyro.guides import make_parameters
from bora_pyro.inference.fit import FitStopped
from bora_pyro.likelihoods.policy import standardised
from bora_pyro.likelihoods.reward import token_log_probs, written_tokens
from bora_pyro.rewards import Length, PromptTexts, RewardFit, RewardOptions, reward_fit
from bora_pyro.rewards.prompts import prompt_ids
from tests.tiny import tiny_adapter
from tests.tiny_base import save_base

ROWS = [{"task": task, "text": f"{word} {n}"} for task, word in (("Ada", "red green"), ("Bo", "one")) for n in range(6)]
FEW = {"epochs": 2, "samples": 4, "prompts_per_step": 4, "new_tokens": 5, "validation_samples": 2, "learning_rate": 0.03}
EARLY = set("abcdefghijklm")


def early(prompt, text, task):
    """The share of the letters of a text that are in the first half of the alphabet."""
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return sum(letter in EARLY for letter in letters) / max(len(letters), 1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return Backbone.from_pretrained(save_base(tmp_path_factory.mktemp("base")), targets=["v_proj", "fc2"])


@pytest.fixture(scope="module")
def data(backbone):
    return load_tasks(table(ROWS), backbone.tokenizer, max_tokens=16)


def bora(backbone, **options):
    return BoRA(backbone, 2, **({"adapter": LoRA(rank=2), "prior": HierarchicalNormal(tau=1.0)} | options))


def far_sites(model, scale=0.5):
    """Sites at which the tasks' adapters are far from each other."""
    generator = torch.Generator().manual_seed(0)
    theta = {name: scale * torch.randn((2, *start.shape), generator=generator) for name, start in model.starts.items()}
    return model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()})


def begun(model, data, reward=early, **changes):
    """A fit whose guide has its parameters, before its first step."""
    plan = RewardFit.of(model, data, reward, RewardOptions(**(FEW | changes)), sites=far_sites(model))
    make_parameters(plan.guide, plan.model)
    return plan


def test_each_text_is_written_by_the_adapter_of_its_task(backbone, data):
    model = bora(backbone)
    plan = begun(model, data, prompts_per_step=100, new_tokens=4)
    [rollout] = plan.rollouts.step(0, 0)
    assert sorted(rollout.task.unique().tolist()) == [0, 1]
    theta, written = plan.rollouts.weights(), written_tokens(rollout)
    for row in range(len(rollout.task)):
        length = int(rollout.attention_mask[row].sum())
        change = model.change(theta, rollout.task[row : row + 1])
        with torch.no_grad():  # the row alone, without padding, the softmax written out
            log_p = backbone.logits(rollout.input_ids[row : row + 1, :length], change)[0].log_softmax(-1)
        expected = log_p[:-1].gather(1, rollout.input_ids[row, 1:length, None])[:, 0]
        found = rollout.sampled_log_prob[row, : length - 1]
        chosen = written[row, : length - 1]
        torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-4, atol=1e-5)
        assert not rollout.sampled_log_prob[row, length - 1 :].any()
        assert not found[~chosen].any()


def test_the_first_step_has_ratio_1_and_the_advantages_of_the_groups(backbone, data):
    seen = []

    def reward(prompt, text, task):
        seen.append((prompt, text, task))
        return len(text)

    plan = begun(bora(backbone), data, reward, token_budget=40)
    batches = plan.rollouts.step(0, 0)
    assert len(batches) > 1
    for batch in batches:
        for part in batch.parts(backbone.pass_tokens):
            with torch.no_grad():
                assert torch.equal(token_log_probs(plan.model, plan.rollouts.weights(), part), part.sampled_log_prob)
    rewards = torch.tensor([float(len(text)) for _, text, _ in seen]).view(-1, 4)
    advantage = torch.cat([batch.advantage for batch in batches])
    torch.testing.assert_close(advantage, standardised(rewards).flatten())
    assert sum(batch.share for batch in batches) == pytest.approx(1.0)
    assert {batch.scale for batch in batches} == {2.0 * len(batches)}  # two rollouts an epoch
    # the texts are what the labels say, without the end mark
    labels = [label[label >= 0] for batch in batches for label in batch.labels]
    assert [backbone.tokenizer.decode(ids, skip_special_tokens=True) for ids in labels] == [text for _, text, _ in seen]


def test_an_epoch_draws_every_prompt_once(backbone, data):
    seen = []
    plan = begun(bora(backbone), data, lambda prompt, text, task: seen.append((task, prompt)) or 0.0, prompts_per_step=3)
    steps = plan.rollouts.steps(0)
    for number in range(len(steps)):
        steps[number]
    assert len(steps) == math.ceil(len(data.train) / 3)
    assert len(seen) == 4 * len(data.train)
    assert len(set(seen)) == len(data.train)
    order = seen[::4]
    seen.clear()
    again = begun(bora(backbone), data, lambda prompt, text, task: seen.append((task, prompt)) or 0.0, prompts_per_step=3)
    for number in range(len(steps)):
        again.rollouts.steps(0)[number]
    assert seen[::4] == order


def test_a_text_ends_at_its_end_token(backbone, data):
    options = RewardOptions(samples=64, prompts_per_step=100, new_tokens=20, token_budget=10**6)
    plan = RewardFit.of(bora(backbone), data, early, options)  # at the start, where all tokens are about as probable
    make_parameters(plan.guide, plan.model)
    end = backbone.tokenizer.eos_token_id
    [batch] = plan.rollouts.step(0, 0)
    ended = 0
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        written = labels[labels >= 0].tolist()
        assert 1 <= len(written) <= 20
        assert end not in written[:-1]
        ended += written[-1] == end
        place = int((labels >= 0).nonzero()[0])
        assert ids[place : place + len(written)].tolist() == written
    assert ended  # some of the texts have ended early


def test_a_shift_and_a_scale_of_the_rewards_change_no_advantage(backbone, data):
    one, other = (begun(bora(backbone), data, f) for f in (early, lambda *text: 3 * early(*text) + 7))
    [first], [second] = one.rollouts.step(0, 0), other.rollouts.step(0, 0)
    assert torch.equal(first.input_ids, second.input_ids)
    assert first.advantage.any()
    torch.testing.assert_close(first.advantage, second.advantage, rtol=1e-5, atol=1e-5)


def test_equal_rewards_move_nothing(backbone, data):
    model = bora(backbone)
    fitted = reward_fit(model, data, lambda prompt, text, task: 0.1, **(FEW | {"patience": 0}))
    for name, value in fitted.weights()[0].items():
        assert torch.equal(value, model.starts[name].expand(2, *value.shape[1:]))
    assert [entry["distance"] for entry in fitted.history] == [0.0, 0.0]


def test_a_fit_raises_the_probability_of_what_is_rewarded(backbone, data):
    model = bora(backbone)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    wanted = torch.tensor([early("", backbone.tokenizer.decode([n]), "") for n in range(len(backbone.tokenizer))])

    def probability(weights):
        """The mean probability that the first token behind a training prompt is rewarded, by task."""
        total = torch.zeros(2)
        for n, d in enumerate(data.train.task.tolist()):
            ids = prompt_ids(data.train.document(n), backbone.tokenizer)[None]
            change = None if weights is None else model.change(weights, torch.tensor([d]))
            with torch.no_grad():
                total[d] += (backbone.logits(ids, change)[0, -1].softmax(-1) * (wanted > 0)).sum()
        return total / torch.tensor(data.train.documents_per_task)

    changes = {"epochs": 15, "samples": 32, "prompts_per_step": 2, "new_tokens": 1, "validation_samples": 64, "patience": 0}
    fitted = reward_fit(model, data, lambda prompt, text, task: early(prompt, text, task) > 0, **(FEW | changes))
    assert bool((probability(fitted.weights()[0]) > 1.25 * probability(None)).all())
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name])
    report = fitted.history[-1]
    assert report["rewards"].keys() == {"Ada", "Bo"}
    assert report["kl"] > 0
    assert report["distance"] > 0
    best = fitted.history[fitted.best_epoch - 1]["validation_reward"]
    assert best == max(entry["validation_reward"] for entry in fitted.history)


class Stop:
    """Asks for a stop after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self):
        self.steps -= 1
        return self.steps == 0


@pytest.mark.parametrize("changes", [{}, {"baseline": "buffer", "buffer_least": 6, "inner_steps": 2}], ids=["group", "buffer"])
def test_a_resumed_fit_is_the_uninterrupted_one(backbone, data, changes, tmp_path):
    options = FEW | {"patience": 0, "average": True} | changes
    straight = reward_fit(bora(backbone), data, early, **options)
    with pytest.raises(FitStopped, match="stopped after step 3 of"):  # within the second epoch, or between two inner steps
        reward_fit(bora(backbone), data, early, checkpoints=tmp_path, stop=Stop(3), **options)
    resumed = reward_fit(bora(backbone), data, early, checkpoints=tmp_path, **options)
    for name, value in straight.sites().items():
        assert torch.equal(resumed.sites()[name], value), name
    times = ("seconds", "training_tokens_per_second")
    without = [
        [{key: value for key, value in entry.items() if key not in times} for entry in f.history] for f in (straight, resumed)
    ]
    assert without[0] == without[1]


def test_a_fit_begins_at_given_sites(backbone, data):
    model = bora(backbone)
    sites = far_sites(model)
    fitted = reward_fit(model, data, early, sites=sites, **(FEW | {"epochs": 1, "learning_rate": 1e-12, "deviation_reach": 0.0}))
    expected, _ = model.weights_given(sites)
    for name, value in fitted.weights()[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "is None; a reward is a finite number"),
        ("much", "is 'much'; a reward is a finite number"),
        (float("nan"), "is nan; a reward is a finite number"),
        (-math.inf, "is -inf; a reward is a finite number"),
        (10**400, "a reward is a finite number"),
        (1j, "is 1j; a reward is a finite number"),
        (torch.tensor(1.0), "is tensor(1.); a reward is a finite number"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_refused(backbone, data, found, words):
    with pytest.raises(InputError) as refused:
        reward_fit(bora(backbone), data, lambda prompt, text, task: found if task == "Bo" else 0.0, **FEW)
    message = str(refused.value)
    assert words in message
    assert message.startswith("the reward of a text of task 'Bo' behind the prompt 'one ")


def test_an_error_of_the_reward_names_prompt_and_task(backbone, data):
    with pytest.raises(InputError, match=r"of task '(Ada|Bo)' behind the prompt .* cannot be computed \(KeyError: 'answer'\)"):
        reward_fit(bora(backbone), data, lambda prompt, text, task: {}["answer"], **FEW)


def test_what_a_fit_from_rewards_cannot_use(backbone, data):
    with pytest.raises(InputError, match="the prior learns tau from held-out texts"):
        reward_fit(bora(backbone, prior=LearnedPrecision()), data, Length(), **FEW)
    with pytest.raises(InputError, match="drops inputs in a step and not where texts are written"):
        reward_fit(bora(backbone, adapter=tiny_adapter("lora_dropout", dropout=0.5)), data, Length(), **FEW)
    rows = [{"task": row["task"], "question": row["text"], "answer": " yes"} for row in ROWS]
    columns = {"prompt_column": "question", "completion_column": "answer", "max_tokens": 16}
    with pytest.raises(InputError, match="needs prompts alone"):
        reward_fit(bora(backbone), load_tasks(table(rows), backbone.tokenizer, **columns), Length(), **FEW)
    long = load_tasks(table([{**row, "text": row["text"] + " red" * 60} for row in ROWS]), backbone.tokenizer)
    with pytest.raises(InputError, match="and the base reads 32, the new ones included"):
        reward_fit(bora(backbone), long, Length(), **FEW)
    with pytest.raises(InputError, match="there is no option 'sample'; did you mean 'samples'"):
        reward_fit(bora(backbone), data, Length(), sample=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 1}, "samples is 1 with baseline group"),
        ({"baseline": "mean"}, "baseline is 'mean'; allowed: group, buffer"),
        ({"baseline": "buffer", "samples": 1, "prompts_per_step": 1}, "samples and prompts_per_step are 1"),
        ({"buffer_size": 8}, "buffer_least is 16, and buffer_size is 8; give 8 or less"),
        ({"clip": 0.0}, "clip is 0.0; give a finite number above 0"),
        ({"kl_weight": -0.1}, "kl_weight is -0.1"),
        ({"new_tokens": 0}, "new_tokens is 0; give a whole number from 1 up"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"warmup": 2.0}, "warmup is 2.0"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(InputError, match=words):
        RewardOptions(**changes).validate()


def test_prompts_are_found_by_their_tokens(backbone, data):
    prompts = PromptTexts.of(table(ROWS), backbone, data, max_tokens=16)
    texts = {(row["task"], row["text"]) for row in ROWS}
    found = set()
    for split in (data.train, data.validation, data.test):
        for n, d in enumerate(split.task.tolist()):
            found.add((data.tasks[d], prompts.text(d, prompt_ids(split.document(n), backbone.tokenizer))))
    assert found == texts
    with pytest.raises(InputError, match="has more than 4 tokens, its end mark included, and would be cut; raise max_tokens"):
        PromptTexts.of(table(ROWS), backbone, load_tasks(table(ROWS), backbone.tokenizer, max_tokens=4), max_tokens=4)
    with pytest.raises(InputError, match="is not in the table; give the table that load_tasks has read"):
        PromptTexts.of(table(ROWS[1:]), backbone, data, max_tokens=16)
