"""Pooled adapters: the hierarchy that they imply, whatever their gauge, and what is written of them."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.diagnostics.deviations import delta_w_deviations, delta_w_norms, task_gram
from bora_pyro.diagnostics.shrinkage import shrinkage
from bora_pyro.exchange.pooling.fitted import pooled_fit
from bora_pyro.exchange.pooling.folder import read_adapters, write_pooled
from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage, JamesStein, MarginalLikelihood
from bora_pyro.exchange.pooling.pool import pool
from bora_pyro.inference.evaluate import evaluate
from tests.exchange.pooling.adapters import DOCUMENTS, INFORMATION, TAU, adapter_of, apart, common_start, simulated
from tests.tiny import of_task, tiny_data


def delta_w(factors, scaling):
    """ΔW by path, float64."""
    return {path: scaling * of.get("lora_B").double() @ of.get("lora_A").double() for path, of in factors.items()}


def given(adapter):
    return delta_w(adapter.factors, adapter.scaling)


def results(pooled):
    scaling = pooled.alpha / next(iter(pooled.mean.values()))["lora_A"].shape[0]
    return [delta_w(factors, scaling) for factors in pooled.factors.values()], delta_w(pooled.mean, scaling)


def error(found, truth):
    """Sum of squares over all layers."""
    return sum(float((found[path] - truth[path]).square().sum()) for path in found)


def test_a_known_hierarchy_is_recovered(backbone):
    adapters, truths, means = simulated(backbone)
    pooled = pool(adapters, backbone, MarginalLikelihood(DOCUMENTS), rank="full")
    counts = torch.tensor(DOCUMENTS, dtype=torch.float64)
    assert {name: numbers for name, numbers in pooled.frames.items()} == {"q_proj": [8, 8], "fc1": [8, 8]}
    for name, found in pooled.groups.items():
        slot = next(slot for slot in backbone.slots if slot.name == name)
        assert found.entries == 2 * slot.out_features * 8
        assert found.tau == pytest.approx(TAU, rel=0.15)
        assert found.information == pytest.approx(INFORMATION, rel=0.15)
        torch.testing.assert_close(found.shrinkage, TAU / (TAU + INFORMATION * counts), rtol=0.2, atol=0.01)
    shrunk, mean = results(pooled)
    entries = sum(found.entries for found in pooled.groups.values())
    variance = 1 / float((1 / (1 / TAU + 1 / (INFORMATION * counts))).sum())
    assert error(mean, means) == pytest.approx(entries * variance, rel=0.15)
    raw = [error(given(adapter), of_task(truths, d)) for d, adapter in enumerate(adapters.values())]
    after = [error(of, of_task(truths, d)) for d, of in enumerate(shrunk)]
    assert all(new < old for new, old in zip(after, raw, strict=True))
    assert sum(after) < 0.5 * sum(raw)
    assert pooled.relative_error.max() < 1e-6


def test_the_gauge_changes_nothing(backbone):
    one, two = (
        pool(simulated(backbone, gauges=gauges)[0], backbone, MarginalLikelihood(DOCUMENTS), rank=5) for gauges in (False, True)
    )
    for name, found in one.groups.items():
        assert two.groups[name].tau == pytest.approx(found.tau, rel=1e-3)
        torch.testing.assert_close(two.groups[name].shrinkage, found.shrinkage, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one.distances, two.distances, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.relative_error, two.relative_error, rtol=1e-3, atol=1e-6)
    for a, b in zip([*results(one)[0], results(one)[1]], [*results(two)[0], results(two)[1]], strict=True):
        for path, value in a.items():
            torch.testing.assert_close(b[path], value, rtol=1e-3, atol=1e-3)


def test_no_shrinkage_gives_the_adapters_back(backbone, tmp_path):
    adapters = apart(backbone, ranks=(2, 2, 2))
    pooled = pool(adapters, backbone, FixedShrinkage(0))
    assert (pooled.alpha, pooled.relative_error.tolist()) == (3.0, [0, 0, 0])
    for task, adapter in adapters.items():
        for path, factors in adapter.factors.items():
            assert all(torch.equal(pooled.factors[task][path][name], value) for name, value in factors.items())
    write_pooled(tmp_path / "pooled", pooled)
    again = pool(read_adapters(tmp_path / "pooled"), backbone, FixedShrinkage(0))
    write_pooled(tmp_path / "again", again)
    for task in adapters:
        for file in (tmp_path / "pooled" / task).iterdir():
            assert file.read_bytes() == (tmp_path / "again" / task / file.name).read_bytes()


def test_whole_shrinkage_gives_theta_to_all(backbone):
    adapters = apart(backbone)
    pooled = pool(adapters, backbone, FixedShrinkage(1))
    mean = {path: sum(given(adapter)[path] for adapter in adapters.values()) / 3 for path in pooled.mean}
    whole = pool(adapters, backbone, FixedShrinkage(1), rank="full")
    for path, value in results(whole)[1].items():
        torch.testing.assert_close(value, mean[path], rtol=1e-4, atol=1e-4)
    for factors in pooled.factors.values():
        for path, of in factors.items():
            assert all(torch.equal(value, pooled.mean[path][name]) for name, value in of.items())
    assert pooled.distances[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("rank", [None, 1, "full", 12])
def test_shrinkage_is_linear_and_the_cut_the_best(backbone, rank):
    adapters = apart(backbone)
    pooled = pool(adapters, backbone, FixedShrinkage(0.4), rank=rank)
    kept = {None: 3, "full": 7}.get(rank, rank)
    assert pooled.frames["q_proj"] == [7, 7]
    shrunk, _ = results(pooled)
    mean = {path: sum(given(adapter)[path] for adapter in adapters.values()) / 3 for path in pooled.mean}
    for d, adapter in enumerate(adapters.values()):
        cut = whole = 0.0
        for path, value in given(adapter).items():
            u, s, vh = torch.linalg.svd(0.6 * value + 0.4 * mean[path])
            expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
            torch.testing.assert_close(shrunk[d][path], expected, rtol=1e-4, atol=1e-4)
            cut, whole = cut + s[kept:].square().sum(), whole + s.square().sum()
            factors = pooled.factors[f"task {d}"][path]
            assert factors["lora_A"].shape[0] == factors["lora_B"].shape[1] == kept
        assert pooled.relative_error[d].item() == pytest.approx((cut / whole).sqrt().item(), abs=1e-6)
    before = [error(given(adapter), mean) ** 0.5 for adapter in adapters.values()]
    assert pooled.distances[0].tolist() == pytest.approx(before)
    assert pooled.distances[1].tolist() == pytest.approx([0.6 * value for value in before])


def test_factors_share_the_size_evenly(backbone):
    """B and A of a cut adapter have the same singular values, and no layer's sign is left to chance."""
    one, two = (pool(apart(backbone), backbone, FixedShrinkage(0.4)) for _ in range(2))
    for path, factors in one.factors["task 1"].items():
        a, b = factors["lora_A"], factors["lora_B"]
        torch.testing.assert_close(a @ a.mT, b.mT @ b, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(value, two.factors["task 1"][path][name]) for name, value in factors.items())
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


