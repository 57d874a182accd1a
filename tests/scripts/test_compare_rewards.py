"""The comparison of rewards: its tasks and prompts, its table, and what is refused."""

from __future__ import annotations

import pandas as pd
import pytest

from bora_pyro import Backbone, InputError, load_tasks, table
from tests.tiny_base import documents, line, save_base, script, write_table

comparison = script("compare_rewards")
tasks = script("reward_tasks")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a quick table."""
    folder = tmp_path_factory.mktemp("rewards")
    return {
        "data": write_table(folder / "documents.csv", documents(number=12)), "base_model": save_base(folder / "base"),
        "targets": "v_proj,fc2", "rank": 2, "words": "2,3", "max_tokens": 32, "prompt_tokens": 4, "new_tokens": 4, "samples": 2,
        "prompts_per_step": 4, "documents": 4, "held_out": 2, "epochs": 2, "text_epochs": 1, "test_samples": 2,
        "validation_samples": 1, "early": "0", "late": "1", "taus": "1", "tau": 1, "arms": "tau_1,composed,base", "rates": "0.1",
        "seeds": 1, "runs_dir": folder / "runs", "output": folder / "table.csv",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(options):
    """The table."""
    assert comparison.main(line(options)) == 0
    return pd.read_csv(options["output"])


def test_a_prompt_is_the_beginning_of_its_document_and_held_out_ones_are_new(options):
    tokenizer = Backbone.from_pretrained(options["base_model"]).tokenizer
    # every second document of a task begins like all others
    rows = [
        {"task": task, "text": f"red green {n}" if n % 2 else f"{first + n} blue grey"}
        for task, first in (("b", 100), ("a", 0))
        for n in range(40)
    ]
    data = load_tasks(table([*rows, *({"task": "c", "text": f"{n} blue"} for n in range(10))]), tokenizer, max_tokens=32)
    found = tasks.RewardTables.of(data, tokenizer, [3, 5], prompt_tokens=3, documents=3, held_out=9)
    assert set(found.prompts.task) == {"a (3 words)", "b (5 words)"}  # c has fewer documents
    assert len(found.documents) == len(found.prompts)
    for (_, document), (_, prompt) in zip(found.documents.iterrows(), found.prompts.iterrows(), strict=True):
        assert document.text.startswith(prompt.prompt)
        assert len(document.text) > len(prompt.prompt)
        assert (document.task, document.split) == (prompt.task, prompt.split)
    of = {name: found.prompts[found.prompts.split == name] for name in ("train", "validation", "test")}
    assert of["train"].groupby("task").size().to_dict() == {"a (3 words)": 3, "b (5 words)": 3}
    seen = set(of["train"].prompt)
    for name in ("validation", "test"):
        assert not seen & set(of[name].prompt)
        assert of[name].prompt.is_unique
    assert found.left_out > 0


def test_too_many_targets_are_refused(options):
    tokenizer = Backbone.from_pretrained(options["base_model"]).tokenizer
    data = load_tasks(options["data"], tokenizer, max_tokens=32)
    with pytest.raises(InputError, match="words has 4 targets, and the documents have 3 tasks"):
        tasks.RewardTables.of(data, tokenizer, [1, 2, 3, 4], prompt_tokens=2, documents=3, held_out=3)
    with pytest.raises(InputError, match="has no train document of more than 99 tokens"):
        tasks.RewardTables.of(data, tokenizer, [1, 2], prompt_tokens=99, documents=3, held_out=3)


def test_the_table(options, made, capsys):
    assert list(made) == comparison.COLUMNS
    rows = made.set_index("arm")
    assert [*rows.index] == ["base", "tau_1", "early", "text_late", "composed"]  # with those that composed needs
    assert rows.kl["base"] == 0
    assert rows.validation_reward.notna().to_dict() == {name: name in ("tau_1", "early") for name in rows.index}
    for name in ("tau_1", "early"):
        assert [float(number) for number in rows.rollouts[name].split()] == [16, 32]  # 2 tasks x 4 prompts x 2 texts
        assert len(rows.train_rewards[name].split()) == len(rows.kls[name].split()) == 2
    for row in rows.itertuples():
        by_task = [float(number) for number in row.task_rewards.split()]
        assert len(by_task) == 2
        assert row.test_reward == pytest.approx(sum(by_task) / 2, abs=1e-4)  # two test prompts a task
        assert 1 <= row.tokens <= 4
        assert row.entropy > 0
    assert rows.documents_digest.nunique() == 1
    before = options["output"].read_bytes()
    assert comparison.main(line(options)) == 0
    assert options["output"].read_bytes() == before
    assert "| composed | – |" in capsys.readouterr().out


def test_the_composition_has_the_layers_of_both(options, made):
    [folder] = options["runs_dir"].glob("*/seed-0")
    runs = {
        name: comparison.load_run(folder / name, device="cpu").fitted for name in ("composed", "early-lr0.1", "text_late-lr0.1")
    }
    theta = {name: fitted.weights()[0] for name, fitted in runs.items()}
    for name, value in theta["composed"].items():
        for block, run in enumerate(("early-lr0.1", "text_late-lr0.1")):
            assert value[:, block].equal(theta[run][name][:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "has rows with epochs 2 instead of 3"),
        ({"words": "2,4"}, "has rows with words ['2', '3'] instead of ['2', '4']"),
        ({"words": "2,many"}, "words has 'many'; give whole numbers from 1 up"),
        ({"words": "2"}, "words has 1 target; give two or more"),
        ({"taus": "inf"}, "inf"),
        ({"arms": "pooling"}, "arm 'pooling' is not known"),
        ({"rates": "fast"}, "rates has fast"),
    ],
)
def test_bad_input(options, made, changes, message, capsys):
    assert comparison.main(line(options | changes)) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert message in error
