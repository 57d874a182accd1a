"""The command: what it writes of a posterior and of a MAP fit, against the library, and what it refuses."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bora_pyro.diagnostics.calibration import Calibration, area_under_risk_coverage, calibration, foreign_auroc
from bora_pyro.predict.mixture import predictive
from bora_pyro.runs import calibration_files
from bora_pyro.runs.calibrate import COMMAND
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from tests.tiny_base import WORDS, documents, map_run, quick_fit, write_table

MEASURES = [name for name in Calibration.__dataclass_fields__ if name != "tokens"]
ALWAYS = ["calibration.csv", "reliability.png", "risk_coverage.csv", "risk_coverage.png"]
FOREIGN = ["foreign.csv", "foreign.png", "foreign_auroc.csv"]
QUESTIONS = ["questions.csv", "questions_calibration.csv"]


@pytest.fixture(scope="module")
def main():
    return COMMAND.main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a MAP fit and of a posterior around it."""
    folder = tmp_path_factory.mktemp("runs")
    options = {**quick_fit(folder), "tau": 30, "learning_rate": 0.03, "output_dir": folder / "map"}
    map_run(options)
    posterior = PosteriorFitConfig(run=str(folder / "map"), output_dir=str(folder / "posterior"), epochs=1, draws=1, threads=1)
    run_posterior_fit(posterior, quiet=True)
    return {"map": folder / "map", "posterior": folder / "posterior"}


