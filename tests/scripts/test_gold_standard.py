"""NUTS against the guides: documents come from the model, NUTS finds a known posterior, comparisons of known draws are right."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from bora_pyro import HierarchicalNormal, InputError
from bora_pyro.diagnostics.plots import scale_scatter
from bora_pyro.predict.mixture import predictive
from tests.linear_gaussian import LinearGaussian
from tests.tiny_base import SCRIPTS, script

gold = script("gold_standard")

SMALL = {"documents": ["2", "5"], "held_out": 3, "tokens": 6, "width": 4, "rank": 1, "warmup": 4, "draws": 8, "tree_depth": 2,
         "steps": 20, "guide_draws": 10, "mixture": 4}  # fmt: skip


def config(**options):
    return gold.GoldStandardConfig(**SMALL | options)


def test_documents_are_the_language_model_s_own():
    problem = gold.problem(config(documents=["4000", "1"], tokens=1))
    [batch] = problem.data.train.batches(token_budget=gold.EVERYTHING)
    assert problem.data.train.documents_per_task == [4000, 1]
    assert (batch.input_ids[:, 0] == gold.START).all()
    expected = problem.model.logits(batch, problem.theta)[batch.task == 0, 0].softmax(-1)[0]
    frequency = torch.bincount(batch.input_ids[batch.task == 0, 1], minlength=gold.VOCABULARY) / 4000
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)
    again = gold.problem(config(documents=["4000", "1"], tokens=1))
    torch.testing.assert_close(again.data.test.tokens, problem.data.test.tokens, rtol=0, atol=0)


def test_nuts_samples_a_known_posterior():
    tau = 3.0
    model = LinearGaussian(HierarchicalNormal(tau), counts=(1, 4, 16), shape=(1, 1, 2))
    options = config(warmup=50, draws=150, tree_depth=3)
    chains, divergences = gold.sample(options, model, None, model.sites_at_maximum(tau))
    draws = gold.entries(model, [sites for chain in chains for sites in chain])
    (theta, mean), h = model.maximum(tau), model.curvature()
    of_mean = 1 / (1 / (1 / tau + 1 / h)).sum(0)
    variance = 1 / (tau + h) + (tau / (tau + h)) ** 2 * of_mean
    assert divergences == 0
    torch.testing.assert_close(draws["mean"].mean(0)[0], mean.flatten(), atol=0.15, rtol=0)
    torch.testing.assert_close(draws["theta"].mean(0), theta.flatten(1), atol=0.15, rtol=0)
    torch.testing.assert_close(draws["theta"].std(0), variance.sqrt().flatten(1), atol=0, rtol=0.25)


def test_comparison_of_known_draws():
    generator = torch.Generator().manual_seed(0)
    reference = {name: torch.randn((50, tasks, 3), generator=generator).double()
                 for name, tasks in (("mean", 1), ("deviation", 2), ("theta", 2))}  # fmt: skip
    table, numbers = gold.compare([2, 5], reference, reference)
    assert numbers == {"mean": 1, "deviation_2": 1, "deviation_5": 1, "theta_2": 1, "theta_5": 1, "error_2": 0, "error_5": 0}
    assert len(table) == 15
    found = {name: 2 * value for name, value in reference.items()}
    found["theta"] = reference["theta"] + 3 * reference["theta"].std(0)
    table, numbers = gold.compare([2, 5], reference, found)
    assert [numbers[name] for name in ("mean", "deviation_5", "theta_2", "error_2", "error_5")] == pytest.approx([2, 2, 1, 3, 3])
    own = table[(table["quantity"] == "deviation") & (table["documents"] == 5)]
    np.testing.assert_allclose(own["sd"], found["deviation"].std(0)[1])
    np.testing.assert_allclose(own["nuts_mean"], reference["deviation"].mean(0)[1])


def test_entries_add_up():
    model = LinearGaussian(HierarchicalNormal(3.0))
    sites = model.sites_at_maximum(3.0)
    found = gold.entries(model, [sites, sites])
    torch.testing.assert_close(found["theta"], found["mean"] + found["deviation"])
    torch.testing.assert_close(found["theta"][1], model.maximum(3.0)[0].flatten(1))


def test_predictions_are_the_library_s():
    problem = gold.problem(config())
    draws = [problem.theta, {name: value + 1 for name, value in problem.theta.items()}]
    predictions = gold.Predictions(problem, [2, 5])
    found = gold.probabilities(problem.model, predictions.batch, draws)
    assert predictions.columns(found, found)["probability_difference"] == 0
    theirs = predictive(problem.model, problem.data.test, lambda: draws)
    numbers = predictions.columns(found, found + 0.25)
    assert numbers["log_density"] == pytest.approx(float(theirs.log_prob.mean()), rel=1e-5)
    assert numbers["log_density_5"] == pytest.approx(float(theirs.log_prob[theirs.task == 1].mean()), rel=1e-5)
    assert numbers["probability_difference"] == pytest.approx(0.25, rel=1e-5)


def test_the_end_of_the_bound():
    history = [{"objective": -float(step)} for step in range(40)]
    assert gold.end_of_elbo(SimpleNamespace(history=history), 10) == {"elbo": 375.0, "elbo_change": 40.0}
    assert gold.end_of_elbo(SimpleNamespace(history=[]), 10) == {}


def test_the_command(tmp_path, capsys, monkeypatch):
    options = {name: " ".join(value) if isinstance(value, list) else value for name, value in SMALL.items()}
    options |= {"output": tmp_path / "g.csv", "summary": tmp_path / "s.csv"}
    assert gold.main([word for name, value in options.items() for word in (f"--{name}", *str(value).split())]) == 0
    assert "NUTS: r-hat at most" in capsys.readouterr().out
    table, summary = pd.read_csv(tmp_path / "g.csv"), pd.read_csv(tmp_path / "s.csv").set_index("guide")
    guides = gold.COMPARED
    assert list(summary.index) == ["truth", "base", "nuts", "map", *guides]
    assert table["guide"].value_counts().to_dict() == dict.fromkeys(guides, 4 * (1 + 2 + 2))
    assert summary.loc[guides, ["mean", "theta_2", "error_5", "log_density"]].notna().all(axis=None)
    assert summary.loc["nuts", "r_hat"] > 0.9
    monkeypatch.syspath_prepend(SCRIPTS.parent / "paper_figures")
    figure = importlib.import_module("gold_standard_figure")
    paths = {"gold_standard": str(tmp_path / "g.csv"), "summary": str(tmp_path / "s.csv"), "output": str(tmp_path / "f.png")}
    assert figure.draw(figure.GoldStandardFigureConfig(**paths)) == paths["output"]
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chains", "1"], "chains is 1; give a whole number from 2 up"),
        (["--width", "5"], "width is 5; give an even number for the two heads, nearest: 6"),
        (["--documents", "4"], "documents is 4; give two or more whole numbers above 0"),
        (["--documents", "4", "4"], "documents is 4 4; give different numbers, which identify the tasks"),
        (["--tau", "0"], "tau=0.0 is a limit of HierarchicalNormal; use Independent(), or prior_from_tau(0.0)"),
    ],
)
def test_bad_options(capsys, words, message):
    assert gold.main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_scatter_has_every_entry():
    table = pd.DataFrame(
        {"quantity": ["mean", "theta", "theta"], "documents": [0, 4, 9], "nuts_sd": [0.1, 0.2, 0.4], "sd": [0.3, 0.2, 0.1]}
    )
    figure, ax = plt.subplots()
    scale_scatter(table, ax)
    points = {line.get_gid(): line.get_xydata().tolist() for line in ax.lines}
    assert "diagonal" in points
    del points["diagonal"]
    assert points == {"mean 0": [[0.1, 0.3]], "theta 4": [[0.2, 0.2]], "theta 9": [[0.4, 0.1]]}
    assert len({line.get_marker() for line in ax.lines if "theta" in str(line.get_gid())}) == 2
    plt.close(figure)
    with pytest.raises(InputError, match="a standard deviation that is not a number above 0"):
        scale_scatter(table.assign(sd=0.0), ax)
    with pytest.raises(InputError, match="lacks the column sd"):
        scale_scatter(table.drop(columns="sd"), ax)
