"""Planted ranks: the teacher has them, and the table says what the fits found."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from bora_pyro import Backbone, BoRA, Pooled
from tests.tiny_base import line, save_base, script

planted = script("planted_ranks")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("planted") / "base"))


def config_of(base, **more):
    shared = {"base_model": base, "targets": ["v_proj", "fc2"], "planted_layers": 2, "planted_rank": 3, "tokens": 16}
    return planted.PlantedConfig(**shared | {"documents": 24, "epochs": 1, "token_budget": 64} | more)


def test_the_teacher_has_the_planted_ranks(base, monkeypatch):
    """The changes have the rank and the norm that are asked for, and its loss is that of the changed base."""
    changed, merge = {}, planted.merge_into_base

    def record(model, weights):
        before = {
            (slot.name, n): model.backbone.weight(slot, n).clone() for slot in model.backbone.slots for n in range(slot.layers)
        }
        merge(model, weights)
        for (name, n), weight in before.items():
            slot = next(slot for slot in model.backbone.slots if slot.name == name)
            changed[name, n] = (weight, model.backbone.weight(slot, n) - weight)

    monkeypatch.setattr(planted, "merge_into_base", record)
    made = planted.plant(config_of(base, strength=0.5), 0)
    ranks = [int(torch.linalg.matrix_rank(delta, atol=1e-4)) for _, delta in changed.values()]
    assert ranks == made.ranks
    assert sorted(ranks)[-3:] == [0, 3, 3]
    for weight, delta in changed.values():
        assert float(delta.norm() / weight.norm()) == pytest.approx(0.5, rel=1e-4) or not delta.any()
    assert [len(split) for split in (made.data.train, made.data.validation, made.data.test)] == [24, 6, 6]
    assert 0 < made.loss < math.log(Backbone.from_pretrained(base).num_token_ids)


def test_ranks_are_counted_by_the_masks(base):
    backbone = Backbone.from_pretrained(base, targets=["v_proj", "fc2"])
    for arm, expected in (("lora", 2), ("triadapt_linear", 1)):
        model = BoRA(backbone, 2, adapter=config_of(base).adapter(arm), prior=Pooled())
        assert planted.active_ranks(model) == [expected] * sum(slot.layers for slot in backbone.slots)


def test_the_table(base, tmp_path, capsys):
    words = line(
        {"base_model": base, "planted_layers": 2, "planted_rank": 3, "tokens": 16, "documents": 24, "epochs": 2, "seeds": 2}
    )
    words += line({"token_budget": 64, "output": tmp_path / "table.csv"})
    words += ["--targets", "v_proj", "fc2", "--rates", "0.01", "0.03"]
    assert planted.main(words) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.groupby("arm").size().to_dict() == {"lora": 3, "triadapt_exponential": 3, "triadapt_linear": 3}
    assert table.total_rank.nunique() == 1  # all arms have the same
    out = capsys.readouterr().out
    assert "| triadapt_linear |" in out
    before = (tmp_path / "table.csv").read_bytes()
    assert planted.main(words) == 0
    assert (tmp_path / "table.csv").read_bytes() == before
    assert planted.main([*words[:-3], "--rates", "fast"]) == 2
