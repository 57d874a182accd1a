"""The table of federated strategies: its arms and columns, and what is refused."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import yaml

from tests.tiny_base import documents, line, quick_fit, script, script_main, write_table

arms = script("federated_arms")
main = script_main("compare_federated")


@pytest.fixture
def words(tmp_path):
    """A function that writes the options of the fits, and returns the words of the script."""

    def make(fit=None, **more):
        options = {name: value for name, value in quick_fit(tmp_path).items() if name not in ("epochs", "rank", "threads")}
        options["data"] = write_table(tmp_path / "documents.csv", documents(("Ada", "Børge B.", "Cleo", "Dora")))
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options | (fit or {})), encoding="utf-8")
        own = {"fit_config": tmp_path / "fit.yaml", "output": tmp_path / "table.csv", "seeds": 1, "rates": 0.01, "new_tasks": 1}
        own |= {"total_steps": 4, "local_steps": 2, "ranks": 2, "dirichlet_clients": 2, "adapt_steps": 2, "epsilons": "inf"}
        return line(own | more)

    return make


def test_the_grid():
    given = {"clients": ["task", "2"], "ranks": [2, 8], "local_steps": [1, 5], "epsilons": [math.inf, 3.0]}
    found = [arm.name for arm in arms.arms_of(["bora", "ffa", "pooled", "alone"], **given)]
    assert len(found) == len({*found}) == 8 + 16 + 2 + 4
    assert "ffa 2 r8 E5 eps3" in found
    assert "alone 2 r8" in found
    assert not any("eps" in name for name in found if name.startswith("bora"))


def test_the_table(words, tmp_path, capsys):
    assert main(words(arms="fedit,bora_fixed,alone,pooled", clients="task")) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "table.csv").set_index("arm")
    assert list(table.index) == ["fedit task r2 E2", "bora_fixed task r2 E2", "alone task r2", "pooled r2"]
    assert (table.rounds.dropna() == 2).all()
    assert (table.clients == 3).all()
    assert (table[["base_test_perplexity", "new_base", "test_tokens", "train_documents"]].nunique() == 1).all()
    assert table.new_adapted.notna().all()
    assert math.isnan(table.new_common["alone task r2"])
    assert table.tau.tolist() == [math.inf, 1, 0, math.inf]
    # A and B of three clients in two rounds, and the sums of their validation documents at the start and in each round
    sizes = (16 + 16) * 2 * 2 + (32 + 16) * 2 * 2  # v_proj 16 -> 16 and fc2 32 -> 16, rank 2, two layers
    assert table.uploaded_bytes["fedit task r2 E2"] == 3 * (2 * 4 * sizes + 3 * 16)
    assert "| pooled r2 | 0.01 |" in printed
    assert "base: test " in printed
    # more arms are added to the same documents, and nothing is computed again
    more = words(arms="fedit,ffa", clients="task,dirichlet", epsilons="inf,5", adapt="false")
    assert main(more) == 0, capsys.readouterr().err
    again = pd.read_csv(tmp_path / "table.csv").set_index("arm")
    assert list(again.index[:4]) == list(table.index)
    assert len(again) == 4 + 7
    assert again.seconds[:4].tolist() == table.seconds.tolist()
    assert again.new_adapted[4:].isna().all()
    assert again.base_test_perplexity.nunique() == 1  # the same documents, whoever has them
    private = again[again.index.str.endswith("eps5")]
    assert private.epsilon.between(4.9, 5).all()
    assert (private.noise_multiplier > 0).all()
    assert again.epsilon[~again.index.str.endswith("eps5")].isna().all()
    assert again.uploaded_bytes["ffa task r2 E2"] < again.uploaded_bytes["fedit task r2 E2"]
    # rows of other options are refused
    assert main(words(arms="fedit", total_steps=8)) == 2
    assert "rows with total_steps 4 instead of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "fedlt"}, "arm is 'fedlt'; allowed: fedit, ffa"),
        ({"local_steps": "3"}, "local_steps has 3, which does not divide total_steps, 4"),
        ({"ranks": "0"}, "ranks has '0'; give whole numbers from 1 up"),
        ({"clients": "tasks"}, "clients has 'tasks'; give task, dirichlet or whole numbers from 1 up"),
        ({"epsilons": "0"}, "epsilons has '0'; give numbers above 0, or inf"),
        ({"fit": {"rounds": 3}}, "has rounds 3, which is that of an arm; leave it out"),
        ({"fit_config": "none.yaml"}, "fit_config none.yaml does not exist"),
        ({"new_tasks": 3}, "give a smaller number to leave out than 3"),
    ],
)
def test_what_is_refused(changes, message, words, tmp_path, capsys):
    assert main(words(**changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()
