"""Members that the library does not know go through a whole run: fit, checkpoint, resume, folder, reading back, export."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.adapters import ADAPTERS
from bora_pyro.data.builtin import BUILTIN
from bora_pyro.errors import InputError
from bora_pyro.guides import GUIDES
from bora_pyro.likelihoods import LIKELIHOODS
from bora_pyro.priors import PRIORS
from bora_pyro.routers import ROUTERS
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.fitting import RunStopped
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run
from bora_pyro.runs.signals import StopSignals
from tests.tiny_base import line, quick_fit
from tests.toy_members import (
    Certainty,
    DoubleExponential,
    OneFactor,
    Projected,
    Spectral,
    TokenMixture,
    double_exponential_guide,
    letters,
)

#: The options that choose a toy member, and what becomes of its adapters.
MEMBERS = {
    "adapter": ({"adapter": "spectral", "adapter_option": "directions=3", "tau": 10}, "relative error"),
    "wrapper": ({"adapter": "projected", "tau": 10}, None),
    "prior": ({"prior": "one_factor"}, None),
    "router": ({"router": "token_mixture", "tau": 10}, "adapters cannot be exported from TokenMixture"),
    "objective": ({"likelihood": "certainty", "likelihood_option": "weight=0.2", "tau": 10}, None),
}
SPECTRAL = {"adapter": "spectral"}
EVERY_MEMBER = pytest.mark.parametrize("member", MEMBERS)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The toy members in their registries: the one line that a new member needs."""
    monkeypatch.setitem(ADAPTERS, "spectral", Spectral)
    monkeypatch.setitem(ADAPTERS, "projected", Projected)
    monkeypatch.setitem(PRIORS, "one_factor", OneFactor)
    monkeypatch.setitem(ROUTERS, "token_mixture", TokenMixture)
    monkeypatch.setitem(LIKELIHOODS, "certainty", Certainty)
    monkeypatch.setitem(GUIDES, "double_exponential", double_exponential_guide)
    monkeypatch.setitem(BUILTIN, "builtin:letters", letters)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return quick_fit(tmp_path_factory.mktemp("inputs"))


def configuration(inputs, member, folder, **more):
    options = inputs | MEMBERS[member][0] | {"output_dir": folder, "patience": 0, "rank": 2} | more
    return parse_config(MapFitConfig, line(options))


@EVERY_MEMBER
def test_a_toy_member_leaves_a_run_that_is_read_back(member, inputs, tmp_path):
    metrics = run_map_fit(configuration(inputs, member, tmp_path / "run"), quiet=True)
    assert (tmp_path / "run" / "posterior.safetensors").is_file()
    run = load_run(tmp_path / "run")
    found = run.fitted.evaluate(run.data.test)
    assert found["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    assert metrics["tau"] == (None if member == "prior" else 10)
    exported = MEMBERS[member][1]
    notes = [note for note in metrics["notes"] if exported and exported in note]
    assert len(notes) == bool(exported)
    assert (tmp_path / "run" / "adapters" / "tasks.json").exists() == (member != "router")


@EVERY_MEMBER
def test_a_run_of_a_toy_member_goes_on_where_it_was_stopped(member, inputs, tmp_path, monkeypatch):
    run_map_fit(configuration(inputs, member, tmp_path / "whole"), quiet=True)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "__call__", lambda signals: asked.append(signals) or len(asked) == 3)
        with pytest.raises(RunStopped):
            run_map_fit(configuration(inputs, member, tmp_path / "run"), quiet=True)
    run_map_fit(configuration(inputs, member, tmp_path / "run", resume=True), quiet=True)
    one, other = (load_run(tmp_path / name).fitted for name in ("whole", "run"))
    for name, value in one.sites().items():
        assert torch.equal(value, other.sites()[name])
    for name, value in one.model.state().items():
        assert torch.equal(value, other.model.state()[name])


def test_a_toy_guide_of_a_posterior_and_a_toy_source_of_data(inputs, tmp_path):
    options = {name: value for name, value in inputs.items() if not name.endswith("column")}
    folder = tmp_path / "run"
    options |= {"data": "builtin:letters", "tau": 10, "output_dir": folder}
    run_map_fit(parse_config(MapFitConfig, line(options)), quiet=True)
    config = PosteriorFitConfig(run=str(folder), guide="double_exponential", output_dir=str(tmp_path / "posterior"), epochs=1)
    metrics = run_posterior_fit(config, quiet=True)
    run = load_run(tmp_path / "posterior")
    assert list(run.fitted.tasks) == ["a", "b"]
    assert isinstance(run.fitted.guide, DoubleExponential)
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-5)
    means, name = run.fitted.sites(), "theta.v_proj.lora_A_decentered"
    draws = torch.stack([run.posterior(seed=seed).sites(0)[name] for seed in range(300)])
    scale = run.fitted.guide.get("log_scale", name).detach().exp()
    around = ((draws - means[name]) / scale).flatten()
    assert around.abs().mean() == pytest.approx(1, rel=0.05)  # E|x| of a double exponential with scale 1; 0.8 of its deviation
    assert around.square().mean() == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": "spectral", "adapter_option": "direction=3"},
            "adapter spectral has no option 'direction'; did you mean 'directions'",
        ),
        (
            {"adapter": "spectral", "adapter_option": "directions=many"},
            "adapter_option directions is 'many'; give a whole number",
        ),
        ({"adapter": "spectral", "adapter_option": "directions"}, "adapter_option 'directions' cannot be used; give key=value"),
        ({"prior": "one_facto"}, r"prior is 'one_facto'; allowed: .*did you mean 'one_factor'"),
        ({"router": "token_mixture"}, r"tau cannot be learned under TokenMixture\(3\), which reads a token by all tasks"),
    ],
)
def test_what_cannot_be_built_is_one_line(options, message, inputs, tmp_path):
    config = parse_config(MapFitConfig, line(inputs | options | {"output_dir": tmp_path / "run"}))
    with pytest.raises(InputError, match=message) as caught:
        run_map_fit(config, quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "pooled", "tau": 3}, "prior and tau are both given; leave tau out"),
        ({"prior_option": "tau=3"}, "prior_option is .*, but there is no prior"),
    ],
)
def test_a_prior_is_named_once(options, message, inputs, tmp_path):
    with pytest.raises(InputError, match=message):
        parse_config(MapFitConfig, line(inputs | options | {"output_dir": tmp_path / "run"}))
