"""The benchmark of D adapters one after another: what its arms read, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.tiny_base import script_main

QUICK = ["--base", "random:tiny", "--max_tokens", "8", "--repetitions", "2", "--threads", "1", "--rows", "2"]


@pytest.fixture(scope="module")
def script():
    script_main("benchmark_sequential")
    return sys.modules["benchmark_sequential"]


def test_both_read_every_document_once(script):
    config = script.parse_config(script.SequentialConfig, QUICK)
    backbone = script.load_base(config.base)
    split = script.Documents(config, backbone).deal(3, 2)
    assert split.documents_per_task == [2, 2, 2]
    ours = script.Ours(config, backbone, split)
    steps = ours.order(seed=0)
    read = [batch.index for number in range(len(steps)) for batch in steps[number]]
    assert sorted(torch.cat(read).tolist()) == list(range(6))
    own = [script.OneAfterAnother(config, backbone, split, task) for task in range(3)]
    tokens = [row["input_ids"] for other in own for row in other.rows]
    assert tokens == [split.document(n).tolist() for n in range(6)]
    before = [p.detach().clone() for p in own[0].parameters]
    own[0].epoch()
    assert any(not torch.equal(was, now) for was, now in zip(before, own[0].parameters, strict=True))


def test_the_table(script, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert script.main([*QUICK, "--tasks", "1", "3", "--documents", "2", "--sample", "2", "--output", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["tasks"], row["documents"], len(row["ours"]), len(row["peft"])) for row in rows] == [(1, 2, 2, 2), (3, 2, 2, 2)]
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "0"], "tasks has '0'; give whole numbers from 1 up"),
        (["--documents", "many"], "documents has 'many'"),
        (["--sample", "0"], "sample is 0; give a whole number from 1 up"),
        (["--base", "random:nano"], "no random base 'random:nano'"),
        (["--data", "builtin:docs"], "builtin:docs"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert script_main("benchmark_sequential")(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
