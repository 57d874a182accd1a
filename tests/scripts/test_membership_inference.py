"""The experiment on membership inference: its arms, its table, and what is refused."""

from __future__ import annotations

import pandas as pd
import pytest
import yaml

from tests.tiny_base import line, quick_fit, script_main

main = script_main("membership_inference")


@pytest.fixture
def words(tmp_path):
    """A function that writes the options of the fits, and returns the words of the script."""

    def make(*, epsilons="5", **options):
        fit = {name: value for name, value in quick_fit(tmp_path).items() if name not in ("tau", "epochs", "threads")}
        fit |= {"rounds": 2, "local_steps": 2, "clients": 2, "strategy": "ffa"} | options
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(fit), encoding="utf-8")
        paths = {"fit_config": tmp_path / "fit.yaml", "output": tmp_path / "table.csv"}
        return line(paths | {"epsilons": epsilons})

    return make


def test_the_table(words, tmp_path, capsys):
    assert main(words()) == 0, capsys.readouterr().err
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["arm"]) == ["ordinary", "clipped", "epsilon 5"]
    assert table["epsilon"][:2].isna().all()
    assert 4.9 < table["epsilon"][2] <= 5
    assert table["auroc"].between(0, 1).all()
    assert (table[["training_documents", "other_documents", "base_test_perplexity"]].nunique() == 1).all()
    # another epsilon is added, and nothing is computed again
    assert main(words(epsilons="5,2")) == 0, capsys.readouterr().err
    again = pd.read_csv(tmp_path / "table.csv")
    assert list(again["arm"]) == [*table["arm"], "epsilon 2"]
    assert again["auroc"][:3].equals(table["auroc"])


def test_what_is_refused(words, tmp_path, capsys):
    assert main(words(noise_multiplier=1.0)) == 2
    assert "has epsilon or noise_multiplier, which the arms have of their own" in capsys.readouterr().err
    assert main(words(epsilons="0")) == 2
    assert "epsilons has '0'; give finite numbers above 0" in capsys.readouterr().err
    assert main(words(strategy="bora")) == 2
    assert "with privacy give a number for tau" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()
    assert main(["--fit_config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
