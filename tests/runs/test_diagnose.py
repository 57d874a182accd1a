"""The command: what it writes for each prior, what it compares, and what it refuses."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
from PIL import Image

from bora_pyro.diagnostics import containers
from bora_pyro.runs import diagnose
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from tests.tiny_base import documents, map_run, quick_fit, write_table

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz

PICTURES = ["dendrogram", "documents", "forest", "heatmap", "pca", "pooling", "ridge"]
TAUS = ("0", "100", "inf")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs by τ."""
    folder = tmp_path_factory.mktemp("runs")
    options = quick_fit(folder) | {"learning_rate": 0.03}
    for tau in TAUS:
        map_run({**options, "tau": tau, "output_dir": folder / tau})
    return {tau: folder / tau for tau in TAUS}


@pytest.fixture(scope="module")
def posterior(runs, tmp_path_factory):
    """Folder of a posterior around the MAP fit at τ = 100."""
    folder = tmp_path_factory.mktemp("posterior") / "posterior"
    options = {"epochs": 1, "draws": 1, "threads": 1}
    run_posterior_fit(PosteriorFitConfig(run=str(runs["100"]), output_dir=str(folder), **options), quiet=True)
    return folder


def test_one_task_stands_near_no_other(runs, tmp_path):
    data = write_table(tmp_path / "new.csv", documents(("Dora",), number=3))
    config = AdaptConfig(run=str(runs["100"]), data=data, steps=2, learning_rate=0.1, output_dir=str(tmp_path / "new"))
    run_adapt(config, quiet=True)
    assert diagnose.COMMAND.main([str(tmp_path / "new"), "--output", str(tmp_path / "out")]) == 0
    of_one = [name for name in PICTURES if name not in ("dendrogram", "pca", "pooling")]
    assert names(tmp_path / "out") == expected(of_one)


def test_adapted_tasks_have_draws_where_their_guide_has(runs, tmp_path, capsys):
    data = write_table(tmp_path / "new.csv", documents(("Dora", "Emil"), number=3))
    options = {"data": data, "steps": 2, "learning_rate": 0.1, "run": str(runs["100"])}
    for guide in ("map", "normal"):
        run_adapt(AdaptConfig(**options, guide=guide, output_dir=str(tmp_path / guide)), quiet=True)
    assert diagnose.COMMAND.main([str(tmp_path / "normal"), "--draws", "3", "--output", str(tmp_path / "out")]) == 0
    assert arviz.from_netcdf(tmp_path / "out" / "shrinkage.nc")["posterior"].sizes["draw"] == 3
    capsys.readouterr()
    assert diagnose.COMMAND.main([str(tmp_path / "map"), "--draws", "3", "--output", str(tmp_path / "none")]) == 2
    assert "leave --draws out, or adapt with --guide normal" in capsys.readouterr().err


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def expected(pictures=PICTURES, *more):
    return sorted([*(f"{name}.png" for name in pictures), "shrinkage.csv", "shrinkage.nc", *more])


