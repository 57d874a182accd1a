"""The experiment of similar tasks: its prior where it must be that of groups, and its table."""

from __future__ import annotations

import pandas as pd
import pyro
import pytest
import torch
import yaml

from bora_pyro.priors import GroupedNormal
from tests.tiny_base import documents, quick_fit, script, script_main, write_table


def test_with_a_predictor_for_each_group_it_is_the_prior_of_groups():
    groups, start = ["0", "1", "0", "1", "1"], torch.zeros(2, 3, 4)
    predictors = torch.nn.functional.one_hot(torch.tensor([int(name) for name in groups])).float()
    priors = GroupedNormal(groups), script("similar_tasks").SimilarNormal(predictors, "site", 100.0)
    found = []
    for prior in priors:
        with pyro.poutine.seed(rng_seed=3):
            found.append(prior.sample({"x": start}, pyro.plate("tasks", 5, dim=-1))["x"])
    torch.testing.assert_close(*found)
    with pyro.poutine.seed(rng_seed=3):  # some of the tasks alone
        some = priors[1].sample({"x": start}, pyro.plate("tasks", 5, subsample=torch.tensor([4, 0]), dim=-1))["x"]
    assert some.shape == (2, 2, 3, 4)


def test_the_table(tmp_path, capsys):
    names = ("Ada", "Børge B.", "Cleo", "Dora", "Emil")
    options = quick_fit(tmp_path) | {"epochs": 2, "targets": ["v_proj", "fc2"]}
    options["data"] = write_table(tmp_path / "five.csv", documents(names, number=12))
    del options["threads"]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    words = ["--fit_config", str(tmp_path / "fit.yaml"), "--output", str(tmp_path / "similar.csv"), "--components", "2"]
    words += ["--seeds", "2", "--rates", "0.01,0.03"]
    assert script_main("similar_tasks")(words) == 0
    table = pd.read_csv(tmp_path / "similar.csv")
    assert table.groupby("arm").size().to_dict() == {"none": 3, "similar": 3, "shuffled": 3}  # two rates, and the best one again
    assert table.tau_of_predictors.notna().eq(table.arm != "none").all()
    before = (tmp_path / "similar.csv").read_bytes()
    assert script_main("similar_tasks")(words) == 0
    assert (tmp_path / "similar.csv").read_bytes() == before
    capsys.readouterr()
    assert script_main("similar_tasks")(["3" if word == "2" else word for word in words]) == 2
    assert "components 2 instead of 3; give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--arms", "similr"], "arm 'similr' is not known"),
        (["--rates", "fast"], "rates has 'fast'"),
        (["--components", "1"], "components is 1"),
    ],
)
def test_bad_input(words, error, capsys):
    assert script_main("similar_tasks")(words) == 2
    assert error in capsys.readouterr().err
