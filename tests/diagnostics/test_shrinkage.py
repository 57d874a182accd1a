"""The containers: what stands where, against the tensors it comes from; and the comparison of fits, by hand."""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from bora_pyro import Backbone, BoRA, HierarchicalNormal, Independent, InputError, LoRA, Pooled, TaskData, fit
from bora_pyro.adapters import Adapter, SharedPlusTaskLoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.diagnostics import containers as of_containers
from bora_pyro.diagnostics import deviations as tensor_maths
from bora_pyro.diagnostics.containers import has_inference_data
from bora_pyro.diagnostics.shrinkage import compare_priors, held_out, shrinkage
from bora_pyro.guides.curvature import diagonal_fisher
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.priors import with_shared
from tests.tiny import tiny_backbone, tiny_data
from tests.tiny_base import opt_model, toy_data, toy_split

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz

PRIORS = {"independent": Independent(), "hierarchy": HierarchicalNormal(tau=20), "pooled": Pooled()}
COUNTS = (6, 2, 6)
GROUPS = ["posterior", "log_likelihood", "constant_data"]
#: The containers of ArviZ 0.23 and 1.x. Those of 1.x are xarray's own, so that they are checked with every ArviZ.
KINDS = ["InferenceData", "DataTree"] if has_inference_data(arviz.__version__) else ["DataTree"]


@pytest.fixture(scope="module")
def data():
    return toy_data(COUNTS, validation=(3, 3, 3), test=(3, 2, 0))


def fitted_with(data, **options):
    model = BoRA(Backbone(opt_model(), targets=["v_proj", "fc2"]), 3, **{"adapter": LoRA(rank=2)} | options)
    return fit(model, data, epochs=3, learning_rate=0.03, token_budget=64)


@pytest.fixture(scope="module")
def fits(data):
    return {name: fitted_with(data, prior=prior) for name, prior in PRIORS.items()}


@pytest.fixture(scope="module", params=KINDS)
def containers(request, fits, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_containers, "has_inference_data", lambda version: request.param == "InferenceData")
        return {name: shrinkage(fitted, data, token_budget=32) for name, fitted in fits.items()}


def datasets(container):
    """The groups of a container of either kind, each as a dataset."""
    found = ((name, container[name]) for name in GROUPS)
    return {name: group.to_dataset() if isinstance(group, xr.DataTree) else group.load() for name, group in found}


def the_draw(container):
    return container["posterior"].isel(chain=0, draw=0)


def test_the_shape_of_a_container(containers, data):
    container = containers["hierarchy"]
    if isinstance(container, xr.DataTree):
        assert list(container.children) == GROUPS
    else:
        assert isinstance(container, arviz.InferenceData)
        assert container.groups() == GROUPS
    posterior = container["posterior"]
    one = ("chain", "draw")
    assert {name: array.dims for name, array in posterior.data_vars.items()} == {
        "distance": (*one, "task"),
        "rms_deviation": (*one, "task", "layer", "module", "factor"),
        "delta_w_deviation": (*one, "task", "layer", "module"),
        "delta_w_norm": (*one, "task", "layer", "module"),
        "effective_parameters": (*one, "task"),
        "pooling_factor": (*one, "layer", "module", "factor"),
        "tau": (*one, "module", "factor"),
    }
    assert dict(posterior.sizes) == {"chain": 1, "draw": 1, "task": 3, "layer": 2, "module": 2, "factor": 2}
    assert posterior["task"].values.tolist() == data.tasks
    assert posterior["layer"].values.tolist() == [0, 1]
    assert sorted(posterior["module"].values) == ["fc2", "v_proj"]
    assert posterior["factor"].values.tolist() == ["A", "B"]
    assert container.attrs["model"].startswith("BoRA(3 tasks, LoRA(rank=2, alpha=2.0), HierarchicalNormal(tau=20)")


