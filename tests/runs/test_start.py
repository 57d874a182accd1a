"""A fit that starts from an adapter in a PEFT folder."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_pyro import Backbone, InputError, read_peft
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.saved import load_run
from tests.tiny import loaded_peft, random_ids
from tests.tiny_base import command_main, line, map_run, quick_fit, without_times


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return quick_fit(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def adapter(options, tmp_path_factory):
    """The adapter of a first fit, far from the usual start."""
    return map_run({**options, "learning_rate": 0.1, "output_dir": tmp_path_factory.mktemp("first") / "run"}) / "adapters" / "ada"


@pytest.fixture
def started(options, adapter, tmp_path):
    """Options of a fit that starts from a copy of the adapter."""
    shutil.copytree(adapter, tmp_path / "adapter")
    return {**options, "start_from": tmp_path / "adapter", "output_dir": tmp_path / "run"}


#: A rate at which nothing moves, so that the fit ends where it began.
STILL = {"learning_rate": 1e-30, "epochs": 1}


@pytest.mark.parametrize(
    "how",
    [{}, {"tau": 0}, {"tau": 100}, {"tau": "inf"}, {"tau": 100, "prior_form": "centered"}, {"tau": 50, "start_as": "centre"},
     {"tau": 50, "start_as": "centre", "penalty": "norm"}, {"tau": 100, "task_subsampling": "true"}],
)  # fmt: skip
def test_the_fit_begins_at_the_adapter_bit_for_bit(how, started, adapter):
    run = load_run(map_run({**started, **STILL, **how}))
    theta, mean = run.fitted.weights()
    factors = read_peft(adapter).factors
    model, ids = run.fitted.model, random_ids(1)
    for slot in model.backbone.slots:
        for layer, path in enumerate(slot.paths):
            for name, value in factors[path].items():
                site = f"{slot.name}.{name}"
                torch.testing.assert_close(
                    mean[site][layer], value, atol=1e-7 * (how == {"tau": 0}), rtol=0.0
                )  # an average there
                assert all(torch.equal(of_task, value) for of_task in theta[site][:, layer])
    ours = model.backbone.logits(ids, model.change(theta, torch.tensor([1])))
    theirs = loaded_peft(Backbone.from_pretrained(run.config.base_model).model, adapter)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0.0)  # the weights are equal, the order of additions is not
    assert (ours - model.backbone.logits(ids)).abs().max() > 1e-2


def test_the_centre_of_the_prior_stays(started, adapter, tmp_path):
    strong = load_run(map_run({**started, "tau": 1e6, "start_as": "centre"}))
    weak = load_run(map_run({**started, "tau": 10, "start_as": "centre", "output_dir": tmp_path / "weak"}))
    assert repr(strong.fitted.model.prior).startswith("Given(")
    assert strong.fitted.tau() == pytest.approx(1e6)
    for run in (strong, weak):
        _, mean = run.fitted.weights()
        assert torch.equal(
            mean["v_proj.lora_A"][0], read_peft(adapter).factors[run.fitted.model.backbone.slots[0].paths[0]]["lora_A"]
        )
    assert weak.fitted.deviation_norms().min() > 10 * strong.fitted.deviation_norms().max() > 0


def test_an_interrupted_fit_goes_on_without_the_folder(started, tmp_path):
    whole = map_run({**started, "epochs": 3, "keep_checkpoints": 9})
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "metrics.json").unlink()
    newest = sorted((parts / "checkpoints").iterdir())[1:]
    for file in newest:
        file.unlink()
    assert len(newest) == 2
    shutil.rmtree(started["start_from"])
    map_run({**started, "epochs": 3, "output_dir": parts, "resume": "true"})
    one, other = RunFolder.open(whole), RunFolder.open(parts)
    assert without_times(one.read_log()) == without_times(other.read_log())
    stored = other.load_tensors("posterior")
    assert all(torch.equal(value, stored[name]) for name, value in one.load_tensors("posterior").items())
    assert one.load_metadata("start")["digest"] == other.load_metadata("start")["digest"]


def test_another_adapter_in_its_place_is_refused(started, capsys):
    map_run(started)
    file = started["start_from"] / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert command_main()(line({**started, "epochs": 3, "resume": "true"})) == 2
    assert "has changed since the run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["start_from", "start_as"])
def test_a_run_is_not_resumed_from_another_start(name, started, tmp_path, capsys):
    map_run({**started, "tau": 100})
    other = {"start_from": tmp_path / "other", "start_as": "centre"}
    assert command_main()(line({**started, "tau": 100, "epochs": 3, "resume": "true", name: other[name]})) == 2
    assert name in capsys.readouterr().err


def test_layers_and_ranks_that_the_adapter_lacks_begin_as_usual(started):
    folder = started["start_from"]
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    without = {name: value for name, value in state.items() if "fc2" not in name}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": r".*\.(v_proj|fc2)", "rank_pattern": {r"layers.1.self_attn.v_proj": 1}})
    )
    for name, value in without.items():
        if "layers.1.self_attn.v_proj" in name:
            without[name] = (value[:1] if "lora_A" in name else value[:, :1]).contiguous()
    some = {name: value for name, value in state.items() if "layers.0.fc2" in name}
    save_file(without | some, folder / "adapter_model.safetensors")
    run = map_run({**started, **STILL})
    assert "does not adapt 1 of the layers" in " ".join(RunFolder.open(run).read_metrics()["notes"])
    _, mean = load_run(run).fitted.weights()
    assert (mean["fc2.lora_A"][1] != 0).all()
    assert (mean["fc2.lora_B"][1] == 0).all()
    assert (mean["v_proj.lora_A"][1] != 0).all()
    assert (mean["v_proj.lora_B"][1][:, 1] == 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 4}, "has rank 2, the fit has rank 4; give --rank 2"),
        ({"adapter": "lora_frozen_a"}, "needs --adapter lora and --router by_task"),
        ({"targets": "v_proj"}, "matrices of"),
        ({"start_from": "nowhere"}, "nowhere is no folder"),
        ({"start_as": "centre"}, "needs a number above 0 for tau"),
        ({"start_as": "centre", "tau": "inf"}, "needs a number above 0 for tau"),
        ({"start_as": "centre", "tau": "10", "prior_form": "centered"}, "leave prior and prior_form out"),
        ({"start_as": "center", "tau": "10"}, "did you mean 'centre'?"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(changes, words, started, capsys):
    assert command_main()(line({**started, **changes})) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not started["output_dir"].exists()


def test_a_centre_needs_an_adapter():
    with pytest.raises(InputError, match="name its folder with start_from"):
        parse_config(MapFitConfig, ["--start_as", "centre", "--tau", "10"])


def test_another_scale_is_the_same_change(started, adapter):
    run_map_fit(parse_config(MapFitConfig, line({**started, **STILL, "alpha": 4.0})), quiet=True)
    metrics = RunFolder.open(started["output_dir"]).read_metrics()
    assert re.search("has alpha/r 1, the fit 2; B is multiplied by 0.5", " ".join(metrics["notes"]))
    _, mean = load_run(started["output_dir"]).fitted.weights()
    path = load_run(started["output_dir"]).fitted.model.backbone.slots[0].paths[0]
    assert torch.equal(2 * mean["v_proj.lora_B"][0], read_peft(adapter).factors[path]["lora_B"])
