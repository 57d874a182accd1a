"""The command `reward-fit`: a run folder like any other, code that runs only if it is trusted, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import part_of
from bora_pyro.rewards import Length, PromptTexts, RewardOptions, reward_fit
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.reward_fit import RewardFitConfig
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, line, save_base

main = command_main("reward-fit")
PROMPTS = pd.DataFrame(
    [{"task": task, "prompt": f"{word} {n}"} for task, word in (("Ada", "red"), ("Børge B.", "one")) for n in range(10)]
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a quick fit, and its run folder."""
    folder = tmp_path_factory.mktemp("rewards")
    PROMPTS.to_csv(folder / "prompts.csv", index=False)
    options = {
        "prompts": folder / "prompts.csv", "base_model": save_base(folder / "base"), "targets": "v_proj,fc2", "rank": 2, "tau": 1,
        "max_tokens": 16, "new_tokens": 5, "samples": 4, "validation_samples": 4, "prompts_per_step": 4, "learning_rate": 0.1,
        "epochs": 3, "patience": 0, "threads": 1, "reward": "builtin:length", "reward_option": "target=3",
    }  # fmt: skip
    assert main(line(options | {"output_dir": folder / "run"})) == 0
    return options, folder / "run"


def test_the_folder_is_what_the_library_fits(given):
    options, folder = given
    config = parse_config(RewardFitConfig, line(options))
    model, data = build_run(config.map_fit, quiet=True)
    prompts = PromptTexts.of(config.prompts, model.backbone, data, text_column="prompt", max_tokens=16)
    expected = reward_fit(model, data, Length(3), part_of(config, RewardOptions), prompts=prompts)
    found = load_run(folder)
    assert found.reward_config.reward == "builtin:length"
    assert found.fitted.best_epoch == expected.best_epoch
    for name, value in expected.sites().items():
        assert torch.equal(found.fitted.sites()[name], value), name
    log = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert [entry["rewards"] for entry in log] == [entry["rewards"] for entry in expected.history]
    assert all(0 <= entry["clipped"] <= 1 and entry["kl"] >= 0 and entry["distance"] > 0 for entry in log)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    of_epochs = [entry["validation_reward"] for entry in log]
    about = metrics["reward"]
    assert about["validation_reward"] == max([about["validation_reward_before"], *of_epochs])
    assert about["validation_reward"] == pytest.approx(about["validation_reward_after"])
    assert found.fitted.evaluate(found.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    rows = [row["reward"] for row in metrics["tasks"].values()]
    for when in ("before", "after"):
        name = f"test_reward_{when}"
        total = sum(row["test_prompts"] * row[name] for row in rows) / sum(row["test_prompts"] for row in rows)
        assert about[name] == pytest.approx(total)
    written = load_file(folder / "adapters" / "borge-b" / "adapter_model.safetensors")
    theta, slot = found.fitted.weights()[0], found.fitted.model.backbone.slots[0]
    assert torch.equal(written[f"base_model.model.{slot.paths[0]}.lora_B.weight"], theta[f"{slot.name}.lora_B"][1, 0])


def test_other_commands_read_the_folder(given, tmp_path, capsys):
    _, folder = given
    assert command_main("generate")([str(folder), "--prompt", "red", "--task", "Ada", "--max_new_tokens", "2"]) == 0
    assert command_main("report")([str(folder), "--samples", "0"]) == 0, capsys.readouterr().err
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Options of the fit from rewards that are not the defaults" in page
    words = line({"output_dir": tmp_path / "exported"})
    assert command_main("export-adapters")([str(folder), *words]) == 0, capsys.readouterr().err
    capsys.readouterr()
    for command in ("posterior-fit", "route-fit"):
        assert command_main(command)([str(folder), "--output_dir", str(tmp_path / "new")]) == 2
        assert "fit from rewards" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_code_runs_only_if_it_is_trusted(given, tmp_path, monkeypatch, capsys):
    options, _ = given
    (tmp_path / "own_rewards_of_a_test.py").write_text(
        "from pathlib import Path\nPath('has_run').touch()\ndef score(prompt, text, task):\n    return len(prompt + task)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {name: value for name, value in options.items() if name != "reward_option"}
    own |= {"reward": "own_rewards_of_a_test:score", "epochs": 1, "output_dir": "run"}
    assert main(line(own)) == 2
    assert "is code that would run on this machine; give --trust_reward_code true" in capsys.readouterr().err
    assert not (tmp_path / "has_run").exists()
    assert main(line(own | {"trust_reward_code": "true"})) == 0
    assert "note: the code of reward own_rewards_of_a_test:score runs on this machine" in capsys.readouterr().err
    assert (tmp_path / "has_run").exists()
    # a stored configuration does not trust by itself, and reading the run runs nothing
    (tmp_path / "has_run").unlink()
    assert main(["--config", "run/config.yaml", "--output_dir", "again"]) == 2
    assert load_run("run").reward_config.reward == "own_rewards_of_a_test:score"
    assert not (tmp_path / "has_run").exists()


def test_a_finished_run_is_resumed_and_a_longer_one_goes_on(given, tmp_path, capsys):
    options, folder = given
    copy = shutil.copytree(folder, tmp_path / "run")
    before = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    assert main(line(options | {"output_dir": copy, "resume": "true"})) == 0
    assert "nothing is left to fit" in capsys.readouterr().err
    assert json.loads((copy / "metrics.json").read_text(encoding="utf-8")) == before
    assert main(line(options | {"output_dir": copy, "resume": "true", "epochs": 4})) == 0
    log = [json.loads(text) for text in (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert log[:3] == [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for changes in ({"samples": 8}, {"reward_option": "target=4"}, {"seed": 1}):
        assert main(line(options | {"output_dir": copy, "resume": "true", "epochs": 5} | changes)) == 2
        assert f"but the run in {copy} has" in capsys.readouterr().err


def test_a_fit_begins_at_a_run_and_asks_another_one(given, tmp_path, capsys):
    options, folder = given
    more = {"start_run": folder, "learning_rate": 1e-12, "deviation_reach": 0, "epochs": 1}
    more |= {"reward": "builtin:log_likelihood", "reward_option": f"run={folder}", "output_dir": tmp_path / "next"}
    assert main(line(options | more)) == 0, capsys.readouterr().err
    first, second = load_run(folder), load_run(tmp_path / "next")
    for name, value in first.fitted.weights()[0].items():
        torch.testing.assert_close(second.fitted.weights()[0][name], value, rtol=1e-4, atol=1e-6)
    assert second.metrics["reward"]["distance"] is None or second.metrics["reward"]["distance"] < 1e-3
    assert second.metrics["reward"]["test_reward_before"] < 0  # a log-probability
    for changes, words in (
        ({"rank": 3}, "has another adapter"),
        ({"targets": "v_proj"}, "has other layers"),
        ({"start_from": folder}, "start_run and start_from are both given"),
    ):
        assert main(line(options | more | {"output_dir": tmp_path / "refused"} | changes)) == 2
        assert words in capsys.readouterr().err
    others = PROMPTS.replace("Ada", "Adam")
    others.to_csv(tmp_path / "others.csv", index=False)
    assert main(line(options | more | {"prompts": tmp_path / "others.csv", "output_dir": tmp_path / "refused"})) == 2
    assert "has no task 'Adam'; did you mean 'Ada'" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ""}, "there are no prompts; give --prompts with a table of them"),
        ({"prompts": "none.csv"}, "none.csv"),
        ({"reward": ""}, "there is no reward; give --reward module:function, or builtin:length"),
        ({"reward": "builtin:lenght"}, "did you mean 'length'"),
        ({"prompt_column": "promt"}, "'promt'"),
        ({"tau": "learned"}, "--tau: 'learned' cannot be used; give a number, 0 (independent tasks) or inf"),
        ({"prior": "learned_precision"}, "the prior learns tau from held-out texts"),
        ({"samples": 1}, "samples is 1 with baseline group"),
        ({"max_tokens": 3}, "would be cut; raise max_tokens, or shorten it"),
        ({"shard_base": "true"}, "shard_base is true, but a fit from rewards runs in one process"),
        ({"router": "meteora"}, "router meteora is fitted to the adapters of a finished run"),
        ({"kl_weight": "-1"}, "kl_weight is -1.0"),
        ({"text_column": "prompt"}, "unknown option 'text_column'"),
    ],
)
def test_bad_input(given, changes, message, tmp_path, capsys):
    options, _ = given
    assert main(line(options | {"output_dir": tmp_path / "new"} | changes)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert "text_column" not in said or "text_column" in changes
    assert not list(tmp_path.iterdir())


def test_two_processes_are_refused(given, tmp_path, monkeypatch, capsys):
    options, _ = given
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(line(options | {"output_dir": tmp_path / "new"})) == 2
    assert "a fit from rewards runs in one process" in capsys.readouterr().err


def test_a_reward_that_is_no_number_ends_the_fit_in_one_line(given, tmp_path, monkeypatch, capsys):
    options, _ = given
    (tmp_path / "odd_rewards_of_a_test.py").write_text("def score(prompt, text, task):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    own = {name: value for name, value in options.items() if name != "reward_option"}
    own |= {"reward": "odd_rewards_of_a_test:score", "trust_reward_code": "true", "output_dir": tmp_path / "run"}
    assert main(line(own)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the reward of a text of task '")
    assert last.endswith("is None; a reward is a finite number")
