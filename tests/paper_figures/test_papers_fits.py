"""The paper's own fits: the README's commands, Talk of Norway, and runs that become tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bora_pyro.data import load_tasks
from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from tests.data_fixtures import word_tokenizer
from tests.paper_figures.calls import FOLDER, ROOT, call, config_of, draw, is_picture
from tests.tiny_base import map_run, quick_fit


def commands():
    """The README's commands, as words without the interpreter."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/python ")]


def test_the_readme_s_fits_are_those_of_table1(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    fits = [parse_config(MapFitConfig, words[1:]) for words in commands() if words[0] == "scripts/map_fit.py"]
    rates = {f.tau: f.learning_rate * (f.tau if f.scale_learning_rate_with_tau else 1) for f in fits}
    table = script("common").reported("table1")
    assert rates == pytest.approx(dict(zip(table["tau"].astype(float), table["learning_rate"].astype(float), strict=True)))
    for fit in fits:
        assert (fit.base_model, fit.rank, fit.alpha, fit.num_tasks, fit.patience) == ("facebook/opt-350m", 16, 16, 25, 8)
        assert (fit.prior_form, fit.max_tokens, fit.token_budget, fit.split_column) == ("centered", 256, 64 * 256, "split")
        assert fit.gradient_clip == np.inf
    assert len({fit.output_dir for fit in fits}) == 6


def test_the_readme_s_other_commands_parse(script, monkeypatch):
    others = [words for words in commands() if words[0] != "scripts/map_fit.py"]
    assert len(others) > 3
    for words in others:
        monkeypatch.syspath_prepend(FOLDER.parent / Path(words[0]).parent)
        parse_config(config_of(script(Path(words[0]).stem)), words[1:])


def test_every_script_is_in_the_readme():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in FOLDER.glob("*.py")} - {"common.py", "draw_all.py"}
    assert {name for name in scripts if f"{name}`" in text or f"/{name} " in text} == scripts


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_talk_of_norway_becomes_a_table_that_a_fit_reads(script, tmp_path, capsys, ending):
    words = ["red", "green", "blue", "one", "two", "three"]
    rows = [
        f'{name},2001-01-{n % 28 + 1:02},"{" ".join(words[(n + k) % 6] for k in range(9))},\n""{n}"" og mer"'
        for name in ("Abid Q. Raja", "Aksel Hagen")
        for n in range(210 if name[1] == "b" else 300)
    ]
    (tmp_path / "ton.csv").write_text("\n".join(["rep_name,time,text", *rows]) + "\n", encoding="utf-8")
    module, output = script("prepare_talk_of_norway"), tmp_path / f"table{ending}"
    assert call(module, module.prepare, ["--ton", tmp_path / "ton.csv", "--output", output]) == 0
    assert capsys.readouterr().out == f"{output}: 2 tasks; documents: 255 train, 127 validation, 128 test\n"
    data = load_tasks(str(output), word_tokenizer(), split_column="split", num_tasks=2, max_tokens=5)
    assert data.tasks == ["abid q raja", "aksel hagen"]
    assert data.train.documents_per_task == [105, 150]
    assert sum(data.validation.documents_per_task + data.test.documents_per_task) == 255
    text = module.talk_of_norway(tmp_path / "ton.csv", "released")["text"][0]
    assert pd.read_csv(output)["text"][0] == text
    assert "\n" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "table.json"], "unknown ending; give a .csv or a .csv.gz"),
        (["--selection", "papper"], "did you mean 'paper'?"),
        (["--ton", "nowhere.csv"], "does not exist"),
    ],
)
def test_what_talk_of_norway_cannot_be_made_of(script, capsys, argv, words):
    module = script("prepare_talk_of_norway")
    assert call(module, module.prepare, argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two tiny finished runs: a centred one with the paper's rule for the rate, and independent tasks."""
    folder = tmp_path_factory.mktemp("runs")
    options = quick_fit(folder) | {"learning_rate": 1e-4}
    rule = {"tau": "100", "prior_form": "centered", "scale_learning_rate_with_tau": "true", "output_dir": folder / "tau100"}
    for more in (rule, {"tau": "0", "learning_rate": "0.02", "output_dir": folder / "tau0"}):
        map_run({**options, **more})
    return folder


def test_runs_become_a_sweep_with_the_rates_of_adamw(script, finished, tmp_path, capsys):
    module = script("collect_runs")
    argv = ["--runs", finished / "tau100", finished / "tau0", "--output", tmp_path / "sweep"]
    assert call(module, module.collect, argv) == 0
    table = read_sweep(tmp_path / "sweep.parquet")
    assert dict(zip(table["tau"], table["learning_rate"], strict=True)) == {"0": "0.02", "100": "0.01"}
    assert capsys.readouterr().out == f"{tmp_path / 'sweep'}.parquet: tau 0, 100; 3 tasks\n"
    assert call(module, module.collect, []) == 2
    assert call(module, module.collect, ["--runs", tmp_path / "none"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["delta_w", "weights"])
def test_a_run_leaves_its_gram_table(script, finished, tmp_path, space):
    from bora_pyro.diagnostics.deviations import task_gram
    from bora_pyro.runs.saved import load_run

    path = tmp_path / "new" / "gram.csv"
    argv = ["--run", finished / "tau100", "--space", space, "--gram", path, "--output", tmp_path / "p.png"]
    assert draw(script("pca_figure"), *argv) == 0
    table = pd.read_csv(path, index_col="task")
    fitted = load_run(finished / "tau100").fitted
    assert list(table.index) == list(table.columns) == fitted.tasks
    np.testing.assert_allclose(table, task_gram(fitted, space=space), rtol=1e-5, atol=1e-12)
    assert is_picture(tmp_path / "p.png")
