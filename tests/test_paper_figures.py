"""The paper's figures and tables: scripts draw from stored tables, reported numbers are the paper's, errors are one line."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bora_pyro.data import load_tasks
from bora_pyro.diagnostics.sweep_table import read_sweep, runs, sweep_table, write_sweep
from bora_pyro.errors import InputError
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from tests.data_fixtures import word_tokenizer
from tests.tiny_base import map_run, quick_fit

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "paper_figures"
FACTS = ROOT.parent / "shared" / "paper"
OF_A_SWEEP = ["figure1", "figure2", "figure3", "figure4", "figure5", "table1", "table2"]
TASKS = ["ada", "bo", "cleo", "dag"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def call(module, function, argv):
    """Call one function of a script as its command line does; returns the exit code."""
    argv = [str(word) for word in argv]
    return importlib.import_module("common").run(config_of(module), function, argv, f"{module.__name__}.py")


def draw(module, *argv):
    return call(module, module.draw, argv)


def config_of(module):
    """The configuration class that the script itself defines."""
    (config,) = (value for name, value in vars(module).items() if name.endswith("Config") and value.__module__ == module.__name__)
    return config


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with one small table of each kind."""
    folder = tmp_path_factory.mktemp("results")
    level = {"0": 30.0, "1": 26.0, "100": 20.0, "10000": 23.0, "inf": 24.0, "learned": 21.0}
    rows = [
        {
            "tau": tau, "learning_rate": rate, "seed": seed, "fitted_tau": 200.0 if tau == "learned" else float(tau),
            "validation_perplexity": level[tau] + seed + worse, "test_perplexity": level[tau] + 2 * seed + worse,
            "base_test_perplexity": 50.0, "epochs": 6, "best_epoch": 5, "fit_seconds": 1.0, "training_tokens_per_second": 9.0,
            "peak_memory_bytes": 1, "task": task, "task_train_documents": 2 ** (d + 1), "task_test_documents": 3,
            "task_base_test_perplexity": 50.0, "task_test_perplexity": level[tau] * (1 + 0.2 * d) + seed,
            "deviation_norm": 0.0 if tau == "inf" else (d + 1) / (1 + level[tau]),
        }
        for tau, (rate, worse), seed, (d, task) in itertools.product(
            level, [("0.01", 0), ("0.03", 5)], range(2), list(enumerate(TASKS))
        )
    ]  # fmt: skip
    for name in ("presidents", "documentation"):
        write_sweep(sweep_table(rows), folder / name)
        weights = np.random.default_rng(0).normal(size=(4, 9))
        gram = pd.DataFrame(weights @ weights.T, index=pd.Index(TASKS, name="task"), columns=TASKS)
        gram.to_csv(folder / f"{name}_gram.csv")
    forms = itertools.product(("noncentered", "centered"), (100, 1000), (1e-5, 1e-4), (0, 10, 20))
    pd.DataFrame(
        [(*arm, step, step, 3.0 if step else np.nan, 30 - step / 2, 29 - step / 2) for *arm, step in forms],
        columns=["form", "tau", "learning_rate", "step", "epoch", "objective", "validation_perplexity", "test_perplexity"],
    ).to_csv(folder / "forms.csv", index=False)  # fmt: skip
    pd.DataFrame(
        [
            ("norm_penalty", 300, 0.01, 0, 22.0, 23.0, 50.0, 1.0), ("norm_penalty", 1000, 0.01, 0, 21.0, 22.0, 50.0, 1.0),
            ("norm_penalty", 1000, 0.01, 1, 23.0, 22.0, 50.0, 1.0), ("norm_penalty", 1000, 0.03, 0, 29.0, 30.0, 50.0, 1.0),
            ("paper", 100, 0.01, 0, 20.0, 20.0, 50.0, 1.0), ("paper", 100, 0.01, 1, 21.0, 22.0, 50.0, 1.0),
        ],
        columns=["variant", "tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "base_test_perplexity",
                 "fit_seconds"],
    ).to_csv(folder / "fidelity.csv", index=False)  # fmt: skip
    return folder


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


# each script


