"""The command `continual-fit`: one base for all tasks, the losses after each stage, and what happens after a stop."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from bora_pyro import Backbone, BoRA
from bora_pyro.exchange import continual as stages
from bora_pyro.exchange.continual import continual_fit
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.options import FitOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.continual import ContinualConfig
from bora_pyro.runs.continual import BASE, COMMAND, CONTINUAL, LOSSES
from tests.tiny_base import line, quick_fit

main = COMMAND.main


def ended(options, capsys):
    """The exit code, and what was written to stderr."""
    code = main(line(options))
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a quick sequence, and its folder."""
    folder = tmp_path_factory.mktemp("continual")
    options = {name: value for name, value in quick_fit(folder).items() if name != "tau"} | {"learning_rate": 0.03, "seed": 2}
    assert main(line(options | {"output_dir": folder / "whole"})) == 0
    return options, folder / "whole"


def test_it_is_that_of_the_library(given):
    options, folder = given
    config = parse_config(ContinualConfig, line(options))
    model, data = build_run(config.map_fit, quiet=True)
    fit_options = vars(part_of(config, FitOptions))
    expected = continual_fit(model.backbone, data, adapter=model.adapter, likelihood=model.likelihood, **fit_options)
    table = pd.read_csv(folder / LOSSES, index_col="after")
    assert list(table.index) == ["base", *data.tasks]
    assert list(table.columns) == data.tasks
    torch.testing.assert_close(torch.tensor(table.to_numpy()), expected.matrix, rtol=1e-12, atol=0)
    record = json.loads((folder / CONTINUAL).read_text(encoding="utf-8"))
    assert (record["average"], record["forgetting"]) == (expected.average, expected.forgetting)
    assert [stage["preserve"] for stage in record["stages"]] == [stage.preserve for stage in expected.stages]
    merged = Backbone.from_pretrained(folder / BASE, targets=config.targets)
    assert merged.digest == model.backbone.digest
    (scores,) = evaluate(BoRA(merged, data.num_tasks), data.test, None)
    assert scores.perplexity(0) == pytest.approx(float(torch.tensor(table.iloc[-1, 0]).exp()), rel=1e-5)


def test_a_stopped_sequence_goes_on(given, tmp_path, monkeypatch, capsys):
    options, folder = given
    options = options | {"output_dir": tmp_path / "again"}
    usual, calls = stages.fit, []

    def stopped(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*args, **more)

    monkeypatch.setattr(stages, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(line(options))
    assert len(json.loads((tmp_path / "again" / CONTINUAL).read_text(encoding="utf-8"))["stages"]) == 1
    assert not [entry for entry in tmp_path.iterdir() if entry.name != "again"]
    code, err = ended(options, capsys)
    assert code == 2
    assert "holds an earlier result; give --overwrite true" in err
    code, err = ended(options | {"resume": "true", "epochs": 4}, capsys)
    assert code == 2
    assert "epochs is 4, but" in err
    code, err = ended(options | {"resume": "true"}, capsys)
    assert code == 0, err
    assert "1 of 3 tasks are merged already" in err
    for name in (LOSSES, f"{BASE}/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preserve_to": 1.5}, "preserve_to is 1.5; give a number from 0 to 1, nearest: 1"),
        ({"adapter": "osft"}, "adapter is osft, which wraps the adapter of each task here anyway"),
        ({"tau": "inf"}, "tau is inf; give a finite number from 0"),
        ({"task_dropout": 0.1}, "task_dropout is 0.1, which tasks one after another have no use for; leave it out"),
        ({"order": "nobody"}, "task 'nobody' is not in the data"),
        ({"preserve_from": 0.001}, "preserves no direction of layer"),
        ({"resume": "true"}, "there is no sequence to resume in"),
        ({"resume": "true", "overwrite": "true"}, "overwrite and resume are both true"),
    ],
)
def test_bad_input(given, changes, message, tmp_path, capsys):
    options, _ = given
    code, err = ended(options | {"output_dir": tmp_path / "new"} | changes, capsys)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_merge_that_rounding_changes_has_a_note(given, tmp_path, capsys):
    options, _ = given
    names = pd.read_csv(options["data"]).task.unique()
    code, err = ended(options | {"output_dir": tmp_path / "half", "precision": "bfloat16", "order": names[0]}, capsys)
    assert code == 0
    record = json.loads((tmp_path / "half" / CONTINUAL).read_text(encoding="utf-8"))
    assert record["stages"][0]["rounding"] > 0.01
    note = f"rounding to bfloat16 changes what {names[0]!r} merged by {record['stages'][0]['rounding']:.0%}"
    assert f"note: {note}" in err
    assert any(note in line for line in record["notes"])
