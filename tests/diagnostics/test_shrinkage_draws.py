"""The shrinkage container of a posterior: its draws, one at a time, and what is made of them."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch
import xarray as xr

from bora_pyro import Backbone, BoRA, HierarchicalNormal, Independent, InputError, LoRA, Pooled, fit
from bora_pyro.diagnostics import deviations as tensor_maths
from bora_pyro.diagnostics.containers import has_inference_data
from bora_pyro.diagnostics.shrinkage import compare_priors, held_out, shrinkage
from bora_pyro.guides import LaplaceGuide, laplace_guide, normal_guide
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.fitted import Fitted
from bora_pyro.predict.posterior import Posterior
from bora_pyro.priors import RandomPrecision
from tests.tiny_base import opt_model, toy_data, toy_model

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz

PRIORS = {"independent": Independent(), "hierarchy": HierarchicalNormal(tau=20), "pooled": Pooled()}
COUNTS = (6, 2, 6)


@pytest.fixture(scope="module")
def data():
    return toy_data(COUNTS, validation=(3, 3, 3), test=(3, 2, 0))


def fitted_with(data, **options):
    model = BoRA(Backbone(opt_model(), targets=["v_proj", "fc2"]), 3, **{"adapter": LoRA(rank=2)} | options)
    return fit(model, data, epochs=3, learning_rate=0.03, token_budget=64)


@pytest.fixture(scope="module")
def fits(data):
    return {name: fitted_with(data, prior=prior) for name, prior in PRIORS.items()}


DRAWS = 5


@pytest.fixture(scope="module")
def spread(data):
    """A fit around which a guide has a spread, with a random τ."""
    model = BoRA(Backbone(opt_model(), targets=["v_proj", "fc2"]), 3, adapter=LoRA(rank=2), prior=RandomPrecision(start=20))
    return fit(model, data, guide=normal_guide(model, scale=0.5), epochs=1, learning_rate=0.03, token_budget=64)


@pytest.fixture(scope="module")
def drawn(spread, data):
    return shrinkage(spread, data, draws=DRAWS, seed=3)


def the_draw(container):
    return container["posterior"].isel(chain=0, draw=0)


def test_the_shape_of_a_container_with_draws(spread, drawn, data):
    posterior, constant = drawn["posterior"], drawn["constant_data"]
    one = ("chain", "draw")
    assert {name: array.dims for name, array in posterior.data_vars.items()} == {
        "distance": (*one, "task"),
        "rms_deviation": (*one, "task", "layer", "module", "factor"),
        "delta_w_deviation": (*one, "task", "layer", "module"),
        "delta_w_norm": (*one, "task", "layer", "module"),
        "tau": (*one, "module", "factor"),
        "displacement": (*one, "task"),
    }
    assert dict(posterior.sizes) == {"chain": 1, "draw": DRAWS, "task": 3, "layer": 2, "module": 2, "factor": 2}
    assert constant["pooling_factor"].dims == ("layer", "module", "factor")
    assert constant["effective_parameters"].dims == ("task",)
    assert drawn["log_likelihood"]["documents"].dims == (*one, "document")
    # what belongs to no draw is that of the posterior's centre
    centre = shrinkage(spread, data)
    assert dict(centre["posterior"].sizes)["draw"] == 1
    np.testing.assert_allclose(constant["effective_parameters"], the_draw(centre)["effective_parameters"])
    np.testing.assert_allclose(the_draw(centre)["distance"], spread.deviation_norms(), rtol=1e-6)
    np.testing.assert_allclose(constant["centre_rms_deviation"], the_draw(centre)["rms_deviation"])


def test_every_draw_is_that_of_the_posterior(spread, drawn, data):
    posterior, pooling = Posterior(spread, seed=3), tensor_maths.PosteriorPooling()
    for k in range(DRAWS):
        found, sites = drawn["posterior"].isel(chain=0, draw=k), posterior.sites(k)
        theta, mean = spread.model.weights_given(sites)
        delta = {name: value - mean[name] for name, value in theta.items()}
        pooling.add(delta)
        own = Fitted(spread.model, Fixed(sites), data.tasks)
        np.testing.assert_allclose(found["distance"], own.deviation_norms(), rtol=1e-5)
        along = tensor_maths.displacements(delta, tensor_maths.deviations(spread))
        np.testing.assert_allclose(found["displacement"], along, rtol=1e-4)
        for name, value in delta.items():
            module, _, factor = name.partition(".lora_")
            of_latent = found.sel(module=module, factor=factor)
            np.testing.assert_allclose(of_latent["rms_deviation"], value.double().square().mean((2, 3)).sqrt(), rtol=1e-5)
            assert float(of_latent["tau"]) == pytest.approx(float(sites[f"precision.{name}"]))
        for variable in ("delta_w_deviation", "delta_w_norm"):
            for module, norms in getattr(tensor_maths, f"{variable}s")(own).items():
                np.testing.assert_allclose(found[variable].sel(module=module), norms)
        (scores,) = evaluate(spread.model, data.test, theta)
        np.testing.assert_allclose(drawn["log_likelihood"]["documents"][0, k], scores.log_likelihood, rtol=1e-6)
    for name, factors in pooling.factors().items():
        module, _, factor = name.partition(".lora_")
        np.testing.assert_allclose(drawn["constant_data"]["pooling_factor"].sel(module=module, factor=factor), factors)
    assert not np.allclose(drawn["posterior"]["tau"][0, 0], drawn["posterior"]["tau"][0, 1])
    # the same documents under the same draws, without the rest; another seed has other draws
    alone, other = (held_out(spread, data, draws=DRAWS, seed=seed) for seed in (3, 4))
    xr.testing.assert_identical(alone["log_likelihood"], drawn["log_likelihood"])
    np.testing.assert_allclose(alone["posterior"]["distance"], drawn["posterior"]["distance"])
    assert not np.allclose(other["log_likelihood"]["documents"], alone["log_likelihood"]["documents"])


class Fixed:
    """What `Fitted` reads of a guide, for given values of the sites."""

    def __init__(self, sites):
        self.median = lambda: sites


def test_one_draw_is_held_at_a_time(spread, data, monkeypatch):
    alive, original = [], Posterior.sites

    def sites(self, number):
        assert sum(draw() is not None for draw in alive) <= 1  # the one before, until this one takes its name
        drawn = original(self, number)
        alive.append(weakref.ref(drawn["prior_mean.fc2.lora_B"]))
        return drawn

    monkeypatch.setattr(Posterior, "sites", sites)
    shrinkage(spread, data, draws=4)
    assert len(alive) == 4


def test_a_tau_that_is_not_random_is_the_same_in_all_draws(data):
    fitted = fitted_with(data, prior=HierarchicalNormal(tau=20))
    model = fitted.model
    around = Fitted(model, laplace_guide(model, fitted.sites(), data=data), data.tasks)
    container = shrinkage(around, data, draws=3)
    assert container["posterior"]["tau"].shape == (1, 3, 2, 2)
    assert (container["posterior"]["tau"] == 20).all()


def test_the_pooling_factor_of_draws_is_that_of_laplace_where_the_posterior_is():
    # Laplace's guide is the Normal that the closed form of the point estimate stands on
    model, generator = toy_model(rank=2, prior=HierarchicalNormal(tau=20)), torch.Generator().manual_seed(0)
    mean = model.starts
    delta, h = ({name: torch.rand(3, *start.shape, generator=generator) for name, start in mean.items()} for _ in range(2))
    sites = model.sites_given({name: mean[name] + 0.5 * value for name, value in delta.items()}, mean)
    h = {name: 50 * value for name, value in h.items()}
    posterior, pooling = Posterior(Fitted(model, LaplaceGuide(model, sites, h), ["a", "b", "c"])), tensor_maths.PosteriorPooling()
    for theta in posterior.draws(120):
        pooling.add({name: value - mean[name] for name, value in theta.items()})
    for name, factors in pooling.factors().items():
        closed = tensor_maths.pooling_factor(0.5 * delta[name], h[name], torch.tensor(20.0))
        torch.testing.assert_close(factors, closed, rtol=0, atol=0.03)
        assert ((closed > 0.3) & (closed < 0.9)).all()


def test_displacements_by_hand():
    centre = {"x": torch.tensor([[[3.0]], [[0.0]], [[0.0]]]), "y": torch.tensor([[[4.0]], [[0.0]], [[-2.0]]])}
    draw = {"x": torch.tensor([[[1.0]], [[1.0]], [[9.0]]]), "y": torch.tensor([[[2.0]], [[1.0]], [[1.0]]])}
    assert tensor_maths.displacements(draw, centre).tolist() == pytest.approx([11 / 5, 0, -1])
    torch.testing.assert_close(tensor_maths.displacements(centre, centre), tensor_maths.distances(centre))


@pytest.mark.parametrize("draws", [2, 3, 7])
def test_the_pooling_factor_of_draws_by_hand(draws):
    generator = torch.Generator().manual_seed(draws)
    delta = torch.randn(draws, 4, 2, 3, generator=generator, dtype=torch.float64)  # (K, D, layers, entries)
    delta[:, :, 1] = 0.5  # the same in all tasks and draws
    pooling = tensor_maths.PosteriorPooling()
    for draw in delta:
        pooling.add({"x": draw})
    whole, between = (
        np.var(delta[:, :, 0].numpy(), axis=1, ddof=1).mean(0),
        np.var(delta[:, :, 0].numpy().mean(0), axis=0, ddof=1),
    )
    expected = draws / (draws - 1) * (1 - between / whole)
    assert pooling.factors()["x"].tolist() == pytest.approx([expected.mean(), 1])


def test_tasks_that_are_sure_to_differ_are_not_pooled():
    pooling = tensor_maths.PosteriorPooling()
    for _ in range(3):
        pooling.add({"x": torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)})
    assert pooling.factors()["x"].tolist() == [0]
    with pytest.raises(InputError, match="0 draws were added; a pooling factor needs 2 or more"):
        tensor_maths.PosteriorPooling().factors()


def test_a_container_with_draws_is_written_and_read(drawn, tmp_path):
    drawn.to_netcdf(tmp_path / "shrinkage.nc")
    again = arviz.from_netcdf(tmp_path / "shrinkage.nc")
    for group in ("posterior", "log_likelihood", "constant_data"):
        xr.testing.assert_identical(again[group].load(), drawn[group])


def test_draws_are_compared_by_their_mean_density(spread, fits, drawn, data):
    table = compare_priors({"draws": drawn, "point": held_out(fits["pooled"], data)})
    posterior = Posterior(spread, seed=3)
    densities = [evaluate(spread.model, data.test, weights)[0].log_likelihood for weights in posterior.draws(DRAWS)]
    expected = (torch.stack(densities).logsumexp(0) - np.log(DRAWS)).sum()
    assert table.loc["draws", "elpd"] == pytest.approx(expected.item())
    assert table.loc["point", "perplexity"] == pytest.approx(fits["pooled"].evaluate(data.test)["test_perplexity"])


def test_arviz_estimates_leave_one_out_from_the_training_documents(spread, data):
    container, other = (held_out(spread, data, draws=25, split="train", seed=seed) for seed in (0, 1))
    documents = container["log_likelihood"]["documents"]
    assert documents.sizes["document"] == len(data.train)
    assert documents["document_task"].values.tolist() == [data.tasks[d] for d in data.train.task.tolist()]
    assert container["constant_data"]["document_tokens"].values.tolist() == (data.train.lengths - 1).tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto", category=UserWarning)
        # ArviZ 0.23 sorts in a way that pandas 3.1 deprecates: theirs to settle
        warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)
        loo = arviz.loo(container, var_name="documents")
        table = arviz.compare({"x": container, "y": other}, var_name="documents")
    # a document weighs less where it counts against itself: leave-one-out lies below the density as it stands
    elpd, whole = loo.elpd_loo if has_inference_data(arviz.__version__) else loo.elpd, documents.values[0]
    assert elpd < (np.logaddexp.reduce(whole, axis=0) - np.log(len(whole))).sum()
    assert sorted(table.index) == ["x", "y"]
    with pytest.raises(InputError, match=r"'x' has scores of its training documents; compare by held_out\(fitted, data, split="):
        compare_priors({"x": container, "y": held_out(spread, data)})


def test_draws_that_cannot_be(fits, spread, data):
    for look in (shrinkage, held_out):
        with pytest.raises(InputError, match=r"this fit is a point estimate .* and has no posterior"):
            look(fits["pooled"], data, draws=3)
    with pytest.raises(InputError, match="draws is 1; give a whole number from 2 up, or None for the estimate alone"):
        shrinkage(spread, data, draws=1)
    with pytest.raises(InputError, match="draws is 0; give a whole number from 1 up, or None"):
        held_out(spread, data, draws=0)
    with pytest.raises(InputError, match=r"split is 'trian'; it can be test or train; did you mean 'train'\?"):
        held_out(spread, data, split="trian")