@pytest.fixture
def foreign(tmp_path):
    """A table of texts in the words of no task, without a column of tasks."""
    texts = ["red one north", "blue two south east", "grey three", "four west green", "one red two blue"]
    return write_table(tmp_path / "foreign.csv", pd.DataFrame({"words": texts}))


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"prompt": "0 red", "options": [" green", " two"], "correct": 0, "task": "Ada"},
        {"prompt": "1 one", "options": [" east", " blue", " three"], "correct": 2, "task": "Børge B."},
        {"prompt": "2 red", "options": [" blue", " south"], "correct": 1, "task": "Ada"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def drawn(path):
    with Image.open(path) as picture:
        return np.ptp(np.asarray(picture.convert("L"))) > 100


def test_a_posterior(runs, tmp_path, main, capsys, foreign, questions):
    out = tmp_path / "out"
    words = ["--draws", "3", "--seed", "2", "--foreign", foreign, "--foreign_text_column", "words", "--questions", questions]
    assert main([str(runs["posterior"]), *words, "--output", str(out)]) == 0
    assert names(out) == sorted(ALWAYS + FOREIGN + QUESTIONS)
    assert all(drawn(out / name) for name in names(out) if name.endswith(".png"))
    run = load_run(runs["posterior"])
    mixture, centre = run.posterior(seed=2).score(run.data.test, draws=3), run.posterior().mean()
    mean = predictive(run.fitted.model, run.data.test, lambda: [centre])

    table = pd.read_csv(out / "calibration.csv", index_col="task")
    assert table.index.tolist() == [*run.data.tasks, "all"]
    assert table.columns.tolist() == ["tokens", *(f"{name}_{measure}" for name in ("mean", "mixture") for measure in MEASURES)]
    assert table["tokens"].tolist() == [*np.bincount(mixture.task), len(mixture.label)]
    for name, predictions in (("mean", mean), ("mixture", mixture)):
        for place, where in (("all", None), (run.data.tasks[1], predictions.task == 1)):
            expected = calibration(predictions, where=where)
            for measure in MEASURES:
                assert table.loc[place, f"{name}_{measure}"] == pytest.approx(getattr(expected, measure), rel=1e-4)

    curves = pd.read_csv(out / "risk_coverage.csv").set_index(["loss", "uncertainty"])
    assert [*dict.fromkeys(curves.index)] == [
        (loss, doubt) for loss in ("nll", "wrong") for doubt in ("total", "aleatoric", "epistemic", "1 − confidence")
    ]
    area = area_under_risk_coverage(mixture.epistemic, -mixture.log_prob)
    curve = curves.loc[[("nll", "epistemic")]]
    assert curve["area"].tolist() == pytest.approx([area] * len(curve), rel=1e-4)
    assert curve[["coverage", "risk"]].iloc[-1].tolist() == pytest.approx([1, -mixture.log_prob.mean().item()], rel=1e-4)
    assert curves.loc[[("wrong", "total")], "risk"].iloc[-1] == pytest.approx(
        1 - mixture.correct.double().mean().item(), rel=1e-4
    )

    texts = pd.read_csv(out / "foreign.csv")
    assert texts["origin"].value_counts().to_dict() == {"own": len(run.data.test), "foreign": 5}
    assert set(texts["task"]) <= set(WORDS)
    auroc = pd.read_csv(out / "foreign_auroc.csv", index_col="score")["auroc"]
    assert auroc.index.tolist() == ["epistemic", "total", "perplexity", "perplexity_ratio"]
    for score, value in auroc.items():
        of = {origin: rows[score] for origin, rows in texts.groupby("origin")}
        assert value == pytest.approx(foreign_auroc(of["own"], of["foreign"]), rel=1e-4)

    answers = pd.read_csv(out / "questions.csv")
    assert answers["correct_option"].tolist() == [" green", " three", " south"]
    assert (answers["answer"] == answers["correct_option"]).tolist() == answers["correct"].tolist()
    summary = pd.read_csv(out / "questions_calibration.csv", index_col="task")
    assert summary["questions"].tolist() == [2, 1, 0, 3]
    assert summary.loc["all", "mixture_nll"] == pytest.approx(-np.log(answers["probability"]).mean(), rel=1e-4)
    assert summary.loc["all", "mixture_accuracy"] == pytest.approx(answers["correct"].mean(), rel=1e-4)

    said = capsys.readouterr().out
    assert said.endswith(f"calibration: {out}\n")
    assert "5 foreign texts against 6 test documents:" in said
    assert f"{table.loc['all', 'mixture_ece']:.4f}" in said


def test_linearised_draws(runs, tmp_path, main, foreign, questions):
    out, options = tmp_path / "out", ["--foreign", foreign, "--foreign_text_column", "words", "--questions", questions]
    assert main([str(runs["posterior"]), "--draws", "2", "--predict", "linearised", *options, "--output", str(out)]) == 0
    table = pd.read_csv(out / "calibration.csv", index_col="task")
    assert table.columns.tolist() == ["tokens", *(f"{name}_{measure}" for name in ("mean", "linearised") for measure in MEASURES)]
    run = load_run(runs["posterior"])
    expected = run.posterior(seed=0).score(run.data.test, draws=2, linearised=True)
    assert table.loc["all", "linearised_nll"] == pytest.approx(-expected.log_prob.mean().item(), rel=1e-4)
    answers = pd.read_csv(out / "questions_calibration.csv", index_col="task")
    assert answers.loc["all", "linearised_nll"] != pytest.approx(answers.loc["all", "mean_nll"], rel=1e-4)
    texts = pd.read_csv(out / "foreign.csv")
    assert (texts["epistemic"] > 0).all()


def test_a_map_fit_is_one_prediction_and_has_no_epistemic_uncertainty(runs, tmp_path, main, foreign):
    out = tmp_path / "out"
    words = ["--foreign", foreign, "--foreign_text_column", "words", "--foreign_documents", "2", "--output", str(out)]
    assert main([str(runs["map"]), *words]) == 0
    assert names(out) == sorted(ALWAYS + FOREIGN)
    table = pd.read_csv(out / "calibration.csv", index_col="task")
    assert table.columns.tolist() == ["tokens", *(f"map_{measure}" for measure in MEASURES)]
    run = load_run(runs["map"])
    assert np.exp(table.loc["all", "map_nll"]) == pytest.approx(run.metrics["test_perplexity"], rel=1e-4)
    curves = pd.read_csv(out / "risk_coverage.csv")
    assert curves["uncertainty"].unique().tolist() == ["total", "1 − confidence"]
    texts = pd.read_csv(out / "foreign.csv")
    assert "epistemic" not in texts
    assert texts["origin"].tolist() == ["own"] * 2 + ["foreign"] * 2


def test_documents_of_the_run_are_not_foreign(runs, tmp_path, main, capsys):
    own = documents()
    table = write_table(tmp_path / "mixed.csv", pd.concat([own[["text"]].head(3), pd.DataFrame({"text": ["red one two"]})]))
    out = tmp_path / "out"
    assert main([str(runs["map"]), "--foreign", table, "--output", str(out)]) == 0
    [note, data] = capsys.readouterr().err.splitlines()
    assert note == "note: 3 of the foreign texts are documents of the run and were left out"
    assert data.startswith("data: 30 rows read; 30 documents of 3 tasks: ")
    assert (pd.read_csv(out / "foreign.csv")["origin"] == "foreign").sum() == 1
    assert main([str(runs["map"]), "--foreign", write_table(tmp_path / "own.csv"), "--output", str(tmp_path / "other")]) == 2
    assert "is a document of the run; give texts that belong to no task" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_error_on_the_way_leaves_nothing(runs, tmp_path, main, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration_files, "risk_coverage_table", fail)  # calibration.csv and a picture are written before it
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "calibration.csv").write_text("of before")
    for out in (tmp_path / "new", kept):
        with pytest.raises(KeyboardInterrupt):
            main([str(runs["map"]), "--output", str(out)])
    assert not (tmp_path / "new").exists()
    assert names(kept) == ["calibration.csv"]
    assert (kept / "calibration.csv").read_text() == "of before"