@pytest.mark.parametrize("name", PRIORS)
def test_every_number_comes_from_its_tensor(fits, containers, data, name):
    fitted, found = fits[name], the_draw(containers[name])
    theta, mean = fitted.weights()
    fisher = diagonal_fisher(fitted.model, theta, data.train)
    tau = {"independent": 0.0, "hierarchy": 20.0, "pooled": np.inf}[name]
    np.testing.assert_allclose(found["distance"], fitted.deviation_norms(), rtol=1e-6)
    gamma = np.zeros(3)
    for latent in theta:
        module, _, factor = latent.partition(".lora_")
        delta = (theta[latent] - mean[latent]).double().numpy()  # (D, layers, *shape)
        of_latent = found.sel(module=module, factor=factor)
        np.testing.assert_allclose(of_latent["rms_deviation"], np.sqrt(np.mean(delta**2, axis=(2, 3))), rtol=1e-6)
        assert float(of_latent["tau"]) == tau
        h = fisher[latent].double().numpy()
        gamma += np.divide(h, h + tau, out=np.zeros_like(h), where=h > 0).sum((1, 2, 3))
        factors = tensor_maths.pooling_factor(theta[latent] - mean[latent], fisher[latent], torch.tensor(tau))
        np.testing.assert_allclose(of_latent["pooling_factor"], factors, rtol=1e-4)
    np.testing.assert_allclose(found["effective_parameters"], gamma, rtol=1e-4)
    for variable in ("delta_w_deviation", "delta_w_norm"):
        for module, norms in getattr(tensor_maths, f"{variable}s")(fitted).items():
            np.testing.assert_allclose(found[variable].sel(module=module), norms)


def test_the_limits(containers, fits, data):
    pooled, independent = the_draw(containers["pooled"]), the_draw(containers["independent"])
    for variable in ("distance", "rms_deviation", "delta_w_deviation", "effective_parameters"):
        assert not pooled[variable].any()
    assert (pooled["pooling_factor"] == 1).all()
    assert pooled["delta_w_norm"].all()
    # τ = 0: every entry of which the data say anything counts, whole
    fisher = diagonal_fisher(fits["independent"].model, fits["independent"].weights()[0], data.train)
    informed = sum((value > 0).flatten(1).sum(1) for value in fisher.values())
    assert independent["effective_parameters"].values.tolist() == informed.tolist()
    between = the_draw(containers["hierarchy"])["effective_parameters"]
    assert (between > 0).all()
    assert (between < independent["effective_parameters"]).all()
    assert (independent["pooling_factor"] < 1).all()


def test_held_out_documents(fits, containers, data):
    fitted, container = fits["hierarchy"], containers["hierarchy"]
    (scores,) = evaluate(fitted.model, data.test, fitted.weights()[0])
    for found in (container, held_out(fitted, data)):
        documents, constant = found["log_likelihood"]["documents"], found["constant_data"]
        assert documents.dims == ("chain", "draw", "document")
        np.testing.assert_allclose(documents.values[0, 0], scores.log_likelihood)
        names = [data.tasks[d] for d in data.test.task.tolist()]
        assert documents["document_task"].values.tolist() == names == constant["document_task"].values.tolist()
        assert constant["document_tokens"].values.tolist() == (data.test.lengths - 1).tolist()
        assert constant["train_documents"].values.tolist() == [6, 2, 6]
        assert constant["test_documents"].values.tolist() == [3, 2, 0]
        assert int(constant["parameters"]) == sum(value[0].numel() for value in fitted.weights()[0].values())
    perplexity = np.exp(-documents.sum().item() / constant["document_tokens"].sum().item())
    assert perplexity == pytest.approx(fitted.evaluate(data.test)["test_perplexity"])


def test_the_kind_of_a_container_follows_the_version_of_arviz(fits, data):
    container = held_out(fits["pooled"], data)
    assert isinstance(container, xr.DataTree) == (int(arviz.__version__.split(".")[0]) >= 1)


@pytest.mark.parametrize("read", [arviz.from_netcdf, xr.open_datatree])  # ArviZ 1.x reads by the latter
def test_a_container_is_written_and_read(containers, read, tmp_path):
    container = containers["hierarchy"]
    container.to_netcdf(tmp_path / "shrinkage.nc")
    again = read(tmp_path / "shrinkage.nc")
    for name, group in datasets(again).items():
        xr.testing.assert_identical(group.load(), datasets(container)[name])
    assert again.attrs == container.attrs


