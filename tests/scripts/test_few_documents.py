"""The curve of few documents: its arms where they must agree, its choices, and what it does not do twice."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
import torch
import yaml

from bora_pyro import InputError
from bora_pyro.data import TaskData
from bora_pyro.data.subset import subset
from tests.tiny import tiny_data, tiny_split
from tests.tiny_base import documents, quick_fit, script_main, write_table


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """The table of a tiny curve, and the words that made it."""
    folder = tmp_path_factory.mktemp("curve")
    options = quick_fit(folder) | {"epochs": 2, "targets": ["v_proj", "fc2"]}
    options["data"] = write_table(folder / "four.csv", documents(("Ada", "Børge B.", "Cleo", "Dora"), number=12))
    (folder / "fit.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    words = [
        "--fit_config", str(folder / "fit.yaml"), "--documents", "0,2,all", "--left_out", "2", "--least_documents", "5",
        "--seeds", "2", "--fit_learning_rates", "0.01,0.03",
        "--learning_rates", "0.01,0.1", "--steps", "3", "--threads", "1", "--output", str(folder / "few.csv"),
    ]  # fmt: skip
    assert script_main("few_documents")(words) == 0
    return folder / "few.csv", words


def perplexity(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    return math.exp(-table["log_likelihood"].sum() / table["tokens"].sum())


def test_the_arms_where_they_must_agree(curve):
    table = pd.read_csv(curve[0], dtype={"documents": str})
    test = table[table["split"] == "test"]
    assert test.groupby(["arm", "documents", "seed"]).size().eq(2).all()  # a row a task that was left out
    assert len(test) == 4 * 3 * 2 * 2
    for seed in (0, 1):
        of_seed = test[test["seed"] == seed]
        pooled = {number: perplexity(of_seed, arm="pooled", documents=number) for number in ("0", "2", "all")}
        assert len(set(pooled.values())) == 1  # documents do not change it
        assert perplexity(of_seed, arm="pooled_tuned", documents="0") == pytest.approx(pooled["0"], rel=1e-6)
        assert perplexity(of_seed, arm="bora", documents="2") != perplexity(of_seed, arm="bora", documents="0")
    assert set(test.loc[test["documents"] == "2", "train_documents"]) == {2}
    # the start of an adapter changes nothing: the base, for every seed of the same tasks
    assert perplexity(test, arm="scratch", documents="0") > 1


def test_choices_are_made_once_on_validation_documents(curve):
    table = pd.read_csv(curve[0], dtype={"documents": str})
    tried = table[(table["split"] == "validation") & (table["documents"] != "others")]
    assert set(tried["seed"]) == {0}
    assert set(tried["arm"]) == {"bora", "scratch", "pooled_tuned"}
    for (arm, number), rows in tried.groupby(["arm", "documents"]):
        best = min(set(rows["learning_rate"]), key=lambda rate, rows=rows: perplexity(rows, learning_rate=rate))
        used = table[(table["split"] == "test") & (table["arm"] == arm) & (table["documents"] == number)]
        assert set(used["learning_rate"]) == {best}


def test_the_fits_to_the_other_tasks_have_their_own_best_learning_rates(curve):
    table = pd.read_csv(curve[0], dtype={"documents": str})
    fits = table[table["documents"] == "others"]
    assert set(fits["split"]) == {"validation"}
    assert set(fits["steps"]) == {2}  # epochs
    for arm in ("bora", "pooled"):
        first = fits[(fits["arm"] == arm) & (fits["seed"] == 0)]
        assert set(first["learning_rate"]) == {0.01, 0.03}
        best = min((0.01, 0.03), key=lambda rate, rows=first: perplexity(rows, learning_rate=rate))
        assert set(fits.loc[(fits["arm"] == arm) & (fits["seed"] == 1), "learning_rate"]) == {best}
        for seed in (0, 1):  # those that are left out are not among them
            new = set(table.loc[(table["seed"] == seed) & (table["split"] == "test"), "task"])
            assert not new & set(fits.loc[fits["seed"] == seed, "task"])


def test_other_ways_to_share(tmp_path):
    options = quick_fit(tmp_path) | {"epochs": 2, "targets": ["v_proj", "fc2"]}
    names = ("Ada", "Børge B.", "Cleo", "Dora", "Emil", "Fay", "Gus")
    options["data"] = write_table(tmp_path / "seven.csv", documents(names, number=12))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    arms = ["bora", "posterior", "mtlora", "abmll_0.1", "reptile", "icm_mean", "icm_nearest"]
    words = [
        "--fit_config", str(tmp_path / "fit.yaml"), "--documents", "0,2", "--left_out", "2", "--least_documents", "5",
        "--seeds", "1", "--fit_learning_rates", "0.01", "--learning_rates", "0.01", "--steps", "3", "--threads", "1",
        "--arms", ",".join(arms), "--output", str(tmp_path / "ways.csv"),
    ]  # fmt: skip
    assert script_main("few_documents")(words) == 0
    table = pd.read_csv(tmp_path / "ways.csv", dtype={"documents": str})
    test = table[table["split"] == "test"]
    sizes = test.groupby(["arm", "documents"]).size()
    assert sizes.eq(2).all()  # a row a task
    assert {arm for arm in arms if (arm, "0") not in sizes.index} == {"icm_mean", "icm_nearest"}  # without documents no vector
    found = [perplexity(test, arm=arm, documents=number) for arm, number in sizes.index]
    assert len(set(found)) == len(found)  # each way has adapters of its own
    assert test["ece"].between(0, 1).all()
    tuned = set(table.loc[(table["split"] == "validation") & (table["documents"] == "2"), "arm"])
    assert tuned == {"bora", "posterior", "mtlora"}  # the others take the steps of their fit, or none


def test_nothing_is_run_twice(curve, capsys):
    path, words = curve
    before = path.read_bytes()
    assert script_main("few_documents")(words) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().err == ""


def test_a_later_seed_searches_nothing(curve, tmp_path):
    path, words = curve
    table = pd.read_csv(path, dtype={"documents": str})
    first = table[(table["seed"] == 0) | (table["split"] == "validation")]
    first.to_csv(tmp_path / "few.csv", index=False)
    more = [*words, "--arms", "bora"]
    for name, value in (("--documents", "2"), ("--steps", "3,4"), ("--output", str(tmp_path / "few.csv"))):
        more[more.index(name) + 1] = value
    assert script_main("few_documents")(more) == 0
    again = pd.read_csv(tmp_path / "few.csv", dtype={"documents": str})
    assert len(again) == len(first) + 2
    assert set(again.loc[again["documents"] != "others", "steps"]) == {0, 3}
    assert len(again[again["split"] == "validation"]) == len(first[first["split"] == "validation"])
    assert len(again[again["documents"] == "others"]) == len(first[first["documents"] == "others"])


def test_rows_with_other_options_are_not_added(curve, capsys):
    path, words = curve
    before = path.read_bytes()
    more = [*words, "--others_documents", "5"]
    assert script_main("few_documents")(more) == 2
    assert re.search(r"rows with others_documents \d+ instead of 5; give another --output", capsys.readouterr().err)
    assert path.read_bytes() == before


def test_rows_that_do_not_say_their_options_are_counted(curve, tmp_path, capsys):
    path, words = curve
    table = pd.read_csv(path).drop(columns="options")
    table.to_csv(tmp_path / "few.csv", index=False)
    again = [*words]
    again[again.index("--output") + 1] = str(tmp_path / "few.csv")
    assert script_main("few_documents")(again) == 0
    note = f"note: {len(table)} of {len(table)} rows of {tmp_path / 'few.csv'} do not say which options they had\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--arms", "bora,scratsch"], "arm 'scratsch' is not known.*did you mean 'scratch'"),
        (["--arms", "abmll_-1"], "arm 'abmll_-1' is not known"),
        (["--inner_rate", "0"], "inner_rate is 0"),
        (["--documents", "5,many"], "documents 'many' is not a number"),
        (["--steps", "0"], "steps has '0'"),
        (["--fit_learning_rates", "0.01,fast"], "fit_learning_rates has 'fast'"),
        (["--left_out", "0"], "left_out is 0"),
        (["--fit_config", "missing.yaml"], "fit_config missing.yaml does not exist"),
    ],
)
def test_bad_input(change, words, capsys):
    assert script_main("few_documents")(change) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert re.search(words, error)


# Some tasks of a data set


def test_a_subset_has_the_documents_of_its_tasks():
    data = tiny_data((3, 1, 4))
    some = subset(data, ["task 2", "task 0"])
    assert some.tasks == ["task 0", "task 2"]
    for name in ("train", "validation", "test"):
        whole, part = getattr(data, name), getattr(some, name)
        kept = [n for n in range(len(whole)) if int(whole.task[n]) != 1]
        assert [part.document(n).tolist() for n in range(len(part))] == [whole.document(n).tolist() for n in kept]
        assert part.task.tolist() == [int(whole.task[n]) // 2 for n in kept]
        torch.testing.assert_close(part.characters, whole.characters[kept])


def test_fewer_documents_are_among_more():
    split = tiny_split((6, 5))
    data = TaskData(["a", "b"], split, split, split)

    def texts(most):
        train = subset(data, ["a", "b"], max_train_documents=most, seed=1).train
        assert max(train.documents_per_task, default=0) <= most
        return {tuple(train.document(n).tolist()) for n in range(len(train))}

    assert texts(0) == set()
    assert texts(2) < texts(4) < texts(9)
    with pytest.raises(InputError, match="task 'c' is not in the data, which has 2"):
        subset(data, ["c"])