@pytest.mark.parametrize("name", OF_A_SWEEP)
def test_a_script_of_a_sweep(script, results, tmp_path, capsys, name):
    output = tmp_path / "new" / f"{name}{'.md' if name.startswith('table') else '.png'}"
    assert draw(script(name), "--sweep", results / "presidents.csv", "--output", output) == 0
    assert is_picture(output) if output.suffix == ".png" else output.read_text(encoding="utf-8").count("\n|") > 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "option", "table"),
    [("pca_figure", "--gram", "presidents_gram.csv"), ("forms_figure", "--forms", "forms.csv"), ("model_figure", None, None)],
)
def test_a_script_of_another_table(script, results, tmp_path, name, option, table):
    output = tmp_path / "picture.png"
    assert draw(script(name), *([option, results / table] if option else []), "--output", output) == 0
    assert is_picture(output)


def test_a_figure_is_the_same_when_it_is_drawn_again(script, results, tmp_path):
    for n in range(2):
        assert draw(script("figure3"), "--sweep", results / "presidents.parquet", "--output", tmp_path / f"{n}.png") == 0
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_all_are_drawn_from_the_tables_of_a_folder(script, results, tmp_path):
    draw_all = script("draw_all")
    config = draw_all.DrawAllConfig(results=str(results), output=str(tmp_path))
    jobs = list(draw_all.jobs(config))
    paths = [Path(path) for path, _, _ in jobs]
    assert len(set(paths)) == len(paths) == 2 * (len(OF_A_SWEEP) + 1) + 6
    for _, _, options in jobs:
        sources = [value for name, value in vars(options).items() if name in ("sweep", "gram", "forms", "fidelity")]
        assert all(Path(source).is_file() for source in sources)
    tables = [job for job in jobs if job[0].endswith(".md")]
    for path, function, options in tables:
        function(options)
        assert Path(path).is_file()


def test_what_cannot_be_drawn_is_named_and_stops_nothing(script, tmp_path, capsys):
    assert script("draw_all").main(["--results", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "model.png")]
    assert err.count("error: ") == err.count("\n") == 2 * (len(OF_A_SWEEP) + 1) + 5
    assert "make it with compare_forms.py" in err


# what they say


