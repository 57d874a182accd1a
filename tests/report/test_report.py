"""The page: well-formed, complete, escaped, and nothing outside it needed."""

from __future__ import annotations

import itertools
import re
import shutil

import pytest

from bora_pyro.diagnostics import containers
from bora_pyro.diagnostics.sweep_table import at_best_rates, read_sweep, runs, sweep_table, write_sweep
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.report import RunOptions, render, run_page
from bora_pyro.report.blocks import number_text, short_number
from bora_pyro.report.make_page import COMMAND
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import LOCK
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from tests.page_parser import PageParser, check
from tests.tiny_base import documents, map_run, quick_fit, write_table

HOSTILE = "<script>alert(1)</script>"
NAMES = (HOSTILE, 'a "quoted" & $x^{$ name\' onclick=steal()', "東京 " * 11 + "東京", "Børge B.")
PICTURES = [
    "Distance from the global mean", "Distance against data", "Where the tasks deviate", "How strongly each part is pooled",
    "Tasks by what their adapters do", "Which tasks are near one another", "Learning curves",
]  # fmt: skip
LEARNED = "Path of the learned precision"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Finished runs by name: τ learned, one adapter for all, and a posterior around the first."""
    folder = tmp_path_factory.mktemp("runs")
    options = quick_fit(folder) | {
        "learning_rate": 0.03,
        "token_budget": 32,
        "data": write_table(folder / "hostile.csv", documents(NAMES)),
    }
    for name, tau in (("learned", "learned"), ("pooled", "inf")):
        map_run({**options, "tau": tau, "output_dir": folder / name})
    few = {"epochs": 1, "draws": 2, "threads": 1}
    run_posterior_fit(PosteriorFitConfig(run=str(folder / "learned"), output_dir=str(folder / "posterior"), **few), quiet=True)
    return {name: folder / name for name in ("learned", "pooled", "posterior")}


@pytest.fixture(scope="module")
def main():
    return COMMAND.main


@pytest.fixture(scope="module")
def learned(folders, main):
    """The page of the run with a learned τ."""
    assert main([str(folders["learned"]), "--device", "cpu", "--max_new_tokens", "4"]) == 0
    return (folders["learned"] / "report.html").read_text(encoding="utf-8")


def test_every_task_has_its_row_and_its_numbers(folders, learned):
    page, metrics = check(learned), RunFolder.open(folders["learned"]).read_metrics()
    rows = page.table("task")
    assert list(rows) == [task["name"] for task in metrics["tasks"].values()] + ["all tasks"]
    assert set(NAMES) == {*rows} - {"all tasks"}
    for task in metrics["tasks"].values():
        row = rows[task["name"]]
        assert row["training documents"] == f"{task['train_documents']}"
        assert row["test documents"] == f"{task['test_documents']}"
        assert row["base perplexity"] == f"{task['base_test_perplexity']:,.2f}"
        assert row["adapted perplexity"] == f"{task['test_perplexity']:,.2f}"
        assert row["distance ‖θ_d − Θ‖"] == f"{task['deviation_norm']:.2f}"
        change = 100 * (task["test_perplexity"] / task["base_test_perplexity"] - 1)
        assert row["change, %"] == f"{change:+.1f}".replace("-", "−")
    assert rows["all tasks"]["adapted perplexity"] == f"{metrics['test_perplexity']:,.2f}"
    assert rows["all tasks"]["training documents"] == str(sum(t["train_documents"] for t in metrics["tasks"].values()))


def test_headline_configuration_and_versions(folders, learned):
    page, folder = check(learned), RunFolder.open(folders["learned"])
    metrics, config = folder.read_metrics(), folder.read_config()
    values = dict(zip(page.texts["dt"], [text for text in page.texts["dd"]][::2], strict=False))
    assert values["test perplexity"] == number_text(metrics["test_perplexity"])
    assert f"base {number_text(metrics['base_test_perplexity'])}" in learned
    assert short_number(metrics["tau"]) in page.texts["dd"]
    everything = next(table for table in page.tables if len(table) == len(config) + 1)
    assert {row[0] for row in everything[1:]} == set(config)
    assert dict(everything[1:])["learning_rate"] == "0.03"
    for name, version in metrics["versions"].items():
        assert f"{name} {version}" in page.texts["footer"][0]
    assert "torch" in metrics["versions"]


def test_learning_in_numbers(folders, learned):
    page, folder = check(learned), RunFolder.open(folders["learned"])
    epochs = page.table("epoch")
    for record in folder.read_log():
        row = epochs[str(record["epoch"])]
        assert (row["loss"], row["validation perplexity"]) == (
            f"{record['loss']:.4f}",
            f"{record['validation_perplexity']:,.2f}",
        )
    groups = page.table("group")
    for group, tau in folder.read_metrics()["tau_by_group"].items():
        assert groups[group] == {
            "group": group,
            "precision τ": short_number(tau),
            "standard deviation 1/√τ": f"{tau**-0.5:.3g}",
        }


def test_pictures_are_drawn_in_the_pages_colours(learned):
    page = check(learned)
    headings = [text for text in page.texts["h3"]]
    assert headings == [*PICTURES, LEARNED]
    assert page.tags.count("svg") == len(headings)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    assert all(any(label.startswith(heading) for label in labels) for heading in headings)
    for svg in re.findall(r"<svg.*?</svg>", learned, flags=re.S):
        assert "<text" not in svg  # nothing hangs on the reader's fonts
        assert "var(--" in svg
        assert not re.search(r"#000000|#ffffff|#666666|#0072b2", svg, flags=re.I)


def test_samples_are_what_the_adapters_write(folders, tmp_path, main):
    file = tmp_path / "page.html"
    words = ["--output", str(file), "--prompt", "1 <b>red", "--samples", "2", "--max_new_tokens", "5", "--temperature", "0"]
    assert main([str(folders["learned"]), *words]) == 0
    page, run = check(file.read_text(encoding="utf-8")), load_run(folders["learned"])
    texts, writers = page.texts["blockquote"], page.texts["strong"][-4:]
    assert writers[:2] == ["base", "global-mean"]
    assert {*writers[2:]} <= {*run.data.tasks}
    written = generate_side_by_side(run.fitted, "1 <b>red", writers, max_new_tokens=5)
    unseen = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # a base that knows nothing writes them too
    assert texts == ["1 <b>red" + unseen.sub("\ufffd", text.text) for text in written]


def test_no_samples_where_none_are_asked_for(folders, tmp_path, main):
    assert main([str(folders["learned"]), "--output", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    page = check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "blockquote" not in page.tags
    assert "#samples" not in page.links


def test_one_adapter_for_all_has_nothing_to_draw(folders):
    html = render(run_page(folders["pooled"], RunOptions(samples=0)))
    assert check(html).texts["h3"] == ["Learning curves"]
    assert "there are no deviations to draw" in html
    assert "one adapter for all" in html


def test_a_posterior_has_its_mixture_and_its_mean(folders):
    html = render(run_page(folders["posterior"], RunOptions(samples=1, draws=3, max_new_tokens=2)))
    page, metrics = check(html), RunFolder.open(folders["posterior"]).read_metrics()
    rows = page.table("task")
    for task in metrics["tasks"].values():
        assert rows[task["name"]]["mixture perplexity"] == number_text(task["mixture_test_perplexity"])
        assert rows[task["name"]]["epistemic, nats"] == number_text(task["epistemic"], 4)
    assert rows["all tasks"]["mixture perplexity"] == number_text(metrics["mixture_test_perplexity"])
    assert page.texts["h3"] == PICTURES
    assert "mixture of 2 draws" in html
    assert "normal posterior around" in html


def test_new_tasks_under_a_fit(folders, tmp_path):
    new = documents(("Dora",)).assign(part=["train"] * 8 + ["test"] * 2)
    options = {"split_column": "part", "steps": 2, "threads": 1, "output_dir": str(tmp_path / "new")}
    run_adapt(AdaptConfig(run=str(folders["learned"]), data=write_table(tmp_path / "new.csv", new), **options), quiet=True)
    html = render(run_page(tmp_path / "new", RunOptions(samples=1, max_new_tokens=2)))
    page, metrics = check(html), RunFolder.open(tmp_path / "new").read_metrics()
    assert list(page.table("task")) == ["Dora", "all tasks"]
    assert page.table("task")["Dora"]["adapted perplexity"] == number_text(metrics["test_perplexity"])
    assert "new tasks under learned" in html
    assert "Options of the adaptation that are not the defaults" in html
    assert page.texts["strong"][-3:] == ["base", "global-mean", "Dora"]


def test_numbers_alone_need_neither_base_nor_documents(folders, tmp_path, main, capsys):
    copy = shutil.copytree(folders["learned"], tmp_path / "copy")
    config = RunFolder(copy).read_config() | {"data": str(tmp_path / "gone.csv")}
    RunFolder(copy).write_config(config)
    assert main([str(copy), "--output", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("or make the page without the adapters: --adapters false\n")
    assert not (tmp_path / "page.html").exists()
    assert main([str(copy), "--output", str(tmp_path / "page.html"), "--adapters", "false"]) == 0
    page = check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.texts["h3"] == ["Learning curves", LEARNED]
    assert "effective parameters γ" not in next(iter(page.table("task").values()))


def test_the_same_run_gives_the_same_page(folders):
    options = RunOptions(samples=1, max_new_tokens=2)
    assert render(run_page(folders["learned"], options)) == render(run_page(folders["learned"], options))


@pytest.mark.parametrize("name", ["learned", "posterior"])
def test_the_page_is_the_same_with_every_arviz(folders, monkeypatch, name):
    options = RunOptions(samples=0, draws=3)
    page = render(run_page(folders[name], options))
    monkeypatch.setattr(containers, "has_inference_data", lambda version: False)  # the containers of ArviZ 1.x
    assert render(run_page(folders[name], options)) == page


def test_overwriting_a_run_takes_its_page_along(folders, tmp_path, learned):
    copy = shutil.copytree(folders["learned"], tmp_path / "copy")
    assert (copy / "report.html").read_text(encoding="utf-8") == learned
    with RunFolder.create(copy, overwrite=True):
        assert [entry.name for entry in copy.iterdir()] == [LOCK]


# Sweeps and folders of runs

TAUS = ("0", "100", "inf", "learned")


def table():
    """A sweep over two rates and two seeds, all numbers different."""
    middle, rows = {"0": 30.0, "100": 20.0, "inf": 24.0, "learned": 20.5}, []
    for tau, rate, seed in itertools.product(TAUS, ("0.01", "0.03"), range(2)):
        test = middle[tau] + (3 if rate == "0.01" else 0) + seed
        fitted = 150.0 if tau == "learned" else float(tau)
        for d, task in enumerate((HOSTILE, "x" * 60, "x" * 60 + "y")):
            rows.append(
                {
                    "tau": tau, "learning_rate": rate, "seed": seed, "fitted_tau": fitted, "validation_perplexity": test + 1.5,
                    "test_perplexity": test, "base_test_perplexity": 60.0, "epochs": 6, "best_epoch": 5, "fit_seconds": 1.0,
                    "training_tokens_per_second": 100.0, "peak_memory_bytes": 1, "task": task,
                    "task_train_documents": 10 + d, "task_test_documents": 3, "task_base_test_perplexity": 60.0 + d,
                    "task_test_perplexity": test + d / 8, "deviation_norm": 0.0 if tau == "inf" else 1.0 + d,
                }
            )  # fmt: skip
    return sweep_table(rows)


def test_the_page_of_a_sweep(tmp_path, main, capsys):
    write_sweep(table(), tmp_path / "speeches")
    (tmp_path / "speeches.yaml").write_text("rank: 4\n")
    assert main([str(tmp_path / "speeches.csv")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'speeches.html'}\n"
    html = (tmp_path / "speeches.html").read_text(encoding="utf-8")
    page, best = check(html), at_best_rates(read_sweep(tmp_path / "speeches.csv"))
    rows = page.table("prior τ", "ratio to base")
    assert list(rows) == ["0", "100", "∞", "learned, 150", "base model"]
    assert rows["100"]["test perplexity"] == "20.50 ± 0.71"
    assert rows["100"]["learning rate"] == "0.03"
    tasks = page.table("task")
    for task in best["task"].unique():
        for tau, heading in zip(TAUS, ("τ = 0", "τ = 100", "τ = ∞", "learned τ"), strict=True):
            mean = best[(best.tau == tau) & (best.task == task)]["task_test_perplexity"].mean()
            assert tasks[task][heading] == f"{mean:.2f}"
    assert "<strong>20.50</strong>" in html
    assert len(next(each for each in page.tables if each[0][2].startswith("seed"))) == 1 + len(runs(table()))
    assert page.texts["h3"] == [
        "Perplexity against the strength of the prior", "What each task gains by sharing", "Distance from the global mean",
    ]  # fmt: skip
    assert page.table("option") == {"rank": {"option": "rank", "value": "4"}}


def test_a_folder_of_runs(folders, learned, tmp_path, main, capsys):
    output = tmp_path / "pages" / "all.html"
    assert main([str(folders["learned"].parent), "--output", str(output)]) == 0
    html = output.read_text(encoding="utf-8")
    page = PageParser(html)
    rows = page.table("run")
    assert list(rows) == ["learned", "pooled", "posterior"]
    for name, row in rows.items():
        metrics = RunFolder.open(folders[name]).read_metrics()
        assert row["test perplexity"] == number_text(metrics["test_perplexity"])
    (link,) = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert (output.parent / link).resolve() == (folders["learned"] / "report.html").resolve()
    metrics = RunFolder.open(folders["pooled"]).read_metrics()
    for task in metrics["tasks"].values():
        assert page.table("task")[task["name"]]["pooled"] == number_text(task["test_perplexity"])


def test_runs_that_are_not_finished_are_named(folders, tmp_path, main, capsys):
    shutil.copytree(folders["pooled"], tmp_path / "runs" / "deeper" / "done")
    half = shutil.copytree(folders["learned"], tmp_path / "runs" / "half")
    (half / "metrics.json").unlink()
    assert main([str(tmp_path / "runs")]) == 0
    page = PageParser((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))
    assert list(page.table("run")) == ["deeper/done"]
    assert any(text.startswith("half is left out: ") for text in page.texts["p"])
    shutil.rmtree(tmp_path / "runs" / "deeper")
    assert main([str(tmp_path / "runs")]) == 2
    assert "has no finished run (half is left out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "nothing is given"),
        (["{tmp}/nowhere"], "does not exist; give a run's folder"),
        (["{tmp}/forms.csv"], "lacks the columns"),
        (["{tmp}/notes.txt"], "has an unknown ending"),
        (["{tmp}/empty"], "has no finished run; give a run"),
        (["{run}", "--samples", "-1"], "samples is -1; give a whole number from 0 up"),
        (["{run}", "--samples", "0", "--prompt", "red"], "leave one of the two out"),
        (["{run}", "--prompt", "red " * 60], "the prompt has .* tokens and the base reads 32"),
        (["{run}", "--temperature", "-1"], "temperature is -1.0"),
        (["{run}", "--output", "{tmp}"], "cannot be written"),
        (["{tmp}/empty", "--prompt", "red"], "is no run, and its page has no samples"),
        (["{tmp}/sweep.csv", "--fit_config", "{tmp}/none.yaml"], "fit_config .* cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(folders, tmp_path, main, capsys, words, match):
    (tmp_path / "empty").mkdir()
    (tmp_path / "forms.csv").write_text("form,step\ncentred,1\n")
    (tmp_path / "notes.txt").write_text("notes\n")
    write_sweep(table(), tmp_path / "sweep")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(tmp=tmp_path, run=folders["learned"]) for word in words]
    output = [] if "--output" in words or not words else ["--output", str(tmp_path / "page.html")]
    assert main([*words, *output]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: .*({match}).*\n", err)
    assert sorted(tmp_path.rglob("*")) == before
