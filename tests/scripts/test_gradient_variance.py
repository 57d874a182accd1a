"""The estimators whose noise is measured are estimators of the same gradient."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from bora_pyro.guides import normal_guide
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.runs.saved import load_run
from tests.tiny_base import map_run, quick_fit, script_main


@pytest.fixture(scope="module")
def main():
    return script_main("gradient_variance")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    return map_run({**quick_fit(folder), "output_dir": folder / "run"})


def without_noise(monkeypatch):
    for name in ("randn", "randn_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, original=original, **kwargs: 0 * original(*args, **kwargs))


def test_every_estimator_is_the_elbo_where_there_is_no_noise(folder, main, monkeypatch):
    module, run = main.__globals__, load_run(folder)
    estimators = module["Estimators"](run, 0.5)
    [batch, *_] = run.data.train.batches(token_budget=run.config.token_budget, seed=0)
    guide = normal_guide(run.fitted.model, run.fitted.sites(), scale=0.5)
    guide(batch)
    with monkeypatch.context() as patch:
        without_noise(patch)
        patch.setattr(torch.distributions.Normal, "rsample", lambda self, shape=None: self.loc)
        TemperedELBO().differentiable_loss(run.fitted.model, guide, batch).backward()
        found = {kind: estimators.gradient(kind, batch) for kind in module["PASSES"] if kind != "sampled_kl"}
    for place, kind in enumerate(("loc/prior_mean", "log_scale/prior_mean", "loc/theta", "log_scale/theta")):
        expected = {name: value.grad for name, value in guide.named_parameters() if name.startswith(kind)}
        ours = [expected[name] for latent in run.fitted.model.starts for name in expected if latent.replace(".", "/") in name]
        flat = torch.cat([value.flatten() for value in ours])
        for gradients in found.values():
            torch.testing.assert_close(gradients[module["PARTS"][place]], flat, rtol=1e-4, atol=1e-4)


def test_total_variance(main):
    draws = iter(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    found = main.__globals__["total_variance"](lambda: {"x": next(draws)}, 3)
    assert found == {"x": pytest.approx(4 + 12)}


def test_the_table(folder, main, tmp_path, capsys):
    assert main([str(folder), "--draws", "4", "--batches", "1", "--output", str(tmp_path / "table.csv")]) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert set(table.estimator) == {*main.__globals__["PASSES"]}  # all documents are one batch
    assert (table[table.estimator == "exact_kl"].at_equal_cost == 1).all()
    assert (table.variance > 0).all()
    assert "| exact_kl | 1 | 1 | 1 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is given"),
        (["{tmp}"], "{tmp} is no run folder"),
        (["x", "--draws", "1"], "draws is 1; give a whole number from 2"),
    ],
)
def test_bad_input(main, tmp_path, capsys, words, message):
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    assert capsys.readouterr().err.startswith("error: " + message.format(tmp=tmp_path))