def test_adapters_that_change_nothing(backbone):
    zeros = {
        path: (torch.zeros(slot.out_features, 2), torch.zeros(2, slot.in_features))
        for slot in backbone.slots
        for path in slot.paths
    }
    changes = {path: (b.double(), a.double()) for path, (b, a) in zeros.items()}
    adapters = {name: adapter_of(backbone, changes, name=name) for name in "ab"}
    for estimator in (FixedShrinkage(0.5), JamesStein(1.0), MarginalLikelihood([1, 2])):
        pooled = pool(adapters, backbone, estimator)
        assert all(not value.any() for of_layer in pooled.mean.values() for value in of_layer.values())
        assert pooled.relative_error.tolist() == [0, 0]
        assert pooled_fit(pooled).deviation_norms().tolist() == [0, 0]


def test_pooling_entry_by_entry(tmp_path):
    model, weights, adapters = common_start(tmp_path)
    pooled = pool(adapters, model.backbone, FixedShrinkage(0.3), space="weights")
    assert list(pooled.groups) == [f"{slot.name}.lora_{factor}" for slot in model.backbone.slots for factor in "AB"]
    assert pooled.alpha == 3.0
    for name, value in weights.items():
        slot, _, factor = name.partition(".")
        expected = 0.7 * value.double() + 0.3 * value.double().mean(0)
        found = [
            torch.stack([pooled.factors[task][path][factor] for path in paths])
            for task in adapters
            for paths in [next(one.paths for one in model.backbone.slots if one.name == slot)]
        ]
        torch.testing.assert_close(torch.stack(found).double(), expected, rtol=1e-6, atol=1e-7)
        group = pooled.groups[name]
        assert group.variance == pytest.approx(float(value.double().var(0).mean()))
        assert group.tau == pytest.approx(1 / (0.7 * group.variance))
    distances = torch.stack([(value - value.mean(0)).flatten(1).square().sum(1) for value in weights.values()]).sum(0).sqrt()
    torch.testing.assert_close(pooled.distances[0], distances.double(), rtol=1e-5, atol=0)
    untouched = pool(adapters, model.backbone, FixedShrinkage(0), space="weights")
    for task, adapter in adapters.items():
        assert all(torch.equal(untouched.factors[task][path]["lora_A"], of["lora_A"]) for path, of in adapter.factors.items())
    fitted = pooled_fit(pooled)
    torch.testing.assert_close(fitted.deviation_norms(), pooled.distances[1].float(), rtol=1e-4, atol=1e-5)


def test_a_pooled_fit_is_a_fit(tmp_path):
    model, weights, adapters = common_start(tmp_path, tasks=3)
    data = tiny_data()
    pooled = pool(adapters, model.backbone, MarginalLikelihood([3, 10, 40]))
    as_given, shrunk = pooled_fit(pooled, shrunk=False), pooled_fit(pooled)
    # the adapters as they were predict as they did
    [expected] = evaluate(model, data.test, weights)
    found = as_given.evaluate(data.test)
    assert found["test_perplexity"] == pytest.approx(expected.perplexity(), rel=1e-4)
    norms = delta_w_norms(as_given)
    for d, adapter in enumerate(adapters.values()):
        squares = sum(float(value.square().sum()) for value in given(adapter).values())
        assert float(sum(of[d].square().sum() for of in norms.values())) == pytest.approx(squares, rel=1e-4)
    for fitted, distances in ((as_given, pooled.distances[0]), (shrunk, pooled.distances[1])):
        torch.testing.assert_close(fitted.deviation_norms().double(), distances, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(task_gram(fitted).diagonal().sqrt(), distances, rtol=1e-3, atol=1e-4)
        assert set(delta_w_deviations(fitted)) == {"q_proj", "fc1"}
    assert shrunk.tau_by_group() == pytest.approx(
        {f"{name}.lora_B": min(found.tau, 1e9) for name, found in pooled.groups.items()}, rel=1e-5
    )
    container = shrinkage(as_given, data)
    assert container["posterior"]["distance"].values.ravel().tolist() == pytest.approx(pooled.distances[0].tolist(), rel=1e-3)
    assert bool((container["posterior"]["effective_parameters"] > 0).all())