def test_a_module_lacks_a_latent_and_a_layer():
    class Sparse(Adapter):
        """Adds a vector to every layer, and to v_proj a scale as well."""

        def start(self, slot, weight, generator):
            scale = {"scale": torch.zeros(1)} if slot.name == "v_proj" else {}
            return Start({"bias": torch.zeros(slot.out_features)} | scale)

        def output(self, x, tensors):
            change = tensors["bias"][:, None]
            return change * (1 + tensors["scale"][:, None]) if "scale" in tensors else change

    # project_in stands before the blocks, once
    model = BoRA(tiny_backbone("opt-350m", targets=["v_proj", "project_in"]), 3, adapter=Sparse())
    data = tiny_data()
    found = the_draw(shrinkage(fit(model, data, epochs=1, learning_rate=0.03), data))
    assert "delta_w_norm" not in found
    assert "delta_w_deviation" not in found
    missing = found["rms_deviation"].isnull().any("task")
    assert missing.sel(factor="bias", module="project_in").values.tolist() == [False, True]
    assert missing.sel(factor="bias", module="v_proj").values.tolist() == [False, False]
    assert missing.sel(factor="scale", module="project_in").values.tolist() == [True, True]
    assert missing.sel(factor="scale", module="v_proj").values.tolist() == [False, False]


def test_shared_latents_are_pooled(data):
    adapter = SharedPlusTaskLoRA(rank=2)
    fitted = fitted_with(data, adapter=adapter, prior=with_shared(HierarchicalNormal(tau=20), adapter.shared))
    found = the_draw(shrinkage(fitted, data))
    assert found["factor"].values.tolist() == ["shared_A", "shared_B", "A", "B"]
    shared, own = found.sel(factor=["shared_A", "shared_B"]), found.sel(factor=["A", "B"])
    assert np.isinf(shared["tau"]).all()
    assert (own["tau"] == 20).all()
    assert not shared["rms_deviation"].any()
    assert (shared["pooling_factor"] == 1).all()
    assert (own["pooling_factor"] < 1).all()


class Varying(HierarchicalNormal):
    """A hierarchy whose τ is another one for each layer, or task, or both."""

    def __init__(self, shape):
        super().__init__(tau=20)
        self.varying = 10 * torch.arange(1.0, 1 + int(np.prod(shape))).reshape(shape)

    def precision(self, name, start, sites=None):
        return self.varying if name == "v_proj.lora_A" else torch.tensor(5.0)


@pytest.mark.parametrize(
    ("shape", "dims", "values"),
    [
        ((), (), 10.0),
        ((2, 1, 1), ("layer",), [10.0, 20.0]),
        ((3, 1, 1, 1), ("task",), [10.0, 20.0, 30.0]),
        ((3, 2, 1, 1), ("task", "layer"), [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]),
        ((2, 1), (), 200**0.5),  # within a layer: the geometric mean
    ],
)
def test_tau_has_the_dimensions_over_which_it_varies(data, shape, dims, values):
    found = the_draw(shrinkage(fitted_with(data, prior=Varying(shape)), data))["tau"]
    assert found.dims == (*dims, "module", "factor")
    np.testing.assert_allclose(found.sel(module="v_proj", factor="A"), values)
    np.testing.assert_allclose(found.sel(module="fc2", factor="B"), np.full(np.shape(values), 5.0))


def toy_container(log_likelihood, *, tokens=(10, 20, 30), tasks=("a", "a", "b"), checksums=(1, 2, 3)):
    values = np.asarray(log_likelihood, dtype=float)
    values = values.reshape((1,) * (3 - values.ndim) + values.shape)  # (chain, draw, document)
    constant = {"document_task": list(tasks), "document_tokens": list(tokens), "document_checksum": list(checksums)}
    return {
        "log_likelihood": xr.Dataset({"documents": (("chain", "draw", "document"), values)}),
        "constant_data": xr.Dataset({name: ("document", value) for name, value in constant.items()}),
    }


def test_compare_priors_by_hand():
    scores = {"worst": [-40, -50, -60], "best": [-30, -45, -60], "middle": [-31, -43, -65]}
    table = compare_priors({name: toy_container(score) for name, score in scores.items()})
    assert table.index.tolist() == ["best", "middle", "worst"]
    assert table["rank"].tolist() == [0, 1, 2]
    assert table["elpd"].tolist() == [-135, -139, -150]
    assert table["elpd_diff"].tolist() == [0, 4, 15]
    # the differences to the best are (1, -2, 5) and (10, 5, 0): variances 37/3 and 25
    assert table["dse"].tolist() == pytest.approx([0, 37**0.5, 75**0.5])
    # (-30, -45, -60) has the variance 225
    assert table.loc["best", "se"] == pytest.approx((3 * 225) ** 0.5)
    assert table["elpd_per_token"].tolist() == pytest.approx([-135 / 60, -139 / 60, -150 / 60])
    assert table["perplexity"].tolist() == pytest.approx(np.exp([135 / 60, 139 / 60, 150 / 60]))


