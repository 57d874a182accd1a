"""The command `meta-fit`: a run folder like any other, an adaptation by the same inner steps, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from bora_pyro.inference.inner_steps import InnerOptions
from bora_pyro.inference.meta_adapt import meta_adapt
from bora_pyro.inference.meta_fit import meta_fit
from bora_pyro.inference.meta_options import MetaOptions
from bora_pyro.options.command_line import parse_config
from bora_pyro.options.field import part_of
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.meta_fit import MetaFitConfig
from bora_pyro.runs.saved import load_run
from tests.tiny_base import command_main, documents, line, quick_fit, write_table

main = command_main("meta-fit")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of a quick meta-fit, and its run folder."""
    folder = tmp_path_factory.mktemp("meta")
    options = {name: value for name, value in quick_fit(folder).items() if name != "tau"}
    options |= {"inner_steps": 2, "inner_rate": 0.5, "scale": 0.02, "positivity": "exp", "draws": 2, "tasks_per_step": 2}
    assert main(line(options | {"output_dir": folder / "run"})) == 0
    return options, folder / "run"


@pytest.fixture(scope="module")
def new_table(tmp_path_factory):
    rows = documents(("Cleo",), number=8, seed=5).assign(task="Dora", split=["train"] * 5 + ["test"] * 3)
    return write_table(tmp_path_factory.mktemp("new") / "new.csv", rows)


def test_the_folder_is_what_the_library_fits(given):
    options, folder = given
    config = parse_config(MetaFitConfig, line(options))
    model, data = build_run(config.map_fit, quiet=True)
    expected = meta_fit(model, data, part_of(config, MetaOptions))
    found = load_run(folder)
    assert found.meta_config.inner_steps == 2
    assert found.fitted.best_epoch == expected.best_epoch
    for name, value in expected.guide.state_dict().items():
        assert torch.equal(found.fitted.guide.state_dict()[name], value), name
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found.fitted.evaluate(found.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    assert metrics["guide"] == "task_normal"
    assert metrics["meta"]["inner_steps"] == 2
    assert metrics["mixture"]["ece"] >= 0
    assert all(len(taus) == 2 for taus in metrics["tau_by_group"].values())  # a number a layer, not one an entry
    log = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    written = load_file(folder / "adapters" / "ada" / "adapter_model.safetensors")
    theta, slot = found.fitted.weights()[0], found.fitted.model.backbone.slots[0]
    assert torch.equal(written[f"base_model.model.{slot.paths[0]}.lora_A.weight"], theta[f"{slot.name}.lora_A"][0, 0])
    assert found.posterior().deviation_scales(draws=2).shape == (3,)


def test_an_adaptation_takes_the_inner_steps_of_the_fit(given, new_table, tmp_path, capsys):
    _, folder = given
    adapt = command_main("adapt")
    words = line({"data": new_table, "split_column": "split", "output_dir": tmp_path / "new"})
    assert adapt([str(folder), *words]) == 0, capsys.readouterr().err
    found, run = load_run(tmp_path / "new"), load_run(folder)
    expected = meta_adapt(run.fitted, found.data, InnerOptions(steps=2, rate=0.5, token_budget=256))
    for name, value in expected.sites().items():
        torch.testing.assert_close(found.fitted.sites()[name], value, rtol=0, atol=0)
    for name, value in expected.guide.state_dict().items():
        assert torch.equal(found.fitted.guide.state_dict()[name], value), name
    assert float(found.fitted.deviation_norms()[0]) > 0
    config = found.folder.read_config()
    assert (config["steps"], config["learning_rate"], config["guide"]) == (2, 0.5, None)
    assert found.metrics["meta"] == {"inner_steps": 2, "inner_rate": 0.5, "beta": 1e-3}


def test_no_steps_give_the_prior_and_a_guide_its_own_fit(given, new_table, tmp_path):
    _, folder = given
    adapt = command_main("adapt")
    options = {"data": new_table, "split_column": "split"}
    assert adapt([str(folder), *line(options | {"steps": 0, "output_dir": tmp_path / "none"})]) == 0
    none = load_run(tmp_path / "none")
    (theta, mean), (_, of_fit) = none.fitted.weights(), load_run(folder).fitted.weights()
    for name in theta:
        assert torch.equal(theta[name][0], mean[name])
        assert torch.equal(mean[name], of_fit[name])
    assert adapt([str(folder), *line(options | {"guide": "map", "steps": 2, "output_dir": tmp_path / "map"})]) == 0
    assert load_run(tmp_path / "map").is_point


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "true"}, "resume is true, but a meta-fit has no checkpoints; start it again with --overwrite true"),
        ({"beta": "1e-15"}, "beta is 1e-15, and beta KL is lost in the rounding of the loss"),
        ({"beta": "-1"}, "beta is -1.0; give a finite number from 0 (the plain likelihood) up"),
        ({"inner_steps": 0}, "inner_steps is 0; give a whole number from 1 up"),
        ({"scale": 0}, "scale is 0.0; give a finite number above 0"),
        ({"positivity": "softmax"}, "positivity is 'softmax'; allowed: softplus, exp; did you mean 'softplus'?"),
        ({"shard_base": "true"}, "shard_base is true, but a meta-fit runs in one process"),
        ({"adapter": "triadapt"}, "changes during a fit, which a meta-fit does not do"),
        ({"tau": 100}, "unknown option 'tau'"),
    ],
)
def test_bad_input(given, changes, message, tmp_path, capsys):
    options, _ = given
    code = main(line(options | {"output_dir": tmp_path / "new"} | changes))
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_a_run_cannot_do(given, new_table, inputs, map_run, tmp_path, capsys):
    _, folder = given
    assert command_main("posterior-fit")([str(folder), "--output_dir", str(tmp_path / "posterior")]) == 2
    assert "is a meta-fit, whose tasks have posteriors already" in capsys.readouterr().err
    words = line({"data": new_table, "steps": 0, "output_dir": tmp_path / "new"})
    assert command_main("adapt")([str(map_run), *words]) == 2
    assert "steps is 0; give a whole number from 1 up" in capsys.readouterr().err
    for name in ("task_group", "start_from_generator"):
        words = line({"data": new_table, name: "whig", "output_dir": tmp_path / "new"})
        assert command_main("adapt")([str(folder), *words]) == 2
        assert f"{name} is 'whig', but new tasks of the run in {folder} begin at the point of meta-fit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_plain_likelihood_has_a_note(given, tmp_path, capsys):
    options, _ = given
    assert main(line(options | {"beta": 0, "epochs": 1, "output_dir": tmp_path / "plain"})) == 0
    assert "note: beta is 0: each task maximises its plain likelihood" in capsys.readouterr().err
    notes = json.loads((tmp_path / "plain" / "metrics.json").read_text(encoding="utf-8"))["notes"]
    assert any(note.startswith("beta is 0") for note in notes)
