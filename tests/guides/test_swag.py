"""SWAG: the moments of the steps of a fit, and draws with these moments."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine

from bora_pyro import HierarchicalNormal, Independent, InputError, LearnedPrecision, Pooled, RandomPrecision, fit
from bora_pyro.guides import GUIDES, SwagGuide, make_parameters, swag_guide
from bora_pyro.inference.fit import FitStopped
from bora_pyro.inference.loop import Loop
from bora_pyro.predict.held_out import settle
from bora_pyro.predict.posterior import Posterior
from tests.tiny import tiny_batch, tiny_bora, tiny_data

COUNTS = (3, 0, 1, 4, 2)
PRIORS = {
    "normal": lambda: HierarchicalNormal(10.0),
    "centered": lambda: HierarchicalNormal(10.0, "centered"),
    "learned": lambda: LearnedPrecision(start=10.0),
    "independent": Independent,
    "pooled": Pooled,
}
EVERY_STATE = pytest.mark.parametrize("drawn", [False, True], ids=["all tasks", "drawn tasks"])
OPTIONS = {"epochs": 4, "token_budget": 12, "learning_rate": 0.03, "warmup": 0.2, "patience": 0}


def bora(prior="normal", **options):
    return tiny_bora(targets=["q_proj"], tasks=len(COUNTS), prior=PRIORS[prior](), **options)


def recorded(loop):
    """A list that gets the parameters of all tasks after each step of a loop."""
    states, step, drawn = [], loop.state.step, loop.draws_tasks

    def record(rates):
        step(rates)
        own = loop.state.of_all if drawn else loop.state.parameters
        values = {name: value.detach().double() for name, value in own.items()}
        if drawn:
            values |= {name: store.read(torch.arange(len(COUNTS))).double() for name, store in loop.state.rows.values.items()}
        states.append({name: value.clone() for name, value in values.items()})

    loop.state.step = record
    return states


def moments(states, after, moments_at, columns):
    """Mean, variance and columns of a stored trajectory, straight from their definitions."""
    counted = states[after:]
    weights = torch.tensor([s * (s + 1.0) for s in range(1, len(counted) + 1)], dtype=torch.float64)
    mean, variance, kept = {}, {}, []
    for name in states[0]:
        path = torch.stack([state[name] for state in counted])
        w = weights.view(-1, *[1] * (path.dim() - 1))
        mean[name] = (w * path).sum(0) / weights.sum()
        variance[name] = (w * (path - mean[name]).square()).sum(0) / weights.sum()
    for step in moments_at:  # counted from 1
        part = torch.tensor([s * (s + 1.0) for s in range(1, step - after + 1)], dtype=torch.float64)
        column = {}
        for name in states[0]:
            path = torch.stack([state[name] for state in states[after:step]])
            column[name] = states[step - 1][name] - (part.view(-1, *[1] * (path.dim() - 1)) * path).sum(0) / part.sum()
        kept.append(column)
    return mean, variance, kept[-columns:]


@pytest.mark.parametrize("prior", PRIORS)
@EVERY_STATE
def test_the_moments_are_those_of_the_stored_steps(prior, drawn):
    model = bora(prior)
    guide = swag_guide(model, columns=3, per_epoch=2)
    loop = Loop(model, tiny_data(COUNTS), guide, task_subsampling=drawn, **OPTIONS)
    states = recorded(loop)
    for _ in range(OPTIONS["epochs"]):
        loop.run_epoch()
    with loop.state.averaged():
        loop.state.keep()
    loop.finish()
    steps, total = loop.steps_per_epoch, len(states)
    after = round(0.2 * 4 * steps)
    moments_at = [step for step in range(after + 1, total + 1) if step * 2 // steps > (step - 1) * 2 // steps]
    mean, variance, columns = moments(states, after, moments_at, 3)
    assert len(moments_at) > 3  # the oldest column was replaced
    own = dict(guide.named_parameters())
    assert own.keys() == mean.keys()
    found = []
    for name, value in own.items():
        key = name.removesuffix("_unconstrained").removeprefix("loc/")
        torch.testing.assert_close(value.detach().double(), mean[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(guide, f"variance/{key}").double(), variance[name], rtol=1e-4, atol=1e-9)
        assert getattr(guide, f"variance/{key}").max() > 1e-7
        found.append({k: getattr(guide, f"column{k}/{key}").double() for k in range(3)})
    assert int(guide.filled) == 3
    # the order of the columns does not matter
    order = [(len(moments_at) - 3 + k) % 3 for k in range(3)]
    for name, columns_of_name in zip(own, found, strict=True):
        for place, column in zip(order, columns, strict=True):
            torch.testing.assert_close(columns_of_name[place], column[name], rtol=1e-4, atol=1e-6)


def filled(model, *, number=3, columns=4, seed=0):
    """A guide with random moments."""
    guide = SwagGuide(model, columns=columns)
    make_parameters(guide, model)
    generator = torch.Generator().manual_seed(seed)
    random = {name: torch.randn(value.shape, generator=generator) for name, value in guide.named_parameters()}
    parts = [
        {name: torch.randn(value.shape, generator=generator) * (k < number) for name, value in random.items()}
        for k in range(columns)
    ]
    guide.take_steps({name: value.square() for name, value in random.items()}, parts, number)
    return guide


@pytest.mark.parametrize(("number", "scale"), [(3, 1.0), (4, 0.5), (1, 1.0), (0, 2.0)])
def test_the_draws_have_the_covariance_of_the_moments(number, scale):
    model = tiny_bora(targets=["q_proj"], tasks=2, prior=HierarchicalNormal(10.0))
    guide = filled(model, number=number)
    guide.scale.fill_(scale)
    names, draws = ["prior_mean.q_proj.lora_A", "theta.q_proj.lora_A_decentered"], []

    def some(values):  # a few entries of Θ and of both tasks
        return torch.cat([values[names[0]].flatten()[:3], values[names[1]][:, 0, 0, :2].flatten()])

    with poutine.seed(rng_seed=0), torch.no_grad():
        draws = torch.stack([some(guide()) for _ in range(1500)]).double()
    kinds = {kind: some({name: getattr(guide, f"{kind}/{name.replace('.', '/')}") for name in names}) for kind in guide._kinds}
    columns = torch.stack([kinds[f"column{k}"] for k in range(4)]).double()
    low_rank = columns.mT @ columns / (2 * (number - 1)) if number > 1 else torch.zeros(7, 7, dtype=torch.float64)
    covariance = scale**2 * (torch.diag(kinds["variance"].double()) / 2 + low_rank)
    variances = covariance.diagonal()
    error = ((covariance.square() + variances[:, None] * variances[None]) / len(draws)).sqrt()  # of a sample covariance
    assert ((draws.T.cov() - covariance).abs() < 5 * error).all()
    assert ((draws.mean(0) - some(guide.median())).abs() < 5 * (variances / len(draws)).sqrt()).all()


def test_during_a_fit_the_guide_is_the_point_mass_of_map():
    fits = []
    for name in ("map", "swag"):
        model = bora()
        # the guides have their parameters in another order, and so the norm that clips would be summed in another order
        options = OPTIONS | {"schedule": "constant", "gradient_clip": math.inf}
        loop = Loop(model, tiny_data(COUNTS), GUIDES[name](model), task_subsampling=False, **options)
        fits.append(([loop.run_epoch()["objective"] for _ in range(2)], loop.state.sites()))
    (one, sites), (other, same) = fits
    assert one == other
    for name, value in sites.items():
        assert torch.equal(value, same[name])


def test_the_rate_of_a_fit_is_constant_unless_one_says_otherwise():
    rates = {}
    for kind in (None, "cosine"):
        model, seen = bora(), []
        fit(
            model,
            tiny_data(COUNTS),
            guide=swag_guide(model),
            schedule=kind,
            on_step=lambda r, seen=seen: seen.append(r),
            **OPTIONS,
        )
        rates[kind] = [report["learning_rate"] for report in seen]
    assert set(rates[None][round(0.2 * len(rates[None])) :]) == {0.03}
    assert rates["cosine"][-1] < 0.01


@EVERY_STATE
@pytest.mark.parametrize("prior", ["learned", "independent"])
def test_a_resumed_fit_is_the_uninterrupted_one(drawn, prior, tmp_path):
    data, options = tiny_data(COUNTS), OPTIONS | {"task_subsampling": drawn}

    def swag(**more):
        model = bora(prior)
        return fit(model, data, guide=swag_guide(model, columns=3), **options, **more)

    whole, asked = swag(), []
    with pytest.raises(FitStopped):
        swag(checkpoints=tmp_path, stop=lambda: asked.append(1) or len(asked) == 6)
    resumed = swag(checkpoints=tmp_path)
    first, second = whole.guide.state_dict(), resumed.guide.state_dict()
    assert first.keys() == second.keys()
    assert int(whole.guide.filled) >= 1
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert torch.equal(Posterior(whole).draw(3)["q_proj.lora_B"], Posterior(resumed).draw(3)["q_proj.lora_B"])


@pytest.mark.parametrize("prior", ["normal", "pooled"])
def test_rows_in_files_are_those_in_memory(prior):
    guides = []
    for memory in (4.0, 0.0):
        model = bora(prior)
        guides.append(
            fit(model, tiny_data(COUNTS), guide=swag_guide(model), task_subsampling=True, task_memory=memory, **OPTIONS)
        )
    for name, value in guides[0].guide.state_dict().items():
        assert torch.equal(value, guides[1].guide.state_dict()[name]), name


def test_the_mean_of_the_best_epoch_is_kept_with_its_spread(monkeypatch):
    model = bora()
    guide = swag_guide(model)
    loop = Loop(model, tiny_data(COUNTS), guide, task_subsampling=False, **OPTIONS)
    perplexities = iter([1.0, 5.0, 1.0, 4.0, 1.0, 9.0])  # of the last state and the mean in turn; the start had the lowest
    monkeypatch.setattr("bora_pyro.inference.best_state.BestState.score", lambda best: next(perplexities))
    spreads = []
    for _ in range(3):
        loop.run_epoch()
        report = loop.keep_best()
        spreads.append({name: value.clone() for name, value in loop.state.mean.spread.now["variance"].items()})
    assert (report["validation_perplexity"], loop.fitted.best_epoch, loop.fitted.averaged) == (9.0, 2, True)
    loop.finish()
    for name, value in spreads[1].items():
        key = name.removesuffix("_unconstrained").removeprefix("loc/")
        assert torch.equal(getattr(guide, f"variance/{key}"), value)
        assert not torch.equal(value, spreads[2][name])


def test_a_guide_that_was_fitted_is_a_point_mass_in_its_next_fit():
    model = bora()
    guide = fit(model, tiny_data(COUNTS), guide=swag_guide(model), **OPTIONS).guide
    assert int(guide.filled) > 0
    loop = Loop(model, tiny_data(COUNTS), guide, task_subsampling=False, **OPTIONS)
    with torch.no_grad():
        values = guide(tiny_batch(COUNTS))
    for name, value in loop.state.sites().items():
        assert torch.equal(values[name], value)


class Bowl:
    """Held-out documents whose loss at a scale is (scale − 0.4)²."""

    def __init__(self, guide, tokens=(4, 6)):
        self.guide, self.tokens = guide, torch.tensor(tokens)
        self.documents = self.tokens

    def nll(self):
        return (self.guide.scale.double() - 0.4).square() * self.tokens


def test_held_out_documents_choose_the_scale():
    guide = filled(tiny_bora(targets=["q_proj"], tasks=2))
    found = guide.settle(Bowl(guide))
    assert (float(guide.scale), found["scale"]) == (pytest.approx(0.3), 0.3)
    assert found["scales"] == pytest.approx({"0.1": 0.09, "0.3": 0.01, "1.0": 0.36, "3.0": 6.76}, rel=1e-5)
    assert found["notes"] == []
    guide.scales = [0.3, 1.0]
    assert guide.settle(Bowl(guide))["notes"] == [
        "the scale 0.3 is the smallest of those that were tried; give others as --guide_option scales=..."
    ]
    guide.scales = [1.0]
    assert guide.settle(Bowl(guide)) == {"scale": pytest.approx(0.3), "scales": {}, "notes": []}  # nothing to choose
    alone = SwagGuide(tiny_bora(targets=["q_proj"], tasks=2), scales="0.2,4")
    assert alone.settle(Bowl(alone)) == {}  # not fitted
    assert float(alone.scale) == pytest.approx(4.0)  # the nearest to 1, in the logarithm


def test_the_scale_of_a_fit_is_the_one_with_the_best_mixture():
    model, data = bora(), tiny_data(COUNTS)
    fitted = fit(model, data, guide=swag_guide(model, scales=[0.01, 30.0]), **OPTIONS)
    found = settle(fitted, data.validation, draws=3, seed=5)
    losses = {}
    for scale in (0.01, 30.0):
        fitted.guide.scale.fill_(scale)
        losses[str(scale)] = -float(Posterior(fitted, seed=5).score(data.validation, draws=3).log_prob.double().mean())
    assert found["scales"] == pytest.approx(losses)
    assert found["scale"] == pytest.approx(float(min(losses, key=losses.get)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 1}, "columns is 1; give a whole number from 2 up"),
        ({"per_epoch": 0}, "per_epoch is 0; give a whole number from 1 up"),
        ({"scales": "1,,2"}, "scales is '1,,2'; give finite numbers above 0 with commas"),
        ({"scales": [0.0]}, r"scales is \[0.0\]; give finite numbers above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        swag_guide(tiny_bora(), **options)


def test_what_cannot_be_fitted_is_one_line(tmp_path):
    model = tiny_bora(targets=["q_proj"], tasks=5, prior=RandomPrecision())
    with pytest.raises(InputError, match=r"SwagGuide cannot take 'precision.*', which is not a real number, as a random tau"):
        fit(model, tiny_data(COUNTS), guide=swag_guide(model), epochs=1)
    model = bora()
    with pytest.raises(InputError, match=r"average is false, but SwagGuide is the mean of the steps and their spread"):
        fit(model, tiny_data(COUNTS), guide=swag_guide(model), epochs=1, average=False)
    fit(model, tiny_data(COUNTS), guide=swag_guide(model), epochs=1, checkpoints=tmp_path)
    for guide in (swag_guide(model, columns=4), None):
        with pytest.raises(
            InputError, match=r"has another spread of the steps \(columns 5 and per_epoch 2\); give the guide of its"
        ):
            fit(model, tiny_data(COUNTS), guide=guide, epochs=2, checkpoints=tmp_path)