@pytest.mark.parametrize("tau", TAUS)
def test_what_is_written(runs, tmp_path, capsys, tau):
    assert diagnose.COMMAND.main([str(runs[tau]), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    pictures = [] if tau == "inf" else PICTURES  # pooled tasks have no deviations to draw
    assert names(tmp_path / "out") == expected(pictures)
    out, err = capsys.readouterr()
    assert err.count("no deviations to draw") == (tau == "inf")
    assert out.endswith(f"diagnostics: {tmp_path / 'out'}\n")
    assert "Børge B." in out

    run = load_run(runs[tau])
    table = pd.read_csv(tmp_path / "out" / "shrinkage.csv")
    assert table.columns.tolist() == [
        "task", "train_documents", "test_documents", "distance", "effective_parameters", "base_test_perplexity",
        "test_perplexity",
    ]  # fmt: skip
    assert table["task"].tolist() == run.data.tasks
    for column in ("train_documents", "test_documents", "base_test_perplexity", "test_perplexity"):
        assert table[column].tolist() == pytest.approx([row[column] for row in run.scores], rel=1e-5)
    assert table["distance"].tolist() == pytest.approx([row["deviation_norm"] for row in run.scores], rel=1e-5, abs=1e-9)

    container = arviz.from_netcdf(tmp_path / "out" / "shrinkage.nc")
    np.testing.assert_allclose(container["posterior"]["distance"].values[0, 0], table["distance"], rtol=1e-5)
    np.testing.assert_allclose(
        container["posterior"]["effective_parameters"].values[0, 0], table["effective_parameters"], rtol=1e-5
    )
    for name in pictures:
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100  # something is drawn


def test_runs_are_compared(runs, tmp_path, capsys):
    argv = [str(runs["100"]), "--compare", str(runs["0"]), str(runs["inf"]), "--output", str(tmp_path / "out")]
    assert diagnose.COMMAND.main(argv) == 0
    assert names(tmp_path / "out") == expected(PICTURES, "compare.csv", "compare.png")
    table = pd.read_csv(tmp_path / "out" / "compare.csv", index_col="run", dtype={"run": str})
    assert sorted(table.index) == sorted(TAUS)
    for tau in TAUS:
        stored = RunFolder.open(runs[tau]).read_metrics()["test_perplexity"]
        assert table.loc[tau, "perplexity"] == pytest.approx(stored, rel=1e-6)
    assert "held-out documents, best first:" in capsys.readouterr().out


def test_a_posterior_has_draws(runs, posterior, tmp_path):
    words = ["--draws", "4", "--compare", str(runs["100"]), "--output", str(tmp_path / "out")]
    assert diagnose.COMMAND.main([str(posterior), *words]) == 0
    assert names(tmp_path / "out") == expected(PICTURES, "compare.csv", "compare.png")
    container = arviz.from_netcdf(tmp_path / "out" / "shrinkage.nc")
    assert container["posterior"].sizes["draw"] == 4
    rows = pd.read_csv(tmp_path / "out" / "shrinkage.csv")
    run = load_run(posterior)
    assert rows["distance"].tolist() == pytest.approx(run.fitted.deviation_norms().tolist(), rel=1e-5)
    for name in ("displacement", "distance"):
        for q, column in ((0.05, f"{name}_q05"), (0.95, f"{name}_q95")):
            values = container["posterior"][name].values[0]  # (draw, task)
            assert rows[column].tolist() == pytest.approx(np.quantile(values, q, axis=0).tolist(), rel=1e-5)
    assert rows["effective_parameters"].tolist() == pytest.approx(container["constant_data"]["effective_parameters"], rel=1e-5)
    # the posterior is compared by its draws, the MAP fit by its estimate
    table = pd.read_csv(tmp_path / "out" / "compare.csv", index_col="run", dtype={"run": str})
    densities = container["log_likelihood"]["documents"].values[0]
    assert table.loc["posterior", "elpd"] == pytest.approx((np.logaddexp.reduce(densities, axis=0) - np.log(4)).sum())
    assert table.loc["100", "perplexity"] == pytest.approx(load_run(runs["100"]).metrics["test_perplexity"], rel=1e-6)


@pytest.mark.parametrize("run", ["100", "posterior"])
def test_both_containers_of_arviz_give_the_same(runs, posterior, tmp_path, monkeypatch, run):
    words = [str(posterior), "--draws", "3"] if run == "posterior" else [str(runs[run])]
    written = {}
    for kind in ("of this ArviZ", "DataTree"):
        out = tmp_path / kind
        assert diagnose.COMMAND.main([*words, "--compare", str(runs["0"]), "--output", str(out)]) == 0
        container = xr.open_datatree(out / "shrinkage.nc")
        written[kind] = container, {name: (out / name).read_bytes() for name in names(out) if name != "shrinkage.nc"}
        monkeypatch.setattr(containers, "has_inference_data", lambda version: False)
    (first, of_first), (second, of_second) = written.values()
    assert of_first == of_second
    for group in ("posterior", "log_likelihood", "constant_data"):
        xr.testing.assert_identical(first[group].to_dataset(), second[group].to_dataset())


def test_a_posterior_that_a_map_fit_is_compared_with_has_draws(runs, posterior, tmp_path):
    words = ["--compare", str(posterior), "--draws", "3", "--output", str(tmp_path / "out")]
    assert diagnose.COMMAND.main([str(runs["100"]), *words]) == 0
    assert arviz.from_netcdf(tmp_path / "out" / "shrinkage.nc")["posterior"].sizes["draw"] == 1
    table = pd.read_csv(tmp_path / "out" / "compare.csv", index_col="run", dtype={"run": str})
    run = load_run(posterior)
    assert table.loc["posterior", "elpd"] == pytest.approx(
        run.posterior().score(run.data.test, draws=3).log_predictive().sum().item(), rel=1e-6
    )


def test_runs_of_one_name_are_told_apart_by_their_paths(runs, tmp_path):
    twin = shutil.copytree(runs["100"], tmp_path / "elsewhere" / "100")
    assert diagnose.COMMAND.main([str(runs["100"]), "--compare", str(twin), "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "compare.csv", index_col="run")
    assert sorted(table.index) == sorted([str(runs["100"]), str(twin)])
    assert table["elpd_diff"].tolist() == [0, 0]


def test_by_default_the_results_go_into_the_run_which_can_then_be_replaced(runs, tmp_path):
    run = shutil.copytree(runs["100"], tmp_path / "run")
    assert diagnose.COMMAND.main([str(run)]) == 0
    assert names(run / "diagnostics") == expected()
    assert load_run(run).metrics == load_run(runs["100"]).metrics
    with RunFolder.create(run, overwrite=True):
        pass
    assert not names(run)


def test_a_task_without_test_documents(runs, tmp_path):
    table = documents(number=3)
    extra = documents(("Zoe",), number=2)
    sides = ["train", "validation", "test"] * 3 + ["train", "validation"]
    split = pd.concat([table, extra]).assign(split=sides)
    config = yaml.safe_load((runs["100"] / "config.yaml").read_text())
    config |= {"data": write_table(tmp_path / "split.csv", split), "split_column": "split", "output_dir": str(tmp_path / "run")}
    run_map_fit(MapFitConfig(**config), quiet=True)
    assert diagnose.COMMAND.main([str(tmp_path / "run")]) == 0
    rows = pd.read_csv(tmp_path / "run" / "diagnostics" / "shrinkage.csv").set_index("task")
    assert rows["test_documents"].tolist() == [1, 1, 1, 0]
    assert rows["test_perplexity"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run is given; name its folder, as in diagnose.py runs/map_fit"),
        (["{100}", "{0}"], "unexpected '{0}': every value follows its option, as in --key value"),
        (["--run", "{100}"], "--run is not an option: give its value alone, as in diagnose.py RUN"),
        (["{100}", "--outputs", "x"], "unknown option 'outputs'; did you mean 'output'?"),
        (["{100}", "--threads", "0"], "threads is 0; give a whole number from 1 up"),
        (["{100}", "--draws", "1"], "draws is 1; give a whole number from 2 up"),
        (
            ["{100}", "--compare", "{0}", "--draws", "9"],
            "draws is 9, but the run in {100} is a MAP fit, a point, and has none; leave --draws out, or *",
        ),
        (["{100}", "--compare", "{0}", "{100}"], "run {100} is given twice; give each run once"),
        (["{100}/gone"], "run folder {100}/gone does not exist; give the --output_dir of a fit"),
        (["{100}", "--compare", "{100}/adapters"], "{100}/adapters is no run folder: it has no config.yaml; *"),
        (
            ["{100}", "--output", "{100}/config.yaml"],
            "output {100}/config.yaml cannot be written (File exists); give another --output",
        ),
        (["{100}", "--device", "gpu"], "device 'gpu' is not available here; use --device auto, or --device cpu"),
    ],
)
def test_bad_lines(runs, tmp_path, capsys, argv, message):
    for tau, folder in runs.items():
        argv = [word.replace(f"{{{tau}}}", str(folder)) for word in argv]
        message = message.replace(f"{{{tau}}}", str(folder))
    before = names(runs["100"])
    assert diagnose.COMMAND.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.rstrip('*')}")
    assert error.count("\n") == 1
    assert names(runs["100"]) == before


def test_runs_on_different_documents_are_refused_before_the_work(runs, tmp_path, capsys):
    config = yaml.safe_load((runs["100"] / "config.yaml").read_text())
    run_map_fit(MapFitConfig(**config | {"seed": 5, "output_dir": str(tmp_path / "other")}), quiet=True)
    assert diagnose.COMMAND.main([str(runs["100"]), "--compare", str(tmp_path / "other"), "--output", str(tmp_path / "out")]) == 2
    assert "error: 'other' and '100' have different test documents" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
