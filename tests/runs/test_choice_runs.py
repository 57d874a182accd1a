"""Runs of fits to answers among options: every command that reads one, what the files say, and what is refused."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest

from bora_pyro import InputError
from bora_pyro.diagnostics.calibration import calibration
from bora_pyro.diagnostics.shrinkage import compare_priors, held_out
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.likelihoods import Choice
from bora_pyro.predict.answers import answers
from bora_pyro.report.run_page import RunOptions, run_page
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.tau_sweep import SweepConfig
from tests.choice_table import OPTIONS, table, write
from tests.tiny_base import command_main, line, map_run, quick_fit

MEASURES = ("nll", "accuracy", "ece", "brier")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    more = {"data": write(folder / "rows.jsonl", table()), "split_column": "split", "options_column": "options"}
    more |= {"prompt_column": "prompt", "completion_column": "completion", "likelihood": "choice", "tau": 30}
    return quick_fit(folder) | more | {"learning_rate": 0.03, "output_dir": str(folder / "run")}


@pytest.fixture(scope="module")
def finished(options):
    return map_run(options)


@pytest.fixture(scope="module")
def posterior(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("posterior") / "run"
    words = line({"guide": "normal", "epochs": 1, "draws": 3, "output_dir": folder, "threads": 1})
    assert command_main("posterior-fit")([str(finished), *words]) == 0
    return folder


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def names_in(found):
    """All keys of nested mappings and lists."""
    if isinstance(found, dict):
        return {*found, *(name for value in found.values() for name in names_in(value))}
    return {name for value in found for name in names_in(value)} if isinstance(found, list) else set()


def test_the_metrics_are_those_of_the_saved_adapters(finished):
    metrics, run = metrics_of(finished), load_run(finished)
    assert not [name for name in names_in(metrics) if "perplexity" in name or "bits" in name]
    assert (metrics["train_documents"], metrics["test_documents"]) == (12, 12)
    assert isinstance(run.fitted.model.likelihood, Choice)
    theta = run.fitted.weights()[0]
    for side in ("test", "validation"):
        for of, weights in (("base_", None), ("", theta)):
            found = answers(run.fitted.model, getattr(run.data, side), lambda weights=weights: [weights])
            for d, where in [(None, None), *((d, found.task == d) for d in range(2))]:
                measured = calibration(found, where=where)
                stored = metrics if d is None else [*metrics["tasks"].values()][d]
                for name in MEASURES:
                    assert stored[f"{of}{side}_{name}"] == pytest.approx(getattr(measured, name), rel=1e-5)
    assert metrics["test_nll"] < metrics["base_test_nll"]
    log = RunFolder.open(finished).read_log()
    assert metrics["validation_nll"] == min(record["validation_nll"] for record in log) == run.fitted.validation_score
    assert metrics["best_epoch"] == 1 + [record["validation_nll"] for record in log].index(metrics["validation_nll"])


def test_the_table_on_the_screen_names_what_it_shows(options, tmp_path, capsys):
    assert command_main()(line(options | {"output_dir": tmp_path / "run", "epochs": 1})) == 0
    shown = capsys.readouterr()
    assert "perplexity" not in shown.out + shown.err
    first, second = (row.split() for row in shown.out.splitlines()[:2])
    assert first == ["train", "test", "base", "adapted", "base", "adapted"]
    assert second == ["task", "documents", "documents", "NLL", "NLL", "accuracy", "accuracy", "‖θ_d", "−", "Θ‖"]
    metrics = metrics_of(tmp_path / "run")
    [total] = [row for row in shown.out.splitlines() if row.split()[:2] == ["all", "tasks"]]
    names = ("base_test_nll", "test_nll", "base_test_accuracy", "test_accuracy")
    assert total.split()[2:] == ["12", "12", *(f"{metrics[name]:.3f}" for name in names), "–"]
    assert f"validation NLL {metrics['validation_nll']:.3f}" in shown.err
    assert "30 rows read; 30 documents of 2 tasks: 12 train, 6 validation, 12 test" in shown.err


def test_a_run_is_resumed(options, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = metrics_of(folder)
    (folder / "metrics.json").unlink()
    assert command_main()(line(options | {"output_dir": folder, "resume": "true"})) == 0
    assert metrics_of(folder)["test_nll"] == pytest.approx(before["test_nll"], rel=1e-5)
    capsys.readouterr()
    assert command_main()(line(options | {"output_dir": folder, "resume": "true", "option_score": "sum"})) == 2
    assert "option_score" in capsys.readouterr().err


def test_a_posterior_has_the_measures_of_its_mixture(posterior, finished, capsys):
    metrics, run = metrics_of(posterior), load_run(posterior)
    assert not [name for name in names_in(metrics) if "perplexity" in name]
    assert metrics["map_test_nll"] == metrics_of(finished)["test_nll"]
    found = run.posterior().answers(run.data.test, draws=3)
    assert metrics["mixture_test_nll"] == pytest.approx(-float(found.log_prob.mean()), rel=1e-5)
    assert metrics["mixture"]["brier"] == pytest.approx(float(found.brier.mean()), rel=1e-5)
    assert metrics["mixture"]["tokens"] == 12
    for d, task in enumerate(metrics["tasks"].values()):
        own = found.task == d
        assert task["mixture_test_accuracy"] == pytest.approx(float(found.correct[own].double().mean()))
        assert task["epistemic"] == pytest.approx(float(found.epistemic[own].mean()), abs=1e-6)


@pytest.mark.parametrize("guide", ["laplace", "laplace_kronecker", "low_rank", "structured", "swag", "tfb"])
def test_other_guides_around_a_fit(finished, tmp_path, guide):
    words = {"guide": guide, "epochs": 1, "draws": 2, "output_dir": tmp_path / "run", "threads": 1}
    words |= {"predict": "linearised"} if guide == "laplace" else {}
    assert command_main("posterior-fit")([str(finished), *line(words)]) == 0
    assert metrics_of(tmp_path / "run")["mixture_test_nll"] > 0


def test_the_calibration_is_that_of_answers(posterior, finished, tmp_path, capsys):
    questions = [{"prompt": "0 is", "options": OPTIONS, "correct": 0, "task": "Ada"}]
    more = ["--questions", write(tmp_path / "questions.jsonl", questions)]
    for folder, names in ((finished, ["map"]), (posterior, ["mean", "mixture"])):
        words = {"output": tmp_path / "out"} | ({"draws": 3} if len(names) > 1 else {})
        assert command_main("calibrate")([str(folder), *line(words), *more]) == 0
        shown = capsys.readouterr().out
        assert "12 questions of the test documents:" in shown
        assert "token" not in shown
        found = pd.read_csv(tmp_path / "out" / "calibration.csv", index_col="task")
        assert found["questions"].tolist() == [6, 6, 12]
        metrics, last = metrics_of(folder), found.loc["all"]
        assert last[f"{names[0]}_ece"] == pytest.approx(metrics["test_ece"], abs=1e-5)
        if len(names) > 1:
            assert last["mixture_brier"] == pytest.approx(metrics["mixture"]["brier"], abs=1e-4)
    assert command_main("calibrate")([str(finished), "--foreign", "builtin:documentation"]) == 2
    assert "--foreign needs a fit to texts; this one, under Choice(" in capsys.readouterr().err


@pytest.mark.parametrize("number", [5, 16])
def test_new_tasks_with_few_questions(finished, tmp_path, capsys, number):
    rows = table(("Dora",), number=number + 8, sides=["test"] * 8 + ["train"] * number)
    data = write(tmp_path / "new.jsonl", rows)
    words = line({"data": data, "split_column": "split", "steps": 5, "output_dir": tmp_path / "new", "guide": "normal"})
    assert command_main("adapt")([str(finished), *words]) == 0
    assert "perplexity" not in capsys.readouterr().out
    metrics, found = metrics_of(tmp_path / "new"), load_run(tmp_path / "new")
    assert (found.fitted.documents, metrics["tasks"]["dora"]["test_documents"]) == ([number], 8)
    (scores,) = evaluate(found.fitted.model, found.data.test, found.fitted.weights()[0])
    assert metrics["test_nll"] == pytest.approx(scores.nll(), rel=1e-5)
    assert metrics["validation_nll"] is None
    assert found.posterior().answers(found.data.test, draws=2).probabilities.shape == (8, 3)


def test_the_page_and_the_diagnostics_know_the_measure(posterior, finished, tmp_path):
    for folder, first in ((finished, "test NLL, nats a question"), (posterior, "test NLL, nats a question, posterior mean")):
        metrics = metrics_of(folder)
        page = run_page(folder, RunOptions(draws=2, samples=0))
        numbers = {number.label: number.text for number in page.numbers}
        assert next(iter(numbers)) == first
        assert numbers[first] == f"{metrics['test_nll']:.3f}"
        assert numbers["validation NLL, nats a question"] == f"{metrics['validation_nll']:.3f}"
        assert "perplexity" not in repr(page)
        [results] = page.sections[0].blocks
        headings = [column.heading for column in results.columns]
        assert {"base NLL", "adapted NLL", "accuracy", "calibration error (ECE)", "Brier score"} <= {*headings}
        assert results.total[headings.index("Brier score")] == metrics["test_brier"]
    assert command_main("diagnose")([str(finished), "--output", str(tmp_path / "out")]) == 0
    shrinkage = pd.read_csv(tmp_path / "out" / "shrinkage.csv")
    expected = [task["test_nll"] for task in metrics_of(finished)["tasks"].values()]
    assert shrinkage["test_nll"].tolist() == pytest.approx(expected, rel=1e-4)


def test_fits_are_compared_by_their_answers(finished, posterior):
    one, other = load_run(finished), load_run(posterior)
    containers = {"map": held_out(one.fitted, one.data), "normal": held_out(other.fitted, other.data, draws=2)}
    compared = compare_priors(containers)
    assert "perplexity" not in compared
    assert compared.elpd_per_question["map"] == pytest.approx(-metrics_of(finished)["test_nll"], rel=1e-5)


def test_the_options_of_the_likelihood_reach_it(options, tmp_path):
    folder = map_run(options | {"option_score": "sum", "epochs": 1, "streaming": True, "output_dir": tmp_path / "run"})
    run = load_run(folder)
    assert run.fitted.model.likelihood.option_score == "sum"
    (scores,) = evaluate(run.fitted.model, run.data.test, run.fitted.weights()[0])
    assert metrics_of(folder)["test_nll"] == pytest.approx(scores.nll(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options_column": None}, r"likelihood choice observes answers among options; name their column \(options_column\)"),
        ({"likelihood_unit": "documents"}, "likelihood_unit is documents, which likelihood choice does not have; leave it out"),
        ({"likelihood": "causal_lm", "option_score": "sum"}, "option_score is sum, which likelihood causal_lm does not have"),
        ({"option_score": "product"}, "option_score is 'product'; allowed: mean, sum"),
        ({"likelihood": "choise"}, "likelihood is 'choise'; allowed: causal_lm, choice, dpo; did you mean 'choice'"),
        ({"long_documents": "split"}, "no option is split"),
        ({"options_column": "choices"}, r"has no column 'choices' \(options_column\)"),
    ],
)
def test_options_that_do_not_fit_together(options, tmp_path, capsys, change, words):
    changed = {name: value for name, value in (options | change).items() if value is not None}
    assert command_main()(line(changed | {"output_dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_needs_texts_is_refused_in_one_line(finished, options, tmp_path, capsys):
    assert command_main("infer-task")([str(finished), "--text", "red"]) == 2
    assert "infer-task needs a fit to texts" in capsys.readouterr().err
    again = shutil.copytree(finished, tmp_path / "again")
    assert command_main("fold")([str(finished), str(again), "--output_dir", str(tmp_path / "fold")]) == 2
    assert "fold needs a fit to texts" in capsys.readouterr().err
    with pytest.raises(InputError, match="has the NLL, nats a question, and a sweep compares perplexities"):
        rows_of_run(finished)
    (tmp_path / "fit.yaml").write_text("likelihood: choice\noptions_column: options\n", encoding="utf-8")
    with pytest.raises(InputError, match="has likelihood choice, and a sweep compares perplexities"):
        SweepConfig(fit_config=str(tmp_path / "fit.yaml"), data=options["data"]).validate()
    texts = write(tmp_path / "texts.jsonl", [{"task": "Dora", "text": "red"}])
    assert (
        command_main("adapt")([str(finished), *line({"data": texts, "output_dir": tmp_path / "new", "text_column": "text"})]) == 2
    )
    assert "these documents have no options; name their column (options_column)" in capsys.readouterr().err


def test_a_fit_to_texts_does_not_take_options_of_new_tasks(options, tmp_path, capsys):
    folder = map_run({**options, "likelihood": "causal_lm", "epochs": 1, "output_dir": tmp_path / "run"})
    assert "test_accuracy" in metrics_of(folder)
    data = write(tmp_path / "new.jsonl", table(("Dora",), sides=["train"]))
    assert command_main("adapt")([str(folder), *line({"data": data, "output_dir": tmp_path / "new", "steps": 1})]) == 0
    assert load_run(tmp_path / "new").data.train.correct is None
    again = line({"data": data, "output_dir": tmp_path / "other", "options_column": "options", "prompt_column": "prompt"})
    capsys.readouterr()
    assert command_main("adapt")([str(folder), *again, "--completion_column", "completion"]) == 2
    assert "does not observe answers among options; leave it out" in capsys.readouterr().err
