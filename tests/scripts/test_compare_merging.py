"""The comparison of ways to merge adapters, on toy tasks."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from tests.tiny import peft_warnings
from tests.tiny_base import documents, line, save_base, script, write_table

merging = script("compare_merging")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging")
    numbers = {"Ada": 12, "Børge B.": 24, "Cleo": 18}  # other numbers of documents for other tasks
    tables = [documents((task,), number=number) for task, number in numbers.items()]
    table = pd.concat([*tables, documents(("Cleo",), number=9).assign(task="Dora")])
    return {
        "data": write_table(folder / "documents.csv", table),
        "base_model": save_base(folder / "base"),
        "targets": "v_proj,fc2",
        "rank": 2,
        "max_tokens": 32,
        "left_out": 2,
        "epochs": 1,
        "scales": "0.5,1",
        "densities": "0.5",
        "seeds": 1,
        "output": folder / "merging.csv",
    }


@pytest.fixture(scope="module")
def table(options):
    assert merging.main(line(options)) == 0
    return pd.read_csv(options["output"])


def test_every_arm_has_its_rows(table):
    assert list(table) == [*merging.COLUMNS, "options"]
    arms = {"base", *merging.PEFT_ARMS, *merging.OWN_ARMS}
    assert set(table.arm) == arms | {"apart", "shrunk", "together"}
    test = table[table.split == "test"]
    assert not test.duplicated(["arm", "tasks"]).any()
    assert set(test[test.tasks == "new"].arm) == arms | {"together"}
    assert set(test[test.tasks == "merged"].arm) == set(table.arm)
    for arm in arms:  # the scale with the lowest validation perplexity is that of the test
        own = table[table.arm == arm]
        validation = own[own.split == "validation"]
        chosen = validation.loc[validation.perplexity.idxmin()]
        assert (own[own.split == "test"].scale == chosen.scale).all()
    assert len(table[(table.arm == "ties") & (table.split == "validation")]) == 2


def test_seeds_of_other_fits_do_not_join_the_table(options, table, capsys):
    assert merging.main(line(options | {"epochs": 9, "seeds": 2})) == 2
    assert "merging.csv has rows with epochs" in capsys.readouterr().err


def test_the_mean_of_peft_is_the_mean_of_the_changes(options, tmp_path):
    config = merging.parse_config(merging.MergingConfig, line(options))
    own = merging.Merging(config, 0)
    adapters = own.train_apart(tmp_path)
    deltas = {
        path: torch.stack([one.scaling * one.factors[path]["lora_B"] @ one.factors[path]["lora_A"] for one in adapters.values()])
        for path in own.paths
    }
    with peft_warnings():
        mean = own.merged_by_peft(own.loaded(tmp_path), "mean", 1.0, None)
    documents_of = torch.tensor([float(number) for number in own.old.train.documents_per_task])
    weighted = own.theta("documents", adapters)
    for path, of_tasks in deltas.items():
        assert of_tasks.abs().max() > 0
        torch.testing.assert_close(mean[path], of_tasks.mean(0), atol=1e-7, rtol=1e-4)
        expected = (documents_of[:, None, None] * of_tasks).sum(0) / documents_of.sum()
        torch.testing.assert_close(weighted[path], expected, atol=1e-7, rtol=1e-4)
    starts = [one.factors[own.paths[0]]["lora_A"] for one in adapters.values()]
    assert (starts[0] - starts[1]).abs().mean() > 0.01  # each adapter began at an A of its own


def test_seeds_that_the_table_has_are_not_repeated(options, table, monkeypatch):
    monkeypatch.setattr(merging, "Merging", None)
    pd.testing.assert_frame_equal(merging.run_all(merging.parse_config(merging.MergingConfig, line(options))), table)
    assert "| mean |" in merging.summary(table)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": "0"}, "scales has '0'"),
        ({"densities": "1.5"}, "densities has '1.5'; give numbers above 0, of at most 1"),
        ({"seeds": 0}, "seeds is 0"),
        ({"left_out": 9}, "give a smaller number to leave out than 9"),
    ],
)
def test_bad_options_end_with_one_line(changes, words, options, tmp_path, capsys):
    assert merging.main(line({**options, "output": tmp_path / "other.csv", **changes})) == 2
    assert words in capsys.readouterr().err
