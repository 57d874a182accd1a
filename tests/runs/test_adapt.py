"""New tasks from run folder to run folder: the command, its columns, and what comes back of every adapter and prior."""

from __future__ import annotations

import json
import math
import re
import shutil

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bora_pyro import InputError
from bora_pyro.adapters import ADAPTERS
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, map_run, quick_fit, write_table


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return quick_fit(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    return map_run(inputs | {"output_dir": tmp_path_factory.mktemp("runs") / "run", "learning_rate": 0.03})


@pytest.mark.parametrize("guide", ["map", "normal"])
def test_from_run_folder_to_run_folder(finished, tmp_path, capsys, guide):
    run = shutil.copytree(finished, tmp_path / "run")
    rows = documents(("Cleo",), number=8, seed=5).assign(task="Dora", split=["train"] * 5 + ["test"] * 3)
    data = write_table(tmp_path / "new.csv", rows)
    chosen = line({"data": data, "split_column": "split", "guide": guide, "steps": 5, "output_dir": tmp_path / "new"})
    assert command_main("adapt")([str(run), *chosen]) == 0
    assert "Dora" in capsys.readouterr().out
    shutil.rmtree(run)  # the new run stands alone
    found = load_run(tmp_path / "new")
    assert (found.adapted, found.fitted.tasks, found.fitted.documents) == (True, ["Dora"], [5])
    metrics = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert metrics["tasks"]["dora"]["test_documents"] == 3
    assert found.fitted.evaluate(found.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    old = load_run(finished)
    for name, value in old.fitted.weights()[1].items():
        torch.testing.assert_close(found.fitted.weights()[1][name], value, rtol=0, atol=0)
    written = load_file(tmp_path / "new" / "adapters" / "dora" / "adapter_model.safetensors")
    theta, slot = found.fitted.weights()[0], found.fitted.model.backbone.slots[0]
    torch.testing.assert_close(
        written[f"base_model.model.{slot.paths[0]}.lora_A.weight"], theta[f"{slot.name}.lora_A"][0, 0], rtol=0, atol=0
    )
    if guide == "normal":
        assert found.posterior().deviation_scales().shape == (1,)


def test_columns_are_those_of_the_fit_unless_others_are_given(inputs, tmp_path):
    rows = documents().rename(columns={"task": "who"})
    rows = rows.assign(question="one two", answer=rows.pop("text"))
    columns = {"task_column": "who", "prompt_column": "question", "completion_column": "answer"}
    options = inputs | columns | {"data": write_table(tmp_path / "old.csv", rows), "epochs": 1}
    run = map_run(options | {"output_dir": tmp_path / "run", "max_train_documents": 2, "max_eval_documents": 1})
    new = rows[rows["who"] == "Cleo"].assign(who="Dora").head(2)

    def adapted(table, **given):
        data = write_table(tmp_path / "new.csv", table)
        config = AdaptConfig(run=str(run), data=data, steps=1, output_dir=str(tmp_path / "new"), overwrite=True, **given)
        run_adapt(config, quiet=True)
        return load_run(tmp_path / "new")

    found = adapted(new)
    assert found.fitted.tasks == ["Dora"]
    predicted, whole = int(found.data.train.predicted[0]), int(found.data.train.lengths[0]) - 1
    assert predicted < whole  # the prompt is only read
    assert {name: getattr(found.config, name) for name in columns} == columns
    # a text alone is no completion of the fit's prompts, and another pair of columns is taken as it is given
    alone = adapted(new.assign(text=new["answer"]), text_column="text")
    assert int(alone.data.train.predicted[0]) == int(alone.data.train.lengths[0]) - 1
    assert (alone.config.prompt_column, alone.config.task_column) == (None, "who")
    other = adapted(new.rename(columns={"question": "q", "answer": "a"}), prompt_column="q", completion_column="a")
    assert int(other.data.train.predicted[0]) == predicted


FITTED = {
    "learned": {},
    "learned by task": {"tau_per": "task", "tau_start": 50},
    "centered": {"tau": 30, "prior_form": "centered"},
    "independent": {"tau": 0, "learning_rate": 0.003},
    "norm": {"tau": 500, "penalty": "norm"},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("prior", FITTED)
def test_every_adapter_and_prior_comes_back_from_its_folder(inputs, tmp_path, adapter, prior):
    if adapter == "triadapt" and prior == "norm":
        pytest.skip("a penalty of norms refuses masks")
    options = inputs | {"epochs": 1, "adapter": adapter, "targets": "v_proj", "max_train_documents": 2, "max_eval_documents": 1}
    fitted = load_run(map_run(options | FITTED[prior] | {"output_dir": tmp_path / "run"})).fitted
    data = write_table(tmp_path / "new.csv", documents(("Cleo",), number=2).assign(task="Dora"))
    config = AdaptConfig(run=str(tmp_path / "run"), data=data, steps=1, output_dir=str(tmp_path / "new"), learning_rate=0.1)
    metrics = run_adapt(config, quiet=True)
    found = load_run(tmp_path / "new")
    [norm] = found.fitted.deviation_norms().tolist()
    assert norm == pytest.approx(metrics["tasks"]["dora"]["deviation_norm"], rel=1e-5)
    assert norm > 0
    # τ of what all share is infinite, and no part of the mean
    assert metrics["tau"] == found.fitted.tau() == pytest.approx(fitted.tau(), rel=1e-5)
    assert math.isfinite(metrics["tau"])
    assert found.fitted.model.prior.penalty == ("norm" if prior == "norm" else "normal")
    written = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert written["tau"] == metrics["tau"]
    assert {name for name, tau in written["tau_by_group"].items() if tau is None} == {
        name for name in fitted.model.starts if name.rpartition(".")[-1] in fitted.model.adapter.shared
    }


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1.0])
def test_a_given_tau_is_no_other_than_a_prior_can_have(finished, tmp_path, value):
    data = write_table(tmp_path / "new.csv", documents(("Cleo",), number=2))
    run_adapt(AdaptConfig(run=str(finished), data=data, steps=1, output_dir=str(tmp_path / "new")), quiet=True)
    file = tmp_path / "new" / "posterior.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(name for name in tensors if name.startswith("tau.") and not name.startswith("tau.mean."))
    save_file(tensors | {name: torch.full_like(tensors[name], value)}, file, metadata)
    with pytest.raises(InputError) as caught:
        load_run(tmp_path / "new")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": ""}, "data is empty|no data is given"),
        ({"steps": 0}, "steps is 0"),
        ({"guide": "laplace"}, "guide is 'laplace'; allowed: map, normal"),
        ({"output_dir": "RUN"}, "is the run itself"),
        ({"text_column": "txt"}, "no column 'txt'"),
        ({"stepz": 3}, "unknown option 'stepz'; did you mean 'steps'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(finished, tmp_path, capsys, change, words):
    data = write_table(tmp_path / "new.csv", documents(("Cleo",), number=3))
    options = {"data": data, "output_dir": tmp_path / "new"} | change
    options = {key: str(finished) if value == "RUN" else value for key, value in options.items()}
    assert command_main("adapt")([str(finished), *line(options)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert re.search(words, error), error
    assert not (tmp_path / "new").exists()


def test_a_group_of_a_new_task_stands_on_one_side(finished, tmp_path, capsys):
    rows = documents(("Cleo",), number=4).assign(doc_id=["a", "a", "b", "b"], split=["train", "test", "train", "train"])
    words = line({"data": write_table(tmp_path / "new.csv", rows), "split_column": "split", "output_dir": tmp_path / "new"})
    assert command_main("adapt")([str(finished), *words]) == 2
    assert "group 'a' of task 'Cleo' is in train and in test; put the whole group on one side" in capsys.readouterr().err


def test_a_table_of_one_new_task_and_a_limit_of_documents(finished, tmp_path):
    rows = pd.concat([documents(("Cleo",), number=6), documents(("Ada",), number=2)])
    data = write_table(tmp_path / "new.csv", rows)
    chosen = line({"data": data, "max_train_documents": 3, "steps": 2, "output_dir": tmp_path / "new"})
    assert command_main("adapt")([str(finished), *chosen]) == 0
    assert load_run(tmp_path / "new").fitted.documents == [2, 3]
