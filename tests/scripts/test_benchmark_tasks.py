"""The benchmark of many tasks: what it measures of one number of them, and how runs are summed up."""

from __future__ import annotations

import sys

import pytest

from tests.tiny_base import script_main

QUICK = ["--base", "random:tiny", "--rows", "3", "--max_tokens", "8", "--steps", "2", "--warmup", "1", "--repetitions", "1"]


@pytest.fixture(scope="module")
def script():
    script_main("benchmark_tasks")
    return sys.modules["benchmark_tasks"]


def config(script, *words):
    return script.parse_config(script.TasksConfig, [*QUICK, *words])


@pytest.mark.parametrize("memory", ["1", "0"])
def test_a_step_has_the_tasks_of_its_rows_however_many_there_are(script, memory):
    for tasks in (4, 40):
        row = script.measure(config(script, "--task_memory", memory), tasks)
        assert (row["tasks"], row["tasks_per_step"], row["mapped"]) == (tasks, 3, memory == "0")
        assert row["seconds_per_step"] > 0
        assert row["resident_bytes"] >= row["resident_bytes_before"] > 0
        assert row["state_bytes"] % (16 * tasks) == 0


def test_ratios_are_of_the_runs_of_one_round(script):
    runs = [{"tasks": tasks, "seconds_per_step": s, "resident_bytes": s} for tasks, s in ((2, 1), (9, 2), (2, 3), (9, 3))]
    row = script._summary([run for run in runs if run["tasks"] == 9], runs, 2)
    assert (row["ratio"], row["ratio_range"], row["seconds_per_step"], row["resident_bytes"]) == (1.5, [1, 2], 2.5, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "25", "many"], "tasks has 'many'; give whole numbers from 2 up, as in --tasks 25 1000"),
        (["--rows", "0"], "rows is 0; give a whole number from 1 up"),
        (["--guide", "nrmal"], "guide is 'nrmal'; allowed: map, normal"),
        (["--base", "random:nano"], "no random base 'random:nano'; it is one of random:tiny"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert script_main("benchmark_tasks")(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