def test_table1_has_both_beside_each_other(script, results, tmp_path):
    assert draw(script("table1"), "--sweep", results / "presidents.csv", "--output", tmp_path / "t.md") == 0
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (tmp_path / "t.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["0", "1", "10", "100", "1000", "10000", "∞", "learned, 200"]
    assert rows[3] == ["100", "0.001", "12.82", "0.01", "20.50 ± 0.71", "21.00 ± 1.41", "0.420 ± 0.028", "2"]
    assert rows[2] == ["10", "0.0001", "12.85", "–", "–", "–", "–", "0"]
    assert rows[6][1:4] == ["–", "–", "0.01"]


def test_table2_marks_the_lowest_of_each_task(script, results, tmp_path):
    assert draw(script("table2"), "--sweep", results / "presidents.csv", "--output", tmp_path / "t.md") == 0
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "| bo | 4 | 36.50 | 31.70 | **24.50** | 28.10 | 29.30 | 25.70 |" in text
    assert "| abid q raja | 169 | 15.56 | 15.20 | 12.57 | **11.60** | 11.91 | 12.41 |" in text
    paper = text[text.index("BoRA paper") :]
    assert len(re.findall(r"\*\*[\d.]+\*\*", paper)) == 25


def test_the_fidelity_table_chooses_by_validation_and_compares_seed_by_seed(script, results, tmp_path):
    assert draw(script("fidelity_table"), "--fidelity", results / "fidelity.csv", "--output", tmp_path / "t.md") == 0
    first, second = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()[2:]
    assert first == "| paper | 100 | 0.01 | 20.50 ± 0.71 | 21.00 ± 1.41 | 50.00 ± 0.00 | 1.000 ± 0.000 | 2 |"
    assert second == "| norm_penalty | 1000 | 0.01 | 22.00 ± 1.41 | 22.00 ± 0.00 | 50.00 ± 0.00 | 1.050 ± 0.071 | 2 |"


def test_the_hierarchy_s_own_tau_lies_between_the_limits(script, results):
    common = script("common")
    table = read_sweep(results / "presidents.parquet")
    assert common.best_between_limits(table) == "100"
    assert common.best_between_limits(table[table["tau"].isin(["0", "10000", "inf"])]) == "10000"
    with pytest.raises(InputError, match="no tau above 0 and below inf"):
        common.best_between_limits(table[table["tau"].isin(["0", "inf", "learned"])])


def test_the_bars_of_figure1_are_the_documents(script):
    plt = script("common").plt
    documents = pd.Series([3.0, 1.0, 2.0], index=["ada", "bo", "cleo"])
    figure, ax = plt.subplots()
    script("figure1").bars(documents, ax)
    assert [bar.get_width() for bar in ax.patches] == [1, 2, 3]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bo", "cleo", "ada"]
    plt.close(figure)


def test_figure2_has_a_thick_line_and_a_thin_one_a_task(script):
    common, figure2 = script("common"), script("figure2")
    figure, ax = common.plt.subplots()
    figure2.tasks_and_all(common.reported_sweep(), ax)
    lines = {str(line.get_gid()): line for line in ax.lines}
    assert list(lines["all"].get_ydata()) == [16.80, 16.59, 12.85, 12.82, 13.26, 13.91]
    assert list(lines["task bjørn jacobsen"].get_ydata()) == [22.28, 22.87, 19.54, 18.52, 19.05, 20.53]
    assert sum(gid.startswith("task ") for gid in lines) == 25
    common.plt.close(figure)


def test_groups_of_the_components_are_those_of_the_file(script, tmp_path):
    (tmp_path / "groups.csv").write_text("task,group\ndag,y\nada,x\nbo,y\ncleo,x\n")
    groups_of = script("pca_figure").groups_of
    assert groups_of(TASKS, str(tmp_path / "groups.csv")) == ["x", "y", "x", "y"]
    assert groups_of(TASKS, None) is None


def test_the_paper_s_speakers_are_coloured_by_party(script):
    assert script("pca_figure").groups_of(["abid q raja", "aksel hagen"], None) == ["Venstre", "Sosialistisk Venstreparti"]


# errors


@pytest.mark.parametrize("name", OF_A_SWEEP)
def test_a_sweep_that_is_missing(script, tmp_path, capsys, name):
    path = tmp_path / "none.parquet"
    assert draw(script(name), "--sweep", path, "--output", tmp_path / "out.png") == 2
    assert capsys.readouterr().err == f"error: sweep {path} does not exist; give the --output of tau_sweep.py\n"


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("pca_figure", "--gram", "make it with pca_figure.py --run RUN"),
        ("forms_figure", "--forms", "make it with compare_forms.py"),
        ("fidelity_table", "--fidelity", "make it with compare_variants.py"),
    ],
)
@pytest.mark.parametrize(
    ("content", "about"),
    [(None, "does not exist"), ("", "cannot be read"), ("a,b\n1,2\n", "lacks the column"), ("head", "has no row")],
)
def test_another_table_that_cannot_be_used(script, tmp_path, capsys, name, option, words, content, about):
    module, path = script(name), tmp_path / "table.csv"
    if content is not None:
        path.write_text(",".join(getattr(module, "COLUMNS", ["task"])) + "\n" if content == "head" else content)
    assert draw(module, option, path, "--output", tmp_path / "out.png") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: table {path} {about}")
    assert err.endswith(f"{words}\n")
    assert err.count("\n") == 1


def test_a_gram_table_that_is_not_square(script, tmp_path, capsys):
    (tmp_path / "gram.csv").write_text("task,ada,bo\nada,1,2\ncleo,2,1\n")
    assert draw(script("pca_figure"), "--gram", tmp_path / "gram.csv") == 2
    assert "is not a square table of numbers" in capsys.readouterr().err


