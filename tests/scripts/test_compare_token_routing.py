"""Ways to read texts of unknown or changing task, side by side: the texts, the measures, and the command."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch

from bora_pyro.data import TokenSplit
from tests.tiny_base import documents, map_run, quick_fit, script_main, write_table

main = script_main("compare_token_routing")
routing = sys.modules["compare_token_routing"]


def test_composite_texts():
    rows = [[0, *range(10 * d + 1, 10 * d + 8)] for d in range(3)] + [[0, 5]]
    split = TokenSplit.from_documents(rows, task=[0, 1, 2, 2], num_tasks=3)
    texts = routing.composites(split, 2, segment=4, number=5, seed=0)
    assert len(texts.split) == 5
    for n, (task, starts) in enumerate(zip(texts.task, texts.start, strict=True)):
        first, second = int(task[0]), int(task[4])
        assert first != second
        assert task.tolist() == [first] * 4 + [second] * 4
        assert texts.split.document(n).tolist() == [0, *rows[first][1:5], *rows[second][1:5]]
        assert starts == [4]
    assert routing.composites(split, 3, segment=7, number=1, seed=0) is not None
    assert routing.composites(split, 3, segment=8, number=1, seed=0) is None


def test_tokens_until_a_switch_is_found():
    split = TokenSplit.from_documents([[0] * 7] * 2, task=[0, 0], num_tasks=3)
    texts = routing.Texts(split, [torch.tensor([0, 0, 1, 1, 2, 2])] * 2, [[2, 4]] * 2)
    best = [torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 0, 2, 2])]
    found = routing.until_found(best, texts)
    assert found == {"accuracy": 9 / 12, "tokens_until_found": (0 + 1 + 2 + 0) / 4, "found": 3 / 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_routing")
    options = quick_fit(folder) | {"data": write_table(folder / "more.csv", documents(number=20)), "epochs": 3}
    map_run(options | {"learning_rate": 0.1, "tau": 1, "output_dir": folder / "run"})
    map_run(options | {"learning_rate": 0.03, "tau": "inf", "output_dir": folder / "pooled"})
    map_run(options | {"learning_rate": 0.1, "tau": 1, "seed": 1, "split_seed": 0, "output_dir": folder / "other"})
    of_ranks = {"adapter": "smora", "adapter_option": "active=2", "export_adapters": False}
    map_run(options | of_ranks | {"learning_rate": 0.03, "tau": "inf", "output_dir": folder / "smora"})
    return folder


def test_the_command(folder, capsys):
    output = folder / "table.csv"
    words = ["--composite", "2,10", "--segment", "6", "--texts", "4", "--epochs", "1", "--output", str(output)]
    words = [str(folder / "run"), "--pooled", str(folder / "pooled"), str(folder / "smora"), *words]
    words += ["--learning_rate", "0.01", "1e-9"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "note: composite-10 is left out" in printed.err
    table = pd.read_csv(output)
    arms = ["oracle", "filter", "tempered filter", "whole text", "mixture", "meteora k=1", "meteora k=2", "average", "theta"]
    arms += ["base", "pooled", "smora"]
    for kind in ("unknown", "composite-2"):
        own = table[table.text == kind].set_index("arm")
        assert list(own.index) == arms
        assert own.ratio["oracle"] == 1
        assert (own.perplexity / own.perplexity["oracle"]).to_numpy() == pytest.approx(own.ratio.to_numpy(), rel=1e-4)
        assert own.perplexity["oracle"] < own.perplexity["base"]
        assert own.tokens_until_found.isna().all() == (kind == "unknown")
        assert (own.tokens_per_second > 0).all()
        assert own.learning_rate.dropna().index.tolist() == ["meteora k=1", "meteora k=2"]
    # rank 2 in the layers v_proj (16 -> 16) and fc2 (32 -> 16) of 2 blocks, for each of 3 tasks, whose gates read 16 and 32
    one, gates = 2 * 2 * (32 + 48), 3 * 2 * (16 + 32)
    numbers = {
        "oracle": one,
        "filter": 3 * one,
        "meteora k=1": one + gates,
        "meteora k=2": 2 * one + gates,
        "theta": one,
        "base": 0,
    }
    numbers |= {"pooled": one, "smora": one + 2 * 2 * (16 + 32)}
    assert own.active_parameters[[*numbers]].tolist() == [*numbers.values()]
    numbers = {"oracle": 3 * one, "meteora k=1": 3 * one + gates, "theta": one, "pooled": one, "base": 0}
    assert own.total_parameters[[*numbers]].tolist() == [*numbers.values()]
    # rows that are there are not computed again, and only those
    kept = table[table.arm != "theta"]
    kept.to_csv(output, index=False)
    assert main(words) == 0
    assert "fitting gates" not in capsys.readouterr().err
    again = pd.read_csv(output)
    assert len(again) == len(table)
    merged = again.merge(table, on=["seed", "text", "arm"], suffixes=("", "_before"))
    assert merged.perplexity.to_numpy() == pytest.approx(merged.perplexity_before.to_numpy(), rel=1e-5)
    # other adapters are other rows
    words[0] = str(folder / "other")
    assert main(words) == 2
    assert "has rows of other adapters with gate_seed 0" in capsys.readouterr().err
    words[0] = str(folder / "run")
    assert main([*words, "--seed", "1"]) == 2
    assert "has rows with seed 0 instead of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no run is given"),
        (["run", "--composite", "1"], "composite has '1'; give whole numbers from 2 up"),
        (["run", "--segment", "1"], "segment is 1"),
        (["run", "--learning_rate", "fast"], "learning_rate has 'fast'"),
        (["run", "--adapters", "peft"], "both are given"),
        (["--adapters", "peft"], "adapters and fit_config belong together"),
        (["run", "--pooled", "a/one", "b/one"], "pooled has two arms called 'one'"),
        (["run", "--pooled", "runs/theta"], "pooled has two arms called 'theta'"),
    ],
)
def test_bad_input(words, error, capsys):
    assert main(words) == 2
    assert error in capsys.readouterr().err


def test_a_run_of_other_documents_is_not_compared(folder, capsys):
    words = ["--output", str(folder / "none.csv")]
    assert main([str(folder / "run"), "--pooled", str(folder / "run"), *words]) == 2
    assert "has an adapter for each task; give one that was fitted with --tau inf" in capsys.readouterr().err
