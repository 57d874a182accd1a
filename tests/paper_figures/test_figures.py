"""The paper's figures and tables are drawn from stored tables, and say what those say."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from bora_pyro.diagnostics.sweep_table import read_sweep
from bora_pyro.errors import InputError
from tests.paper_figures.calls import OF_A_SWEEP, TASKS, draw, is_picture

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


def test_adapters_are_drawn_at_their_best_rates(script, tmp_path):
    rows = [("lora@1", 0.01, 0, 20.0), ("lora@1", 0.03, 0, 18.0), ("lora@1", 0.03, 1, 19.0), ("nola@1", 0.01, 0, 21.0)]
    table = pd.DataFrame(rows, columns=["arm", "learning_rate", "seed", "validation_perplexity"])
    table["test_perplexity"], table["stored_bytes"] = 30.0, 4096
    path, figure = tmp_path / "adapters_own.csv", script("adapters_figure")
    table.to_csv(path, index=False)
    chosen = figure.at_best_rate(table)
    assert list(zip(chosen["arm"], chosen["learning_rate"], chosen["seed"], strict=True)) == [
        ("lora@1", 0.03, 0), ("lora@1", 0.03, 1), ("nola@1", 0.01, 0),
    ]  # fmt: skip
    assert draw(figure, "--tables", path, "--output", tmp_path / "adapters.png") == 0
    assert is_picture(tmp_path / "adapters.png")
    jobs = script("draw_all").jobs(script("draw_all").DrawAllConfig(results=str(tmp_path), output=str(tmp_path)))
    assert not [job for job in jobs if job[0].endswith("adapters.png")]  # no table of a corpus that it names


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
