"""The page of a fit from rewards: its numbers are those of the run folder."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from bora_pyro import InputError
from bora_pyro.diagnostics import plots
from bora_pyro.report.page import render
from bora_pyro.report.rewards import reward_numbers, reward_section
from bora_pyro.report.run_page import RunOptions, run_page
from tests.tiny_base import command_main, line, save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rows = [{"task": task, "prompt": f"{word} {n}"} for task, word in (("Ada", "red"), ("Bo <b>", "one")) for n in range(10)]
    pd.DataFrame(rows).to_csv(folder / "prompts.csv", index=False)
    options = {
        "prompts": folder / "prompts.csv", "base_model": save_base(folder / "base"), "targets": "v_proj,fc2", "rank": 2, "tau": 1,
        "max_tokens": 16, "new_tokens": 4, "samples": 2, "validation_samples": 2, "learning_rate": 0.1, "epochs": 2,
        "patience": 0, "threads": 1, "reward": "builtin:length", "output_dir": folder / "run",
    }  # fmt: skip
    assert command_main("reward-fit")(line(options)) == 0
    return folder / "run"


def cells(table):
    return [[cell.text for cell in row] for row in table.cells()]


def shown(value, digits=3, sign=""):
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def test_the_page_shows_what_the_fit_measured(folder):
    page = run_page(folder, RunOptions(adapters=False))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    log = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    about = metrics["reward"]
    numbers = {number.label: number for number in page.numbers}
    assert numbers["test reward"].text == shown(about["test_reward_after"])
    assert numbers["test reward"].note == f"{shown(about['test_reward_before'])} before the fit"
    section = next(section for section in page.sections if section.name == "rewards")
    tasks, pictures, epochs, folded = section.blocks
    for row, own in zip(cells(tasks), metrics["tasks"].values(), strict=True):
        before, after = (own["reward"][f"test_reward_{when}"] for when in ("before", "after"))
        assert row[3:6] == [shown(before), shown(after), shown(after - before, sign="+")]
    assert [cell.text for cell in tasks.total_cells()][4] == shown(about["test_reward_after"])
    assert len(pictures.pictures) == 1
    for row, record in zip(cells(epochs), log, strict=True):
        assert row[:4] == [
            str(record["epoch"]), shown(record["reward"]), shown(record["validation_reward"]), shown(100 * record["clipped"], 2),
        ]  # fmt: skip
    found = [(row[0], row[1], row[3], row[4]) for row in cells(folded.block)]
    assert found == [
        (str(record["epoch"]), task, shown(own["reward"]), shown(own["reward_sd"]))
        for record in log
        for task, own in record["rewards"].items()
    ]
    html = render(page)
    assert "Bo &lt;b&gt;" in html
    assert "Bo <b>" not in html


def test_the_page_of_another_run_has_no_rewards():
    assert not [*reward_numbers({"test_perplexity": 3.0})]
    assert not reward_section({"test_perplexity": 3.0}, [{"epoch": 1, "loss": 2.0}]).blocks


@pytest.mark.parametrize(
    ("best", "validation", "texts"),
    [
        (1, {"validation_reward_after": -1.0}, ["after epoch 1 is kept; it has the largest", "the epoch with the ring"]),
        (0, {"validation_reward_after": -1.0}, ["The start is kept; it has the largest", "The fit kept its start"]),
        (1, {}, ["after epoch 1 is kept; there are no validation prompts"]),
    ],
)
def test_the_page_says_which_state_is_kept(best, validation, texts):
    about = {"name": "builtin:length", "chosen_by": "validation" if validation else "the last epoch", **validation}
    record = {"epoch": 1, "reward": -2.0} | ({"validation_reward": -1.0} if validation else {})
    section = reward_section({"reward": about, "tasks": {}, "best_epoch": best}, [record])
    said = section.lead + section.blocks[1].pictures[0].caption
    assert all(text in said for text in texts)
    assert ("the ring" in said) == bool(best and validation)


def test_reward_curves_show_the_records():
    history = [{"epoch": 1, "reward": -3.0, "validation_reward": -2.5}, {"epoch": 2, "reward": -2.0, "validation_reward": -2.6}]
    ax = plots.reward_curves(history, Figure().subplots(), best_epoch=1)
    training, validation, kept = ax.lines
    assert [*training.get_ydata()] == [-3.0, -2.0]
    assert [*validation.get_ydata()] == [-2.5, -2.6]
    assert ([*kept.get_xdata()], [*kept.get_ydata()]) == ([1], [-2.5])
    assert len(plots.reward_curves([{"epoch": 1, "reward": -3.0}], Figure().subplots(), best_epoch=1).lines) == 1
    with pytest.raises(InputError, match="no record has a reward"):
        plots.reward_curves([{"epoch": 1, "loss": 2.0}], Figure().subplots())
