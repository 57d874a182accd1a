"""Several processes are one: the same steps, checkpoints that any number of them can take up, and no more traffic than Θ."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from bora_pyro import InputError, fit
from bora_pyro.inference.processes import Processes, all_reduce_gradient, partition_tasks
from bora_pyro.runs.folder import RunFolder
from tests import two_processes
from tests.forked import Forked, run_script
from tests.tiny_base import line, quick_fit
from tests.tiny_gguf import toy_llama, toy_tokenizer, write_gguf
from tests.two_processes import ANSWERS, COUNTS, PRIORS, loop, model_and_data, run


def group(folder, number, act, *arguments):
    """How each of the processes ended that call ``act``, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = [
        Forked(folder / f"process{rank}", act, *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]
    return [child.end() for child in children]


def started(what, folder, number=2):
    """What each process of a fit has to say."""
    for code, _, errors in group(folder, number, two_processes.main, what, str(folder)):
        assert code == 0, errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(number)]


def command(folder, words):
    """How two processes of ``map_fit.py`` ended."""
    return group(folder, 2, run_script, "map_fit.py", words)


@pytest.mark.parametrize(("prior", "guide"), [*((prior, "map") for prior in PRIORS), ("normal", "swag")])
def test_two_processes_take_the_steps_of_one(prior, guide, tmp_path):
    first, second = started(f"{prior} {guide}", tmp_path)
    parts = partition_tasks(model_and_data(prior)[1].train.tokens_per_task, 2)
    assert len(parts[0]) != len(parts[1]) or prior == ANSWERS
    one = loop(prior, guide, partition=parts)
    assert one.steps_per_epoch > 2
    reports, norms, one = run(one, -(-20 // one.steps_per_epoch))
    assert first["steps"] >= 20
    assert first["objective"] == second["objective"]
    assert first["objective"] == pytest.approx([report["objective"] for report in reports], rel=1e-5)
    assert first["norms"] == second["norms"] == pytest.approx(norms, rel=1e-4)
    sites = torch.load(tmp_path / "sites.pt")
    for name, value in (one.fitted.sites() | one.guide.state_dict()).items():
        torch.testing.assert_close(sites[name], value, rtol=1e-5, atol=1e-5)
    if guide == "swag":
        of_tasks = one.guide.get_buffer("column3/theta/q_proj/lora_A_decentered")
        # the one document of task 2 has a single token before the predicted one, so its queries do not matter
        moved = [value for value, count in zip(of_tasks, COUNTS, strict=True) if count > 1]
        assert all(value.abs().max() > 1e-3 for value in moved)  # the columns of both processes came together
    assert first["tau"] == pytest.approx(one.fitted.tau_by_group(), rel=1e-5)
    expected = one.fitted.validation_score  # a guide that is made of the steps has none before its first epoch is over
    assert first["validation"] == second["validation"] == (expected and pytest.approx(expected, rel=1e-5))


def test_a_step_sends_the_gradient_of_theta_whatever_the_number_of_tasks(tmp_path):
    result = started("bytes", tmp_path)[0]
    few, many = result["bytes"]["25"], result["bytes"]["1000"]
    assert few == many == [result["shared"] + 6 * 8]  # beside it the norm, the loss, three counts and requests


def test_more_processes_than_tasks_with_documents_is_one_line(tmp_path):
    errors = [result["error"] for result in started("too many", tmp_path)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("2 processes for 1 tasks with training documents; each needs one of its own")


@pytest.mark.parametrize("prior", PRIORS)
def test_any_number_of_processes_takes_up_where_another_has_left(prior, tmp_path):
    """Two processes, then one, then three: each goes on where the last has ended, with every task's values."""
    started(f"fit 1 {prior}", tmp_path)
    two = torch.load(tmp_path / "sites.pt")

    def alone(epochs):
        model, data = model_and_data(prior)
        options = {"token_budget": 12, "patience": 0, "checkpoints": tmp_path / "checkpoints"}
        return fit(model, data, epochs=epochs, **options)

    one = alone(1)  # nothing left to do: what the two had
    assert len(one.history) == 1
    for name, value in one.sites().items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=0)
    one = alone(2)
    assert [entry["epoch"] for entry in one.history] == [1, 2]
    three = started(f"fit 3 {prior}", tmp_path, 3)[0]
    assert [entry["epoch"] for entry in three["history"]] == [1, 2, 3]
    assert three["history"][:2] == one.history
    assert three["history"][2]["loss"] < one.history[0]["loss"]


def test_the_command_fits_in_two_processes_and_writes_once(tmp_path):
    options = quick_fit(tmp_path) | {"device": "cpu", "output_dir": str(tmp_path / "run")}
    (code, out, err), (other_code, other_out, other_err) = command(tmp_path / "output", line(options))
    assert (code, other_code) == (0, 0), err + other_err
    assert "run folder:" in out
    assert not other_out
    assert "memory:" not in other_err
    run = RunFolder.open(tmp_path / "run")
    log = [json.loads(entry) for entry in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert {entry["reduced_bytes"] for entry in log} == {log[0]["reduced_bytes"]}
    metrics = run.read_metrics()
    assert metrics["test_perplexity"] < metrics["base_test_perplexity"]
    assert all(task["deviation_norm"] > 0 for task in metrics["tasks"].values())
    assert len([*run.adapters.iterdir()]) == len(metrics["tasks"]) + 2  # Θ's, and the tasks' names

    # the same with the base in parts
    parts = options | {"output_dir": str(tmp_path / "parts"), "shard_base": "true"}
    assert [code for code, *_ in command(tmp_path / "output", line(parts))] == [0, 0]
    in_parts = RunFolder.open(tmp_path / "parts")
    assert in_parts.read_metrics()["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    torch.testing.assert_close(in_parts.load_tensors("posterior"), run.load_tensors("posterior"), rtol=1e-4, atol=1e-5)

    # and what cannot be: one line, from the first, and both give up
    (code, out, err), (other_code, other_out, other_err) = command(tmp_path / "output", line(options))
    assert (code, other_code) == (2, 2)
    assert [entry for entry in err.splitlines() if entry.startswith("error:")] == [err.splitlines()[-1]]
    assert "overwrite" in err
    assert "error" not in other_err


def test_a_base_of_a_gguf_file_is_kept_in_parts(tmp_path):
    tokenizer = toy_tokenizer()
    base = write_gguf(tmp_path / "model.gguf", toy_llama(tokenizer), tokenizer, kind="Q4_1")
    options = quick_fit(tmp_path) | {"base_model": base, "targets": "q_proj,v_proj", "device": "cpu"}
    runs = []
    for shard_base in ("false", "true"):
        words = line(options | {"shard_base": shard_base, "output_dir": tmp_path / shard_base})
        (code, _, err), (other_code, _, other_err) = command(tmp_path / "output", words)
        assert (code, other_code) == (0, 0), err + other_err
        assert "the base is dequantised from Q4_1 to float32" in err
        runs.append(RunFolder.open(tmp_path / shard_base))
    whole, parts = (run.load_tensors("posterior") for run in runs)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)


def test_tasks_are_dealt_out_by_tokens():
    parts = partition_tasks(torch.tensor([100, 1, 1, 50, 50, 0, 0]), 2)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    tokens = torch.tensor([100, 1, 1, 50, 50, 0, 0])
    assert [int(tokens[part].sum()) for part in parts] == [101, 101]
    with pytest.raises(InputError, match=r"6 processes for 5 tasks .* start 5 or fewer"):
        partition_tasks(tokens, 6)


def test_the_norm_is_that_of_the_whole_gradient():
    one, other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    one.grad, other.grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 4.0, 0.0])
    assert all_reduce_gradient(Processes(), [one], [other], torch.zeros(4)).item() == pytest.approx(5)
    assert all_reduce_gradient(
        Processes(), [], [other, torch.nn.Parameter(torch.zeros(2))], torch.zeros(4)
    ).item() == pytest.approx(4)


def test_processes_that_share_nothing_add_up_the_norm_alone():
    class Two(Processes):
        size = 2

        def all_reduce(self, value):
            return value.mul_(2)

    own = torch.nn.Parameter(torch.zeros(2))
    own.grad, sums = torch.tensor([3.0, 4.0]), torch.ones(4, dtype=torch.float64)
    assert all_reduce_gradient(Two(), [], [own], sums).item() == pytest.approx(50**0.5)
    assert sums.tolist() == [2, 2, 2, 2]
