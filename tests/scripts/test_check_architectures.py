"""The stored table of architectures: no type has a fault, and the page shows the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from bora_pyro import InputError
from tests.tiny_base import script

ROOT = Path(__file__).parents[2]


def stored():
    return pd.read_csv(ROOT / "results" / "architectures.csv", dtype=str, keep_default_na=False)


def test_no_stored_type_has_a_fault_and_refusals_are_one_line():
    table = stored()
    assert set(table["result"]) == {"works", "refused"}
    assert (table["lines"][table["result"] == "refused"] != "").all()
    assert table["type"].is_unique
    assert len(table) > 150


def test_the_page_shows_the_stored_table():
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for _, row in stored().iterrows():
        assert f"| {row['type']} | {row['class']} |" in page
    counts = stored()["result"].value_counts()
    assert f"**{counts['works']} work, {counts['refused']} are refused**" in page


def test_the_script_goes_on_with_the_types_that_have_no_row(tmp_path, capsys):
    main, table = script("check_architectures").main, tmp_path / "table.csv"
    options = ["--output", str(table), "--fits", "false", "--page", str(tmp_path / "page.md")]
    assert main(["--types", "llama", *options]) == 0
    assert main(["--types", "llama", "roberta", *options]) == 0
    shown = capsys.readouterr().out
    assert shown.count("llama") == 1
    rows = pd.read_csv(table, dtype=str, keep_default_na=False).set_index("type")
    assert list(rows["result"]) == ["works", "refused"]
    assert (rows.loc["llama", "class"], rows.loc["llama", "mixed_batch"]) == ("LlamaForCausalLM", "ok")
    page = (tmp_path / "page.md").read_text()
    assert "\n2 types, " in page
    assert "**1 work, 1 are refused**" in page
    assert "| llama | LlamaForCausalLM | q_proj v_proj |" in page


def test_an_unknown_type():
    with pytest.raises(InputError, match=r"no causal model type 'lama'; did you mean 'llama'\?"):
        script("check_architectures").CheckConfig(types=["lama"]).validate()
