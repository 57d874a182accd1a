"""From a run folder back to the same model, the same data and the same numbers; and what a run that is not whole says."""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bora_pyro.errors import InputError
from bora_pyro.files.tensors import DIGEST
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.saved import load_run
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


def metadata(file):
    """What a posterior says of itself, but for its digest: what is written with it is damage that somebody has meant."""
    with safe_open(file, framework="pt") as opened:
        return {name: value for name, value in opened.metadata().items() if name != DIGEST}


def change_config(run, **changes):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | changes))


def change_tensors(change):
    def apply(run):
        file = run / "posterior.safetensors"
        tensors, kept = load_file(file), metadata(file)
        save_file(change(tensors) or tensors, file, kept)

    return apply


def change_metadata(**changes):
    def apply(run):
        file = run / "posterior.safetensors"
        kept = {**metadata(file), **changes}
        save_file(load_file(file), file, {name: value for name, value in kept.items() if value is not None})

    return apply


def config(**changes):
    return lambda run: change_config(run, **changes)


def cut(name, *, keep=0.5):
    def apply(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: int(keep * len(content))])

    return apply


def flip(name, *, place=-100):
    def apply(run):
        content = bytearray((run / name).read_bytes())
        content[place] ^= 64
        (run / name).write_bytes(content)

    return apply


def without(name):
    return lambda run: (run / name).unlink()


def content(name, text):
    return lambda run: (run / name).write_text(text)


def change_json(name, change):
    def apply(run):
        stored = json.loads((run / name).read_text())
        change(stored)
        (run / name).write_text(json.dumps(stored))

    return apply


SITE = "prior_mean.v_proj.lora_A"
DAMAGES = {
    "no such folder": (shutil.rmtree, "run folder {run} does not exist; give the --output_dir of a fit"),
    "no run": (without("config.yaml"), "{run} is no run folder: it has no config.yaml; give the --output_dir of a fit"),
    "unfinished": (
        without("metrics.json"), "the run in {run} is not finished: it has no metrics.json; finish it with --resume true"
    ),
    "metrics cut": (cut("metrics.json"), "{run}/metrics.json cannot be read (*); run the fit again with --resume true"),
    "metrics of no tasks": (
        change_json("metrics.json", lambda metrics: metrics.update(tasks={"ada": {"name": "Ada"}})),
        "{run}/metrics.json has other tasks than split.json; run the fit again with --resume true",
    ),
    "metrics without a score": (
        change_json("metrics.json", lambda metrics: metrics["tasks"]["ada"].pop("test_perplexity")),
        "{run}/metrics.json has no 'test_perplexity' of task 'Ada'; run the fit again with --resume true",
    ),
    "metrics empty": (
        content("metrics.json", "{}"), "{run}/metrics.json has no 'test_perplexity'; run the fit again with --resume true"
    ),
    "log damaged": (content("metrics.jsonl", "{\n{}\n"), "{run}/metrics.jsonl is damaged (*); fit again"),
    "split missing": (without("split.json"), "{run}/split.json cannot be read (*); run the fit again with --resume true"),
    "split cut": (cut("split.json"), "{run}/split.json cannot be read (*); run the fit again with --resume true"),
    "split of something else": (content("split.json", "{}"), "the split record has no entry 'tasks' of the form *"),
    "split without a group": (
        change_json("split.json", lambda split: split["tasks"]["Ada"].popitem()),
        "group * of task 'Ada' is not in the split record; use the table that was split, or split anew",
    ),
    "unknown key": (config(tua=3), "{run}/config.yaml: unknown option 'tua'; did you mean 'tau'?"),
    "value of another kind": (config(rank="many"), "{run}/config.yaml: rank: 'many' cannot be used; give a whole number"),
    "value out of range": (config(rank=0), "rank is 0; give a whole number from 1 up"),
    "config cut": (content("config.yaml", "tau: [1"), "{run}/config.yaml cannot be read (*); fit again"),
    "posterior missing": (without("posterior.safetensors"), "{run}/posterior.safetensors does not exist; *"),
    "posterior cut": (cut("posterior.safetensors"), "{run}/posterior.safetensors is damaged (*); run the fit again"),
    "posterior cut in its head": (
        cut("posterior.safetensors", keep=0.001), "{run}/posterior.safetensors is damaged (*); run the fit again"
    ),
    "another guide": (
        change_metadata(guide="norml"), "the run in {run} was fitted with guide 'norml'; known are map, *; did you mean 'normal'?"
    ),
    "other tasks": (
        change_metadata(tasks='["Ada"]'), "the posterior in {run} has other tasks than its split.json; run the fit again"
    ),
    "no tasks": (change_metadata(tasks=None), "the posterior in {run} has other tasks than its split.json; run the fit again"),
    "another rank": (
        config(rank=3),
        f"the posterior in {{run}} has {SITE!r} of shape (2, 2, 16), expected (2, 3, 16); "
        "run the fit again, or restore its config.yaml",
    ),
    "other targets": (
        config(targets=["v_proj"]),
        "the posterior in {run} has 'prior_mean.fc2.lora_A', which its config.yaml does not ask for*; "
        "run the fit again, or restore its config.yaml",
    ),
    "another prior": (
        config(tau=0.0),
        "the posterior in {run} has no 'theta.fc2.lora_A', which its config.yaml asks for; "
        "run the fit again, or restore its config.yaml",
    ),
    "a learned tau that is not there": (
        config(tau="learned"), "the posterior in {run} has no 'tau.fc2.lora_A', which its config.yaml asks for; *"
    ),
    "another adapter": (
        config(adapter="lora_frozen_a"),
        "the posterior in {run} has no 'fixed_sample.fc2.lora_A', which its config.yaml asks for; *",
    ),
    "another scale": (
        config(alpha=99.0),
        "the posterior in {run} is of BoRA(3 tasks, LoRA(rank=2, alpha=2.0), *its config.yaml asks for *alpha=99.0*; "
        "restore its config.yaml, or run the fit again",
    ),
    "another unit": (config(likelihood_unit="documents"), "*CausalLM(unit='tokens')), its config.yaml asks for *'documents'*"),
    "another tau": (config(tau=10.0), "*HierarchicalNormal(tau=1000)*asks for *HierarchicalNormal(tau=10)*"),
    "a bit of the posterior": (
        flip("posterior.safetensors"),
        "{run}/posterior.safetensors is damaged (its bytes are not those that were written); run the fit again",
    ),
    "whole numbers": (
        change_tensors(lambda tensors: tensors | {SITE: tensors[SITE].long()}),
        f"the posterior in {{run}} has {SITE!r} of type int64, expected float32; *",
    ),
    "numbers of twice the length": (
        change_tensors(lambda tensors: tensors | {SITE: tensors[SITE].double()}),
        f"the posterior in {{run}} has {SITE!r} of type float64, expected float32; *",
    ),
    "a site gone": (
        change_tensors(lambda tensors: {name: value for name, value in tensors.items() if name != SITE}),
        f"the posterior in {{run}} has no {SITE!r}, which its config.yaml asks for; *",
    ),
    "data gone": (config(data="gone.csv"), "*gone.csv*"),
    "base model gone": (config(base_model="gone/model/of/mine"), "*gone/model/of/mine*"),
    "fewer documents read": (
        config(max_train_documents=1),
        "the run in {run} had * train documents, but the data now have 3; use the documents of the fit, or fit again",
    ),
}  # fmt: skip


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