BAD = {
    "no run": ([], "no run is given; name its folder, as in calibrate.py runs/posterior_fit"),
    "gone": (["{map}/gone"], "run folder {map}/gone does not exist*"),
    "draws of a point": (
        ["{map}", "--draws", "4"],
        "draws is 4, but the run in {map} is a MAP fit, a point, and has no draws; *",
    ),
    "linearised point": (["{map}", "--predict", "linearised"], "predict is linearised, but *leave --predict out, or fit *"),
    "predict": (["{map}", "--predict", "linear"], "predict is 'linear'; allowed: draws, linearised; did you mean 'linearised'?"),
    "one draw": (["{posterior}", "--draws", "1"], "draws is 1; give a whole number from 2 up"),
    "no texts": (["{map}", "--foreign_documents", "0"], "foreign_documents is 0; give a whole number from 1 up"),
    "foreign": (["{map}", "--foreign", "{tmp}/none.csv"], "file '{tmp}/none.csv' does not exist*"),
    "column": (
        ["{map}", "--foreign", "{tmp}/good.csv", "--foreign_text_column", "txt"],
        "file '{tmp}/good.csv' has no column 'txt' (foreign_text_column); its columns are task, text; did you mean 'text'?",
    ),
    "questions": (["{map}", "--questions", "{tmp}/none.jsonl"], "questions {tmp}/none.jsonl is no .jsonl file; give one *"),
    "no questions": (["{map}", "--questions", "{tmp}/empty.jsonl"], "questions {tmp}/empty.jsonl is empty; *"),
    "no options": (
        ["{map}", "--questions", "{tmp}/bare.jsonl"],
        "questions {tmp}/bare.jsonl has no 'options'; a question has prompt, options, correct, task; did you mean 'option'?",
    ),
    "options": (
        ["{map}", "--questions", "{tmp}/text.jsonl"],
        "questions {tmp}/text.jsonl, question 1: options is ' green'; give a list of two texts or more",
    ),
    "correct": (
        ["{map}", "--questions", "{tmp}/correct.jsonl"],
        "questions {tmp}/correct.jsonl, question 1: correct is 2 in the question 'red'; its 2 options are numbered 0 to 1",
    ),
    "task": (["{map}", "--questions", "{tmp}/task.jsonl"], "question 0 ('red') is of the task 'Adda'; *did you mean 'Ada'?"),
    "output": (["{map}", "--output", "{map}/config.yaml"], "output {map}/config.yaml cannot be written (File exists); *"),
    "unknown": (["{map}", "--outputs", "x"], "unknown option 'outputs'; did you mean 'output'?"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input(runs, tmp_path, main, capsys, words, message):
    question = {"prompt": "red", "options": [" green", " one"], "correct": 0, "task": "Ada"}
    bare = {name: value for name, value in question.items() if name != "options"} | {"option": []}
    rows = {"text": question | {"options": " green"}, "correct": question | {"correct": 2}, "task": question | {"task": "Adda"}}
    for name, row in {**rows, "bare": bare}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "empty.jsonl").write_text("")
    write_table(tmp_path / "good.csv")
    places = {name: str(folder) for name, folder in runs.items()} | {"tmp": str(tmp_path)}
    before = names(runs["map"])
    words = [word.format(**places) for word in words]
    assert main(words if "--output" in words else [*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert fnmatchcase(said, "error: " + message.format(**places).replace("[", "[[]") + "\n"), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert names(runs["map"]) == before
