"""A posterior fit from a MAP run folder to a run folder of its own, and back."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from bora_pyro import InputError
from bora_pyro.diagnostics.evidence import log_evidence
from bora_pyro.guides import GUIDES
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.adapt import run_adapt
from bora_pyro.runs.config.adapt import AdaptConfig
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig, parse_config
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import _guide, usual_scale
from bora_pyro.runs.saved import load_run
from tests import tiny_base
from tests.runs.posterior import posterior_fit
from tests.tiny_base import command_main, line

SPREAD = [name for name in GUIDES if name != "map"]


@pytest.fixture(scope="module")
def main():
    return command_main("posterior-fit")


@pytest.mark.parametrize("guide", SPREAD)
def test_a_posterior_comes_back_from_its_folder(tmp_path, map_run, guide):
    metrics = posterior_fit(map_run, tmp_path / "posterior", guide=guide)
    run, start = load_run(tmp_path / "posterior"), load_run(map_run)
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)
    mixture = run.posterior(seed=0).score(run.data.test, draws=2)
    assert mixture.perplexity() == pytest.approx(metrics["mixture_test_perplexity"], rel=1e-6)
    assert metrics["mixture"]["nll"] == pytest.approx(math.log(metrics["mixture_test_perplexity"]), rel=1e-6)
    # the same τ, and the same documents on the same sides
    assert run.fitted.tau_by_group() == start.fitted.tau_by_group()
    assert run.folder.read_split() == start.folder.read_split()
    assert json.loads((tmp_path / "posterior" / "metrics.json").read_text())["guide"] == guide
    moved = (run.fitted.weights()[0]["fc2.lora_B"] - start.fitted.weights()[0]["fc2.lora_B"]).abs().max()
    assert (moved == 0) == (not [*run.fitted.guide.parameters()])


def test_a_swag_posterior_tells_what_the_validation_documents_chose(tmp_path, map_run, monkeypatch):
    options = {"guide": "swag", "guide_option": ["scales=0.5,2", "columns=2"], "token_budget": 64}
    metrics = posterior_fit(map_run, tmp_path / "posterior", learning_rate=1e-3, **options)
    losses = metrics["chosen"]["scales"]
    assert metrics["chosen"]["scale"] == pytest.approx(float(min(losses, key=losses.get)))
    assert metrics["averaged"]
    guide = load_run(tmp_path / "posterior").fitted.guide
    assert (float(guide.scale), int(guide.filled)) == (metrics["chosen"]["scale"], 2)
    assert not any("higher validation perplexity" in note for note in metrics["notes"])
    monkeypatch.setattr("bora_pyro.inference.best_state.BestState.score", lambda best: 1e4)
    metrics = posterior_fit(map_run, tmp_path / "far", learning_rate=1.0, **options)
    assert metrics["best_epoch"] == 1
    [note] = [note for note in metrics["notes"] if "the mean of the steps has a higher validation perplexity" in note]
    assert note.endswith("or a smaller --learning_rate (now 1; try 0.3)")


def test_a_tfb_posterior_has_a_variance_for_each_task(tmp_path, map_run):
    metrics = posterior_fit(map_run, tmp_path / "posterior", guide="tfb", guide_option=["least_documents=1", "largest=0.01"])
    run = load_run(tmp_path / "posterior")
    assert run.fitted.guide.sigma.tolist() == pytest.approx(metrics["chosen"]["sigma"])
    assert metrics["epochs"] == 0
    assert metrics["test_perplexity"] == pytest.approx(metrics["map_test_perplexity"], rel=1e-6)
    assert metrics["mixture_test_perplexity"] != pytest.approx(metrics["test_perplexity"], rel=1e-9)
    limited = [note for note in metrics["notes"] if "tasks have the largest standard deviation, 0.01" in note]
    assert len(limited) == any(sigma > 0.0095 for sigma in metrics["chosen"]["sigma"])


def test_the_option_of_a_guide_comes_back_from_its_folder(tmp_path, map_run):
    posterior_fit(map_run, tmp_path / "posterior", guide="low_rank", guide_option=["rank=3"])
    guide = load_run(tmp_path / "posterior").fitted.guide
    assert guide.get("factor", "prior_mean.fc2.lora_B").shape[-1] == 3
    with pytest.raises(InputError, match=r"guide_option is \['rank=4'\], but the run in .* has \['rank=3'\]"):
        posterior_fit(map_run, tmp_path / "posterior", guide="low_rank", guide_option=["rank=4"], resume=True)


def test_linearised_draws_of_laplace(tmp_path, map_run):
    metrics = posterior_fit(map_run, tmp_path / "posterior", guide="laplace", predict="linearised")
    run = load_run(tmp_path / "posterior")
    mixture = run.posterior(seed=0).score(run.data.test, draws=2, linearised=True)
    assert mixture.perplexity() == pytest.approx(metrics["mixture_test_perplexity"], rel=1e-6)
    assert metrics["predict"] == "linearised"
    # far from the MAP the network is not what Laplace's approximation is about
    assert metrics["mixture_test_perplexity"] < run.posterior(seed=0).score(run.data.test, draws=2).perplexity()


def test_the_temperature_that_validation_chooses_and_the_evidence(tmp_path, map_run, main, capsys):
    options = {"guide": "laplace_kfac", "predict": "linearised"}
    plain = posterior_fit(map_run, tmp_path / "plain", guide_option=["axes=3"], **options)
    chosen = posterior_fit(map_run, tmp_path / "chosen", guide_option=["axes=3", "temperatures=1,1e-4"], **options)
    assert "chosen" not in plain
    assert chosen["chosen"]["temperature"] == 1e-4
    assert chosen["mixture_test_perplexity"] < plain["mixture_test_perplexity"]
    assert "evidence" not in chosen  # that of a temperature means nothing
    evidence = plain["evidence"]
    guide = load_run(tmp_path / "plain").fitted.guide
    assert evidence["nats"] == pytest.approx(log_evidence(guide, load_run(map_run).data.train).nats, rel=1e-5)
    kept = guide.kept("curvature", "fc2.lora_B")
    torch.testing.assert_close(load_run(tmp_path / "chosen").fitted.guide.kept("curvature", "fc2.lora_B"), 1e4 * kept)
    words = ["--guide", "laplace", "--draws", "2", "--threads", "1", "--output_dir", str(tmp_path / "said")]
    assert main([str(map_run), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("log evidence: ")


@pytest.mark.parametrize("hyperprior", ["half_cauchy", "gamma"])
def test_tau_as_a_random_variable(tmp_path, map_run, hyperprior):
    metrics = posterior_fit(map_run, tmp_path / "posterior", tau=hyperprior)
    run, start = load_run(tmp_path / "posterior"), load_run(map_run)
    before = start.fitted.tau_by_group()
    assert run.fitted.tau_by_group() == pytest.approx(metrics["tau_by_group"], rel=1e-6)
    # it began at the τ of the run, and one epoch moves it, but not far
    assert metrics["tau_by_group"] == pytest.approx(before, rel=0.5)
    assert metrics["tau_by_group"] != pytest.approx(before, rel=1e-6)
    posterior = run.posterior()
    draws = [posterior.sites(k)["precision.fc2.lora_B"].item() for k in range(20)]
    assert min(draws) < metrics["tau_by_group"]["fc2.lora_B"] < max(draws)


def test_tau_of_a_limit_cannot_be_random(tmp_path, map_run):
    words = (map_run / "config.yaml").read_text()
    pooled = tmp_path / "pooled"
    config = parse_config(MapFitConfig, ["--config", str(map_run / "config.yaml"), "--tau", "inf", "--output_dir", str(pooled)])
    run_map_fit(config, quiet=True)
    with pytest.raises(InputError, match=r"tau of the fit is inf, a limit"):
        posterior_fit(pooled, tmp_path / "posterior", tau="gamma")
    assert not (tmp_path / "posterior").exists()
    assert words == (map_run / "config.yaml").read_text()
    metrics = posterior_fit(pooled, tmp_path / "posterior")
    assert metrics["tau"] is None or metrics["tau"] == "inf"
    with pytest.raises(InputError, match=r"deviations have no scale of their own"):
        load_run(tmp_path / "posterior").posterior().deviation_scales()


def test_posterior_of_a_task(tmp_path, map_run):
    posterior_fit(map_run, tmp_path / "posterior")
    run = load_run(tmp_path / "posterior")
    posterior = run.posterior(seed=3)
    predictions = posterior.predict(["red green blue", "one two"], "Ada", draws=3)
    assert predictions.log_likelihood.shape == (3, 2)
    assert set(predictions.task.tolist()) == {posterior.tasks.index("Ada")}
    # each draw is known by its number, and each is another one
    torch.testing.assert_close(posterior.draw(1), posterior.draw(1), rtol=0, atol=0)
    assert not torch.equal(posterior.draw(1)["fc2.lora_B"], posterior.draw(2)["fc2.lora_B"])
    by_hand = torch.stack(
        [
            predictive(run.fitted.model, split, lambda k=k: [posterior.draw(k)]).log_likelihood[0]
            for split in [posterior.split_of(["red green blue", "one two"], "Ada")]
            for k in range(3)
        ]
    )
    torch.testing.assert_close(predictions.log_likelihood, by_hand)
    scales = posterior.deviation_scales(draws=8)
    assert scales.shape == (3,)
    assert bool(((scales > 0) & (scales < 1.5)).all())
    assert repr(posterior) == "Posterior(NormalGuide, 3 tasks)"


def test_the_command_says_what_came_of_it(tmp_path, map_run, main, capsys):
    assert main([str(map_run), *line({"output_dir": tmp_path / "out", "epochs": 1, "draws": 2, "threads": 1})]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3].startswith("test perplexity: MAP ")
    assert said[-2].startswith("calibration error (ECE): ")
    assert said[-1] == f"run folder: {tmp_path / 'out'}"


BAD = {
    "no run": ([], "no run is given; name the folder of a MAP fit*"),
    "foreign folder": (["{tmp}/none"], "run folder {tmp}/none does not exist*"),
    "map": (["{run}", "--guide", "map"], "guide is 'map', but the run is already that point estimate*"),
    "unknown guide": (["{run}", "--guide", "norml"], "guide is 'norml'; allowed: normal, *; did you mean 'normal'?"),
    "unknown option": (
        ["{run}", "--guide", "low_rank", "--guide_option", "ranks=3"],
        "guide low_rank has no option 'ranks'; did you mean 'rank'?",
    ),
    "no option": (["{run}", "--guide_option", "scale=1"], "guide normal has no option 'scale'; it has none"),
    "option": (["{run}", "--guide", "low_rank", "--guide_option", "rank=many"], "guide_option rank is 'many'; give a whole*"),
    "bad option": (["{run}", "--guide", "low_rank", "--guide_option", "rank=0"], "rank of the covariance is 0; give a whole*"),
    "predict": (["{run}", "--predict", "mean"], "predict is 'mean'; allowed: draws, linearised*"),
    "no draw": (["{run}", "--draws", "0"], "draws is 0; give a whole number from 1 up"),
    "scale": (["{run}", "--scale", "0"], "scale is 0*; give a finite number above 0"),
    "temperature": (["{run}", "--temperature", "inf"], "temperature is inf; give a finite number above 0"),
    "tau": (
        ["{run}", "--tau", "half_cauch"],
        "tau is 'half_cauch'; allowed: fixed, half_cauchy, gamma; did you mean 'half_cauchy'?",
    ),
    "tau of laplace": (["{run}", "--tau", "gamma", "--guide", "laplace"], "guide laplace needs a fixed tau*"),
    "tau of swag": (["{run}", "--tau", "gamma", "--guide", "swag"], "guide swag needs a fixed tau*"),
    "tau of tfb": (["{run}", "--tau", "gamma", "--guide", "tfb"], "guide tfb needs a fixed tau*"),
    "tolerance": (
        ["{run}", "--guide", "tfb", "--guide_option", "tolerance=0"],
        "tolerance is 0.0; give a finite number above 0, the part by which the loss may rise",
    ),
    "no average": (["{run}", "--guide", "swag", "--average", "false"], "average is false, but SwagGuide is*; leave it out"),
    "onto itself": (["{run}", "--output_dir", "{run}"], "output_dir {run} is the run itself*"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, map_run, main, capsys, words, message):
    from fnmatch import fnmatchcase

    before = sorted(path.name for path in map_run.iterdir())
    words = [word.format(run=map_run, tmp=tmp_path) for word in words]
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert fnmatchcase(said.splitlines()[-1], "error: " + message.format(run=map_run, tmp=tmp_path)), said
    assert not (tmp_path / "out").exists()
    assert before == sorted(path.name for path in map_run.iterdir())


@pytest.mark.parametrize(("tau", "scale"), [(100.0, 0.45), (10_000.0, 0.5), (1.0, 0.045), (0.0, 0.5), (math.inf, 0.5)])
def test_theusual_scale_is_narrow_where_the_prior_is_wide(tau, scale):
    assert usual_scale(tau) == pytest.approx(scale)


def test_theusual_scale_is_where_a_posterior_begins(tmp_path, map_run):
    config = PosteriorFitConfig(run=str(map_run), output_dir=str(tmp_path / "posterior"))
    run = load_run(map_run)
    expected = usual_scale(run.fitted.tau())
    guide = _guide(config, run)
    scales = [value.exp() for name, value in guide.state_dict().items() if name.startswith("log_scale/theta")]
    assert scales
    assert all(torch.allclose(value, torch.tensor(expected)) for value in scales)


def test_a_posterior_is_fitted_even_if_its_mean_is_worse_than_the_map(tmp_path, map_run, monkeypatch):
    metrics = posterior_fit(map_run, tmp_path / "good")
    assert metrics["best_epoch"] == 1
    assert not any("than the MAP" in note for note in metrics["notes"])
    scores = itertools.count(1e4)  # each is worse than the one before
    monkeypatch.setattr("bora_pyro.inference.best_state.BestState.score", lambda best: next(scores))
    metrics = posterior_fit(map_run, tmp_path / "bad", learning_rate=0.03)
    assert metrics["best_epoch"] == 1  # the start, whose scales are those of --scale, does not count
    [note] = [note for note in metrics["notes"] if "the posterior's mean has a higher validation perplexity than the MAP" in note]
    assert note.endswith("use more --epochs, or a smaller --learning_rate (now 0.03; try 0.01)")
    begun = _guide(PosteriorFitConfig(run=str(map_run), output_dir="unused"), load_run(map_run)).state_dict()
    fitted = load_run(tmp_path / "bad").fitted.guide.state_dict()
    assert all(not torch.equal(value, begun[name]) for name, value in fitted.items() if name.startswith("log_scale"))


def test_a_posterior_of_a_posterior(tmp_path, map_run):
    posterior_fit(map_run, tmp_path / "first")
    with pytest.raises(InputError, match=r"is a posterior already; give the MAP fit"):
        posterior_fit(tmp_path / "first", tmp_path / "second")


def test_a_posterior_of_new_tasks_is_made_as_they_are_adapted(tmp_path, map_run, main, capsys):
    data = tiny_base.write_table(tmp_path / "new.csv", tiny_base.documents(("Dora",), number=2))
    run_adapt(AdaptConfig(run=str(map_run), data=data, steps=1, output_dir=str(tmp_path / "new")), quiet=True)
    with pytest.raises(InputError, match=r"is a point estimate and has no posterior; adapt with --guide normal$"):
        load_run(tmp_path / "new").posterior()
    capsys.readouterr()
    assert main([str(tmp_path / "new"), "--output_dir", str(tmp_path / "out")]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "adapted from another fit; for a posterior of theirs adapt with --guide normal instead" in error
    assert not (tmp_path / "out").exists()


def test_a_point_estimate_has_no_posterior(map_run):
    run = load_run(map_run)
    with pytest.raises(InputError, match=r"is a point estimate and has no posterior; fit one around it"):
        run.posterior()
    with pytest.raises(InputError, match=r"this fit is a point estimate"):
        Posterior(run.fitted)


def test_bad_predictions(tmp_path, map_run):
    posterior_fit(map_run, tmp_path / "posterior")
    posterior = load_run(tmp_path / "posterior").posterior()
    with pytest.raises(InputError, match=r"task 'Adda' is not in this fit, which has 3; did you mean 'Ada'\?"):
        posterior.predict("red", "Adda")
    with pytest.raises(InputError, match=r"draws is 0; give a whole number from 1 up"):
        posterior.predict("red", "Ada", draws=0)
    with pytest.raises(InputError, match=r"2 texts given, of which 1 have a token"):
        posterior.predict(["red", ""], "Ada")
    with pytest.raises(InputError, match=r"draws is 1; a standard deviation needs 2 or more"):
        posterior.deviation_scales(draws=1)


def test_scales_that_diverge_end_the_fit_at_the_best_state(tmp_path, map_run):
    from bora_pyro.inference.fit import NonFiniteLossError

    with pytest.raises(
        NonFiniteLossError,
        match=r"(the loss is not finite|a draw of the guide gives NaN or inf logits) .*the state of epoch 0 is kept. Use",
    ):
        posterior_fit(map_run, tmp_path / "posterior", learning_rate=1e6)
