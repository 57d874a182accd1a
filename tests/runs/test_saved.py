"""From a run folder back to the same model, the same data and the same numbers; and what a run that is not whole says."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_pyro.errors import InputError
from bora_pyro.files.tensors import DIGEST
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.saved import load_run
from tests.runs.damaged_runs import DAMAGES, change_config, change_metadata, change_tensors, metadata
from tests.tiny_base import documents, line, quick_fit, write_table

FITS = {
    "independent": {"tau": 0},
    "pooled": {"tau": "inf"},
    "noncentered": {"tau": 1000},
    "centered": {"tau": 5, "prior_form": "centered"},
    "norm": {"tau": 50, "penalty": "norm"},
    "learned": {"tau": "learned", "token_budget": 64, "num_tasks": 2},
    "learned by task": {"tau": "learned", "tau_per": "task", "token_budget": 64, "adapter": "lora_shared_plus_task"},
    "frozen A": {"tau": 5, "adapter": "lora_frozen_a", "seed": 3},
    "few documents": {"tau": 100, "max_train_documents": 4, "max_eval_documents": 1, "num_tasks": 2},
    "documents as units": {"tau": 100, "likelihood_unit": "documents"},
}


def fit(options, folder, **more):
    config = parse_config(MapFitConfig, line({**options, **more, "learning_rate": 0.03, "output_dir": folder}))
    run_map_fit(config, quiet=True)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit."""
    return quick_fit(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of one finished run; copy it before changing it."""
    return fit(inputs, tmp_path_factory.mktemp("runs") / "run", tau=1000)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("more", FITS.values(), ids=FITS)
def test_a_run_gives_its_numbers_again(inputs, tmp_path, more):
    loaded = load_run(fit(inputs, tmp_path / "run", **more))
    stored = loaded.metrics
    again = loaded.fitted.evaluate(loaded.data.test)
    assert again["test_perplexity"] == pytest.approx(stored["test_perplexity"], rel=1e-6)
    assert again["base_test_perplexity"] == pytest.approx(stored["base_test_perplexity"], rel=1e-6)
    validation = loaded.fitted.evaluate(loaded.data.validation, name="validation")
    assert validation["validation_perplexity"] == pytest.approx(stored["validation_perplexity"], rel=1e-6)
    assert loaded.fitted.tasks == [row["name"] for row in stored["tasks"].values()]
    assert loaded.data.train.documents_per_task == [row["train_documents"] for row in stored["tasks"].values()]
    assert loaded.data.split_record == loaded.folder.read_split()
    norms = [row["deviation_norm"] for row in stored["tasks"].values()]
    torch.testing.assert_close(loaded.fitted.deviation_norms(), torch.tensor(norms), rtol=1e-6, atol=1e-7)
    assert loaded.fitted.best_epoch == stored["best_epoch"]
    assert loaded.fitted.validation_perplexity == stored["validation_perplexity"]
    assert [entry["epoch"] for entry in loaded.fitted.history] == [1, 2]
    tensors = load_file(loaded.folder.path / "posterior.safetensors")
    learned = {name: value for name, value in loaded.fitted.model.prior.state().items() if name.startswith("tau.")}
    assert bool(learned) == (more["tau"] == "learned")
    for name, value in learned.items():
        assert torch.equal(value, tensors[name])
        assert (value != 100).any()
    sites = {name: value for name, value in tensors.items() if not name.startswith(("fixed_sample.", "tau."))}
    for name, value in loaded.fitted.sites().items():
        assert torch.equal(value, sites.pop(name))
    assert not sites


def test_fixed_tensors_are_built_again_and_known_by_a_sample(inputs, tmp_path):
    folder = fit(inputs, tmp_path / "run", **FITS["frozen A"])
    file = folder / "posterior.safetensors"
    with_metadata, tensors = metadata(file), load_file(file)
    model = load_run(folder).fitted.model
    assert {f"fixed_sample.{name}" for name in model.fixed} == {name for name in tensors if name.startswith("fixed")}
    assert all(value.numel() <= 64 for name, value in tensors.items() if name.startswith("fixed"))
    name = next(name for name in tensors if name.startswith("fixed"))
    save_file(tensors | {name: 1.01 * tensors[name]}, file, with_metadata)
    with pytest.raises(InputError, match=r"the fixed tensor '\w+\.lora_A' of FrozenALoRA.* is not that of the run"):
        load_run(folder)


def test_an_older_run_brings_its_fixed_tensors(inputs, tmp_path):
    folder = fit(inputs, tmp_path / "run", **FITS["frozen A"])
    file = folder / "posterior.safetensors"
    with_metadata, tensors = metadata(file), load_file(file)
    fixed = {f"fixed.{name}": 2 * value for name, value in load_run(folder).fitted.model.fixed.items()}
    save_file({name: value for name, value in tensors.items() if not name.startswith("fixed")} | fixed, file, with_metadata)
    model = load_run(folder).fitted.model
    assert {f"fixed.{name}" for name in model.fixed} == fixed.keys()
    for name, value in model.fixed.items():
        assert torch.equal(value, fixed[f"fixed.{name}"])


def test_loading_draws_no_random_numbers_and_sets_no_threads(run):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    load_run(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_run_fitted_on_another_device(run):
    change_config(run, device="cuda:9")
    assert load_run(run).config.device == "auto"
    with pytest.raises(InputError, match="device 'cuda:99' is not available"):
        load_run(run, device="cuda:99")


def test_a_table_that_has_grown_by_a_task_is_split_as_before(run, tmp_path):
    grown = pd.concat([documents(), documents(("Aaron",))])
    change_config(run, data=write_table(tmp_path / "grown.csv", grown))
    loaded = load_run(run)
    assert loaded.fitted.tasks == ["Ada", "Børge B.", "Cleo"]
    again = loaded.fitted.evaluate(loaded.data.test)["test_perplexity"]
    assert again == pytest.approx(loaded.metrics["test_perplexity"], rel=1e-6)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_run_that_is_not_whole(run, damage, message):
    damage(run)
    with pytest.raises(InputError) as caught:
        load_run(run)
    said = str(caught.value)
    assert "\n" not in said
    assert fnmatchcase(said, message.format(run=run).replace("[", "[[]")), said


def test_a_table_whose_texts_are_others_is_refused(run, tmp_path):
    rows = documents()
    rows.loc[0, "text"] = rows.loc[0, "text"].replace(" ", " and ", 1)
    change_config(run, data=write_table(tmp_path / "others.csv", rows))
    with pytest.raises(
        InputError, match=r"the posterior in .* is of other documents: .*; use the data that it was .*, or fit again"
    ):
        load_run(run)
    change_metadata(data=None)(run)  # an older run cannot tell
    load_run(run)


def test_a_base_whose_weights_are_others_is_refused(inputs, run, tmp_path):
    base = Path(shutil.copytree(inputs["base_model"], tmp_path / "base"))
    change_config(run, base_model=str(base))
    score = load_run(run).metrics["test_perplexity"]  # a copy is the same base
    weights = load_file(base / "model.safetensors")
    weights["model.decoder.layers.1.fc2.weight"] *= 1.1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"the posterior in .* is of another base model: .*; use the base .*, or fit again"):
        load_run(run)
    change_metadata(base=None)(run)
    loaded = load_run(run)
    assert loaded.fitted.evaluate(loaded.data.test)["test_perplexity"] != pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize("lines", [3, 1])
def test_a_table_that_lost_rows(run, tmp_path, lines):
    change_config(run, data=write_table(tmp_path / "short.csv", documents()[:-lines]))
    with pytest.raises(InputError, match="groups of task 'Cleo' in the split record are not in the table"):
        load_run(run)


@pytest.mark.parametrize(("tau", "least"), [(-1.0, "-1"), (0.0, "0"), (float("nan"), None)])
def test_a_learned_tau_that_is_none(inputs, tmp_path, tau, least):
    run = fit(inputs, tmp_path / "run", tau="learned", token_budget=64)
    change_tensors(lambda found: {name: value * 0 + tau if name.startswith("tau.") else value for name, value in found.items()})(
        run
    )
    what = f"with values that it cannot have (the least is {least})" if least else "with values that are not finite"
    with pytest.raises(InputError, match=rf"the posterior in .* has 'tau\..*' {re.escape(what)}; run the fit again"):
        load_run(run)


def test_a_run_that_is_older_than_its_digests_is_read(run):
    change_metadata(model=None, description=None)(run)
    assert DIGEST not in RunFolder(run).load_metadata("posterior")
    assert load_run(run).metrics == RunFolder(run).read_metrics()


def test_a_run_that_is_older_than_its_description_tells_its_adapter(run):
    change_metadata(description=None)(run)
    assert load_run(run).metrics == RunFolder(run).read_metrics()
    change_config(run, alpha=99.0)
    with pytest.raises(InputError, match=r"is of BoRA\(3 tasks, LoRA\(rank=2, alpha=2.0\), .* asks for .*alpha=99.0"):
        load_run(run)


@pytest.mark.parametrize("description", ["{", "[" * 10**5, "{}", "null"])
def test_a_description_that_is_none_is_refused(run, description):
    change_metadata(description=description)(run)
    with pytest.raises(InputError, match=r"restore its config\.yaml, or run the fit again"):
        load_run(run)
