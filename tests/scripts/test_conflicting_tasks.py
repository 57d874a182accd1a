"""Conflicting tasks: the documents contradict each other, the arms have the parameters that they say, and the table is made."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from bora_pyro import InputError, LoRA, Pooled
from bora_pyro.adapters import SMoRA
from tests.tiny_base import line, script

conflicting = script("conflicting_tasks")


def config_of(**more):
    own = {"tasks": 3, "symbols": 5, "documents": 32, "width": 16, "rank": 8, "active": 4, "experts": 4, "epochs": 2}
    return conflicting.ConflictingConfig(**own | more)


def test_the_same_symbol_has_another_image_in_each_task():
    config = config_of(documents=600)
    data = conflicting.make_tasks(config, 0)
    maps = {}
    for split in (data.train, data.validation, data.test):
        for n in range(len(split)):
            start, task, x, y = split.document(n).tolist()
            assert (start, task) == (0, 1 + int(split.task[n]))
            assert maps.setdefault((task, x), y) == y
            assert split.predicted[n] == 1
    assert len(maps) == 3 * 5
    for task in (1, 2, 3):
        assert {maps[task, x] for x in range(4, 9)} == {*range(4, 9)}
    assert any(len({maps[task, x] for task in (1, 2, 3)}) == 3 for x in range(4, 9))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [600, 150, 150]
    assert conflicting.make_tasks(config, 0).digest == data.digest != conflicting.make_tasks(config, 1).digest


def test_the_arms_have_the_ranks_and_parameters_that_they_say():
    config = config_of()
    base = config.base()
    both = sum((slot.in_features + slot.out_features) * slot.layers for slot in base.slots)
    inputs = sum(slot.in_features * slot.layers for slot in base.slots)
    layers = sum(slot.layers for slot in base.slots)
    found = {arm: conflicting.active_parameters(config.adapter(arm), base) for arm in conflicting.ARMS}
    assert found == {
        "lora_active": 4 * both, "lora_total": 8 * both, "mixture": 4 * both + 4 * inputs, "smora": 4 * both + 8 * inputs,
        "smora_task_gates": 4 * both + 8 * inputs + 8 * layers,
    }  # fmt: skip
    adapters = {arm: config.adapter(arm) for arm in conflicting.ARMS}
    assert adapters["lora_active"] == LoRA(rank=4)
    assert adapters["mixture"] == SMoRA(rank=8, active=4, partition=2, balance=0.001)
    assert all(adapter.scaling == 1 for adapter in adapters.values())
    assert all(isinstance(config.prior(arm), Pooled) for arm in conflicting.ARMS[:4])
    assert torch.equal(config.base().weight(base.slots[0], 0), base.weight(base.slots[0], 0))


def test_the_table(tmp_path, capsys):
    options = {"tasks": 3, "symbols": 5, "documents": 64, "width": 16, "rank": 8, "active": 4, "experts": 4, "epochs": 2}
    words = [*line(options | {"seeds": 2, "output": tmp_path / "table.csv"}), "--rates", "0.01", "0.03"]
    assert conflicting.main(words) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.groupby("arm").size().to_dict() == dict.fromkeys(conflicting.ARMS, 3)
    assert (table.loss <= table.worst_loss).all()
    assert table.information.isna().tolist() == table.arm.str.startswith("lora").tolist()
    assert (table.information.dropna() <= math.log(3)).all()
    assert "| smora_task_gates |" in capsys.readouterr().out
    before = (tmp_path / "table.csv").read_bytes()
    assert conflicting.main(words) == 0
    assert (tmp_path / "table.csv").read_bytes() == before
    assert conflicting.main([*words, "--tau", "2"]) == 2
    assert "tau" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3}, "experts is 3; give a divisor of the rank, 8"),
        ({"active": 3}, "active is 3; give a multiple of the partition"),
        ({"width": 18}, "width is 18; give a multiple of 4"),
        ({"rates": ["fast"]}, "rates has fast; give finite numbers above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as caught:
        config_of(**options).validate()
    assert message in str(caught.value)