def test_groups_that_lack_a_task(script, results, tmp_path, capsys):
    (tmp_path / "groups.csv").write_text("task,group\nada,x\nbo,y\ncloe,x\ndag,y\n")
    argv = ["--gram", results / "presidents_gram.csv", "--groups", tmp_path / "groups.csv", "--output", tmp_path / "out.png"]
    assert draw(script("pca_figure"), *argv) == 2
    assert "lacks the task 'cleo'; give each task a group; did you mean 'cloe'?" in capsys.readouterr().err


def test_an_output_of_an_unknown_kind(script, results, tmp_path, capsys):
    assert draw(script("figure1"), "--sweep", results / "presidents.csv", "--output", tmp_path / "out.pgn") == 2
    assert "give a .png, .pdf or .svg" in capsys.readouterr().err


def test_an_output_below_a_file(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert draw(script("model_figure"), "--output", tmp_path / "file" / "out.png") == 2
    assert capsys.readouterr().err.startswith("error: output ")


def test_a_variant_without_validation(script, results, tmp_path, capsys):
    table = pd.read_csv(results / "fidelity.csv")
    table.loc[table["variant"] == "norm_penalty", "validation_perplexity"] = np.nan
    table.to_csv(tmp_path / "f.csv", index=False)
    assert draw(script("fidelity_table"), "--fidelity", tmp_path / "f.csv", "--output", tmp_path / "t.md") == 2
    assert "variant 'norm_penalty' has no validation perplexity" in capsys.readouterr().err


# the reported numbers


def test_the_reported_numbers_are_whole(script):
    common = script("common")
    overall, by_task, tasks = (common.reported(name) for name in ("table1", "table2", "tasks"))
    assert list(overall["tau"]) == ["0", "1", "10", "100", "1000", "10000"]
    assert by_task.pivot(index="task", columns="tau", values="test_perplexity").shape == (25, 6)
    assert set(by_task["task"]) == set(tasks["task"])
    assert tasks["train_documents"].agg(["min", "max"]).tolist() == [110, 477]
    # the lowest of all is at τ = 100, overall and for every speaker
    assert overall.set_index("tau")["test_perplexity"].idxmin() == "100"
    assert (by_task.loc[by_task.groupby("task")["test_perplexity"].idxmin(), "tau"] == "100").all()


def test_the_reported_tables_agree_but_at_ten(script):
    common = script("common")
    overall = common.reported("table1").set_index("tau")["test_perplexity"]
    by_task = common.reported("table2")
    means = np.exp(np.log(by_task["test_perplexity"]).groupby(by_task["tau"]).mean())
    ratio = means / overall
    assert ((ratio.drop("10") > 0.993) & (ratio.drop("10") < 0.997)).all()
    assert means["10"] == pytest.approx(13.77, abs=0.01)


@pytest.mark.skipif(not FACTS.is_dir(), reason="the facts that the tables were made of are not here")
def test_the_reported_numbers_are_the_facts(script):
    common = script("common")
    overall, by_task, tasks = (common.reported(name) for name in ("table1", "table2", "tasks"))
    facts = pd.read_csv(FACTS / "table1_perplexity.csv")
    np.testing.assert_array_equal(overall.astype(float), facts)
    facts = pd.read_csv(FACTS / "table2_task_perplexity.csv", index_col="task")
    wide = by_task.pivot(index="task", columns="tau", values="test_perplexity").loc[facts.index, facts.columns]
    np.testing.assert_array_equal(wide, facts)
    facts = pd.read_csv(FACTS / "documents_per_task.csv").merge(pd.read_csv(FACTS / "speakers.csv"), on="task")
    np.testing.assert_array_equal(tasks, facts)


def test_the_reported_sweep_is_read_as_a_sweep(script):
    table = script("common").reported_sweep()
    assert len(table) == 25 * 6
    assert runs(table).set_index("tau")["test_perplexity"].to_dict() == {
        "0": 16.80, "1": 16.59, "10": 12.85, "100": 12.82, "1000": 13.26, "10000": 13.91,
    }  # fmt: skip


# the paper's own fits


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


def test_the_readme_s_other_commands_parse(script):
    others = [words for words in commands() if words[0] != "scripts/map_fit.py"]
    assert len(others) > 3
    for words in others:
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
