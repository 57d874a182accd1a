"""The numbers that the paper reports: they are whole, and those of the paper."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bora_pyro.diagnostics.sweep_table import runs
from tests.paper_figures.calls import ROOT

FACTS = ROOT.parent / "shared" / "paper"


def test_the_reported_numbers_are_whole(script):
    common = script("common")
    overall, by_task, tasks = (common.reported(name) for name in ("table1", "table2", "tasks"))
    assert list(overall["tau"]) == ["0", "1", "10", "100", "1000", "10000"]
    assert by_task.pivot(index="task", columns="tau", values="test_perplexity").shape == (25, 6)
    assert set(by_task["task"]) == set(tasks["task"])
    assert tasks["train_documents"].agg(["min", "max"]).tolist() == [110, 477]
    # the lowest of all is at τ = 100, overall and for every speaker
    assert overall.set_index("tau")["test_perplexity"].idxmin() == "100"
    assert (by_task.loc[by_task.groupby("task")["test_perplexity"].idxmin(), "tau"] == "100").all()


def test_the_reported_tables_agree_but_at_ten(script):
    common = script("common")
    overall = common.reported("table1").set_index("tau")["test_perplexity"]
    by_task = common.reported("table2")
    means = np.exp(np.log(by_task["test_perplexity"]).groupby(by_task["tau"]).mean())
    ratio = means / overall
    assert ((ratio.drop("10") > 0.993) & (ratio.drop("10") < 0.997)).all()
    assert means["10"] == pytest.approx(13.77, abs=0.01)


@pytest.mark.skipif(not FACTS.is_dir(), reason="the facts that the tables were made of are not here")
def test_the_reported_numbers_are_the_facts(script):
    common = script("common")
    overall, by_task, tasks = (common.reported(name) for name in ("table1", "table2", "tasks"))
    facts = pd.read_csv(FACTS / "table1_perplexity.csv")
    np.testing.assert_array_equal(overall.astype(float), facts)
    facts = pd.read_csv(FACTS / "table2_task_perplexity.csv", index_col="task")
    wide = by_task.pivot(index="task", columns="tau", values="test_perplexity").loc[facts.index, facts.columns]
    np.testing.assert_array_equal(wide, facts)
    facts = pd.read_csv(FACTS / "documents_per_task.csv").merge(pd.read_csv(FACTS / "speakers.csv"), on="task")
    np.testing.assert_array_equal(tasks, facts)


def test_the_reported_sweep_is_read_as_a_sweep(script):
    table = script("common").reported_sweep()
    assert len(table) == 25 * 6
    assert runs(table).set_index("tau")["test_perplexity"].to_dict() == {
        "0": 16.80, "1": 16.59, "10": 12.85, "100": 12.82, "1000": 13.26, "10000": 13.91,
    }  # fmt: skip