def test_several_draws_are_averaged_as_densities():
    draws = np.log([[[0.2, 0.5, 0.1], [0.4, 0.1, 0.3]]])  # one chain, two draws
    table = compare_priors({"draws": toy_container(draws), "point": toy_container([-9, -9, -9])})
    assert table.loc["draws", "elpd"] == pytest.approx(np.log([0.3, 0.3, 0.2]).sum())


def test_one_document_has_no_standard_error():
    one = {"tokens": (3,), "tasks": ("a",), "checksums": (1,)}
    table = compare_priors({"x": toy_container([-1], **one), "y": toy_container([-2], **one)})
    assert table["elpd_diff"].tolist() == [0, 1]
    assert table[["se", "dse"]].isna().all(axis=None)


def test_compared_fits(fits, containers, data):
    table = compare_priors({name: containers[name] if name == "pooled" else held_out(fits[name], data) for name in fits})
    assert sorted(table.index) == sorted(PRIORS)
    for name, fitted in fits.items():
        assert table.loc[name, "perplexity"] == pytest.approx(fitted.evaluate(data.test)["test_perplexity"])
    assert table["perplexity"].is_monotonic_increasing


def test_arviz_plots_the_table():
    table = compare_priors({"x": toy_container([-1, -2, -3]), "y": toy_container([-2, -3, -5])})
    if has_inference_data(arviz.__version__):
        axis = Figure().subplots()
        with warnings.catch_warnings():  # ArviZ 0.23 sorts in a way that pandas 3.1 deprecates: theirs to settle
            warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)
            arviz.plot_compare(table.rename(columns={"elpd": "elpd_loo"}), ax=axis)
        marked = [line.get_xdata() for line in axis.lines if line.get_marker() == "o"]
        expected = [-6, -10]
    else:
        drawn = arviz.plot_compare(table.assign(elpd_diff=-table["elpd_diff"]), backend="matplotlib")
        axis = drawn.viz["plot"].item()
        plt.close(axis.figure)
        marked = [points.get_offsets()[:, 0] for points in axis.collections if len(points.get_offsets()) == len(table)]
        expected = [0, -4]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x", "y"]
    assert np.concatenate(marked).tolist() == expected  # the better fit lies to the right


@pytest.mark.parametrize(
    "other", [{"tokens": (10, 20, 31)}, {"tasks": ("a", "b", "b")}, {"checksums": (1, 2, 4)}, {"checksums": (2, 1, 3)}, "fewer"]
)
def test_different_documents_are_refused(other):
    if other == "fewer":
        second = toy_container([-1, -2], tokens=(10, 20), tasks=("a", "a"), checksums=(1, 2))
    else:
        second = toy_container([-1, -2, -3], **other)
    with pytest.raises(InputError, match="'y' and 'x' have different test documents; compare fits on the same data"):
        compare_priors({"x": toy_container([-1, -2, -3]), "y": second})


def test_fits_on_other_documents_are_refused(fits, data):
    other = TaskData(data.tasks, data.train, data.validation, toy_split((3, 2, 0), seed=9))
    pair = {"x": held_out(fits["pooled"], data), "y": held_out(fits["pooled"], other)}
    with pytest.raises(InputError, match="different test documents"):
        compare_priors(pair)


def test_nothing_to_compare(fits, data):
    with pytest.raises(InputError, match="1 fit given; give two or more to compare"):
        compare_priors({"x": toy_container([-1, -2, -3])})
    untested = TaskData(data.tasks, data.train, data.validation, toy_split((0, 0, 0), seed=0))
    container = held_out(fits["pooled"], untested)
    assert container["log_likelihood"].sizes["document"] == 0
    with pytest.raises(InputError, match="no test documents to compare fits by"):
        compare_priors({"x": container, "y": container})


def test_a_container_without_test_documents_is_written_and_read(fits, data, tmp_path):
    untested = TaskData(data.tasks, data.train, data.validation, toy_split((0, 0, 0), seed=0))
    shrinkage(fits["pooled"], untested).to_netcdf(tmp_path / "shrinkage.nc")
    again = arviz.from_netcdf(tmp_path / "shrinkage.nc")
    assert again["log_likelihood"]["documents"].shape == (1, 1, 0)
    assert again["constant_data"]["train_documents"].values.tolist() == [6, 2, 6]
