"""A posterior that was stopped: it goes on around its own fit alone, and its records are of what was fitted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from bora_pyro import InputError
from bora_pyro.inference.loop import Loop
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig, parse_config
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import _guide, run_posterior_fit
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.signals import StopSignals


def test_a_resumed_posterior_is_the_uninterrupted_one(tmp_path, map_run, monkeypatch):
    options = {"run": str(map_run), "draws": 2, "epochs": 3, "threads": 1, "patience": 0}
    whole = run_posterior_fit(PosteriorFitConfig(**options, output_dir=str(tmp_path / "whole")), quiet=True)
    broken = PosteriorFitConfig(**options, output_dir=str(tmp_path / "broken"))

    class Killed(Exception):
        pass

    from bora_pyro.runs import folder as run_folder

    original = run_folder.RunFolder.log

    def log(self, record):
        if record["epoch"] == 2:
            raise Killed
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "log", log)
        with pytest.raises(Killed):
            run_posterior_fit(broken, quiet=True)
    with pytest.raises(InputError, match=r"is not finished"):
        load_run(tmp_path / "broken")
    broken.resume = True
    resumed = run_posterior_fit(broken, quiet=True)
    assert resumed["test_perplexity"] == pytest.approx(whole["test_perplexity"], rel=1e-6)
    assert resumed["mixture_test_perplexity"] == pytest.approx(whole["mixture_test_perplexity"], rel=1e-6)
    broken.temperature = 0.5
    with pytest.raises(InputError, match=r"temperature is 0.5, but the run in .* has 1.0"):
        run_posterior_fit(broken, quiet=True)


@pytest.fixture
def begun(tmp_path, map_run, monkeypatch):
    """A copy of the MAP fit, and the configuration of a posterior around it that was stopped after an epoch and a step."""
    source = Path(shutil.copytree(map_run, tmp_path / "source"))
    config = PosteriorFitConfig(
        run=str(source), output_dir=str(tmp_path / "posterior"), epochs=3, draws=2, threads=1, patience=0, token_budget=64
    )
    steps = Loop(
        load_run(source).fitted.model, load_run(source).data, _guide(config, load_run(source)), learning_rate=1.0, warmup=0.0,
        token_budget=64, accumulate=1, gradient_clip=1.0, seed=0, epochs=3,
    ).steps_per_epoch  # fmt: skip
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "__call__", lambda signals: asked.append(signals) or len(asked) == steps + 1)
        with pytest.raises(RunStopped):
            run_posterior_fit(config, quiet=True)
    return dataclasses.replace(config, resume=True)


def files_of(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def refused(config, message):
    before = files_of(config.output_dir)
    with pytest.raises(InputError, match=message) as caught:
        run_posterior_fit(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert files_of(config.output_dir) == before


def fit_again(source, **changes):
    options = parse_config(MapFitConfig, ["--config", str(source / "config.yaml"), "--output_dir", str(source)])
    run_map_fit(dataclasses.replace(options, overwrite=True, **changes), quiet=True)


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"learning_rate": 0.001}, "config.yaml"),
        ({"seed": 3}, "config.yaml"),
        (None, "split.json"),
        ({}, "posterior.safetensors"),
    ],
    ids=str,
)
def test_a_posterior_goes_on_around_its_own_fit_alone(tmp_path, begun, changes, file):
    source, message = (
        tmp_path / "source",
        rf"source/{file} is not what the posterior in .* began from, for the run was fitted again",
    )
    kept = (source / "config.yaml").read_bytes()
    if changes is None:  # the same sites with documents on other sides
        split = json.loads((source / "split.json").read_text())
        (source / "split.json").write_text(json.dumps(split | {"fractions": None}))
    elif changes:
        fit_again(source, **changes)
    else:  # other sites by the same options
        fit_again(source, epochs=1)
        (source / "config.yaml").write_bytes(kept)
    refused(begun, message)


def test_a_posterior_writes_nothing_of_its_source_again(tmp_path, begun):
    folder = RunFolder(tmp_path / "posterior")
    before = {name: (folder.path / name).stat().st_mtime_ns for name in ("fit.yaml", "split.json", "source.json")}
    fit_again(tmp_path / "source")  # the same fit, bit by bit
    metrics = run_posterior_fit(begun, quiet=True)
    assert metrics["epochs"] == 3
    assert {name: (folder.path / name).stat().st_mtime_ns for name in before} == before
    whole = run_posterior_fit(dataclasses.replace(begun, output_dir=str(tmp_path / "whole"), resume=False), quiet=True)
    assert whole["test_perplexity"] == metrics["test_perplexity"]
    # an older posterior does not say which fit it was
    (folder.path / "source.json").unlink()
    assert run_posterior_fit(dataclasses.replace(begun, epochs=4), quiet=True)["epochs"] == 4


def test_batches_of_a_posterior_wait_for_the_next_epoch(begun):
    refused(
        dataclasses.replace(begun, token_budget=128), r"token_budget is 128, but .* within an epoch with token_budget 64; give"
    )
    refused(dataclasses.replace(begun, accumulate=2), r"accumulate is 2, but .* within an epoch with accumulate 1; give")


def test_the_records_of_a_posterior_are_of_what_was_fitted(tmp_path, begun, capsys, monkeypatch):
    metrics = run_posterior_fit(begun, quiet=True)
    before = files_of(begun.output_dir)
    other = dataclasses.replace(begun, epochs=2, learning_rate=0.5, draws=3)
    assert run_posterior_fit(other) == metrics
    assert "note: nothing is left to fit: 3 epochs are done" in capsys.readouterr().err
    assert files_of(begun.output_dir) == before
    (tmp_path / "posterior" / "metrics.json").unlink()
    again = run_posterior_fit(other, quiet=True)
    assert (again["learning_rate"], again["draws"], again["epochs"]) == (begun.learning_rate, 2, 3)
    assert again["mixture_test_perplexity"] == metrics["mixture_test_perplexity"]
    assert (tmp_path / "posterior" / "config.yaml").read_bytes() == before[tmp_path / "posterior" / "config.yaml"]
    monkeypatch.setattr(StopSignals, "__call__", lambda signals: True)
    with pytest.raises(RunStopped):
        run_posterior_fit(dataclasses.replace(begun, epochs=4), quiet=True)
    with pytest.raises(InputError, match=r"is not finished"):
        load_run(begun.output_dir)
