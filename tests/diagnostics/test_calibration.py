"""Calibration against sums written out, and against torchmetrics where the table is the project's own."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from bora_pyro.diagnostics.calibration import (
    area_under_risk_coverage,
    by_task,
    calibration,
    foreign_auroc,
    reliability,
    risk_coverage,
)
from bora_pyro.errors import InputError
from bora_pyro.predict.mixture import predictive
from tests.tiny import random_weights, tiny_bora, tiny_split


def predictions(number=400, *, seed=0, tasks=3):
    """Predictions whose numbers have nothing to do with one another."""
    generator = torch.Generator().manual_seed(seed)
    confidence, brier, log_prob = torch.rand((3, number), generator=generator)
    return SimpleNamespace(
        task=torch.randint(tasks, (number,), generator=generator),
        log_prob=-5 * log_prob,
        confidence=confidence,
        correct=torch.rand(number, generator=generator) < confidence**2,
        brier=2 * brier,
    )


def ece_of(table):
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["count"]))


# calibration


def test_the_means_are_those_of_the_predictions():
    given = predictions()
    found = calibration(given)
    assert found.tokens == 400
    assert found.nll == pytest.approx(-given.log_prob.double().mean().item(), abs=1e-12)
    assert found.brier == pytest.approx(given.brier.double().mean().item(), abs=1e-12)
    assert found.accuracy == given.correct.double().mean().item()
    assert found.confidence == pytest.approx(given.confidence.double().mean().item(), abs=1e-12)
    assert found.confidence > found.accuracy + 0.05


@pytest.mark.parametrize("bins", [1, 2, 15, 40])
def test_the_calibration_error_is_that_of_torchmetrics_and_of_the_table(bins):
    given = predictions()
    expected = binary_calibration_error(given.confidence.double(), given.correct.long(), n_bins=bins).item()
    assert expected > 0.05
    assert calibration(given, bins=bins).ece == pytest.approx(expected, abs=1e-12)
    assert ece_of(reliability(given.confidence, given.correct, bins=bins)) == pytest.approx(expected, abs=1e-12)


def test_the_calibration_error_of_two_bins_by_hand():
    given = SimpleNamespace(
        log_prob=torch.zeros(4), brier=torch.zeros(4), confidence=torch.tensor([0.2, 0.4, 0.75, 1.0]),
        correct=torch.tensor([False, True, True, True]),
    )  # fmt: skip
    # (0.3 against 1/2) and (0.875 against 1): 1 lies in the last bin
    assert calibration(given, bins=2).ece == pytest.approx(0.5 * 0.2 + 0.5 * 0.125, abs=1e-7)


def test_predictions_that_are_as_often_right_as_they_say_have_no_calibration_error():
    confidence = torch.tensor([0.25, 0.5, 0.75]).repeat_interleave(4)
    correct = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]).bool()
    given = SimpleNamespace(log_prob=confidence.log(), brier=confidence, confidence=confidence, correct=correct)
    assert calibration(given).ece == pytest.approx(0, abs=1e-12)
    # certain, and right half of the time
    given.confidence, given.correct = torch.ones(12), torch.arange(12) % 2 == 0
    assert calibration(given).ece == pytest.approx(0.5, abs=1e-12)


def test_a_confidence_that_rounding_has_put_above_1_is_no_logit():
    given = predictions()
    given.confidence[0] = 1 + 2e-7
    above = calibration(given)
    given.confidence[0] = 1.0
    assert above == calibration(given)
    table = reliability(given.confidence, given.correct)
    assert table["upper"].iloc[-1] == 1
    assert ece_of(table) == pytest.approx(above.ece, abs=1e-12)


def test_where_chooses_and_by_task_is_a_row_a_task():
    given = predictions()
    names = ["ada", "bo", "nobody", "cleo"]
    given.task[given.task == 2] = 3
    table = by_task(given, names, bins=7)
    assert table.index.tolist() == names
    assert table["tokens"].tolist() == torch.bincount(given.task, minlength=4).tolist()
    assert table.loc["nobody"].drop("tokens").isna().all()
    for d in (0, 1, 3):
        chosen = given.task == d
        alone = SimpleNamespace(**{name: value[chosen] for name, value in vars(given).items()})
        expected = calibration(alone, bins=7)
        assert calibration(given, bins=7, where=chosen) == expected
        assert table.iloc[d].to_dict() == asdict(expected)
    assert table.loc["ada", "nll"] != table.loc["bo", "nll"]


def test_no_predictions_give_nan():
    found = asdict(calibration(predictions(), where=torch.zeros(400, dtype=torch.bool)))
    assert found.pop("tokens") == 0
    assert all(math.isnan(value) for value in found.values())


def test_the_negative_log_likelihood_of_a_mixture_is_the_logarithm_of_its_perplexity():
    model, split = tiny_bora(), tiny_split()
    found = predictive(model, split, lambda: [random_weights(model, seed=seed) for seed in range(2)])
    assert calibration(found).nll == pytest.approx(math.log(found.perplexity()), rel=1e-6)
    table = by_task(found, ["ada", "bo", "cleo"])
    assert table["tokens"].sum() == split.num_tokens
    assert table.loc["cleo", "nll"] == pytest.approx(math.log(found.perplexity(2)), rel=1e-6)


# the table of a reliability diagram


def test_the_table_by_hand():
    table = reliability([0.0, 0.1, 0.5, 0.55, 1.0], [False, True, True, False, True], bins=4)
    expected = pd.DataFrame(
        {
            "lower": [0.0, 0.5, 0.75], "upper": [0.25, 0.75, 1.0], "confidence": [0.05, 0.525, 1.0],
            "accuracy": [0.5, 0.5, 1.0], "count": [2, 2, 1],
            # right + 2 of count + 4: 3/6, 3/6, 3/5
            "standard_error": [math.sqrt(0.25 / 6), math.sqrt(0.25 / 6), math.sqrt(0.24 / 5)],
        }
    )  # fmt: skip
    pd.testing.assert_frame_equal(table, expected)


def test_tensors_and_arrays_give_one_table():
    given = predictions()
    pd.testing.assert_frame_equal(
        reliability(given.confidence, given.correct), reliability(given.confidence.numpy(), given.correct.tolist())
    )


def test_the_standard_error_is_that_of_a_share_where_predictions_are_many():
    table = reliability([0.5] * 40_000, [True] * 10_000 + [False] * 30_000)
    assert table["standard_error"].item() == pytest.approx(math.sqrt(0.25 * 0.75 / 40_000), rel=1e-3)


# risk and coverage


def test_risk_is_the_mean_loss_at_or_below_each_threshold():
    generator = np.random.default_rng(0)
    uncertainty, loss = generator.integers(0, 9, 50) / 4, generator.exponential(size=50)
    table = risk_coverage(uncertainty, loss)
    assert table["threshold"].tolist() == sorted(set(uncertainty))
    for coverage, risk, threshold in table.itertuples(index=False):
        kept = uncertainty <= threshold
        assert coverage == pytest.approx(kept.mean(), abs=1e-12)
        assert risk == pytest.approx(loss[kept].mean(), abs=1e-12)
    order = generator.permutation(50)
    pd.testing.assert_frame_equal(table, risk_coverage(uncertainty[order], loss[order]))
    assert area_under_risk_coverage(uncertainty, loss) == pytest.approx(
        area_under_risk_coverage(uncertainty[order], loss[order]), abs=1e-12
    )


def test_the_area_is_the_mean_over_all_orders_of_the_tied():
    uncertainty, loss = np.array([2, 1, 2, 1, 2, 3]), np.array([5.0, 1.0, 0.0, 2.0, 1.0, 7.0])
    areas = []
    for order in itertools.permutations(range(6)):
        if (np.diff(uncertainty[list(order)]) >= 0).all():
            areas.append(np.mean(np.cumsum(loss[list(order)]) / np.arange(1, 7)))
    assert len(areas) == 12
    assert max(areas) > min(areas) + 0.1
    assert area_under_risk_coverage(uncertainty, loss) == pytest.approx(np.mean(areas), abs=1e-12)


def test_the_loss_itself_is_the_best_uncertainty_and_a_constant_tells_nothing():
    loss = np.random.default_rng(0).exponential(size=30)
    best, worst = area_under_risk_coverage(loss, loss), area_under_risk_coverage(-loss, loss)
    assert best < area_under_risk_coverage(np.arange(30), loss) < worst
    assert area_under_risk_coverage(np.ones(30), loss) == pytest.approx(loss.mean(), abs=1e-12)


# foreign texts


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
def test_auroc_is_the_share_of_pairs_in_the_right_order(scale):
    generator = np.random.default_rng(0)
    own, foreign = generator.integers(-20, 20, 30) * scale, generator.integers(-10, 30, 20) * scale
    pairs = [(f > o) + (f == o) / 2 for o, f in itertools.product(own, foreign)]
    assert any(pair == 0.5 for pair in pairs)
    assert foreign_auroc(own, foreign) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert foreign_auroc(foreign, own) == pytest.approx(1 - np.mean(pairs), abs=1e-6)


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration(predictions(), bins=0), "bins is 0; give a whole number of 1 or more"),
        (lambda: reliability([0.5], [True], bins=2.5), "bins is 2.5; give a whole number"),
        (lambda: calibration(predictions(), where=torch.ones(400)), "where is torch.float32 of shape .400,.; give a torch.bool"),
        (lambda: calibration(predictions(), where=torch.ones(3, dtype=torch.bool)), "of shape .3,.; give .* of shape .400,."),
        (lambda: by_task(predictions(), ["ada", "bo"]), "indices run from 0 to 2, 2 names are given; give 3 names"),
        (lambda: reliability([0.5, 1.5], [True, False]), "confidence has the value 1.5; give probabilities, from 0 to 1"),
        (lambda: reliability([0.5, math.nan], [True, False]), "confidence is NaN at index 1"),
        (lambda: reliability([0.5, 0.5], [True, 2]), "correct has values other than False and True"),
        (lambda: reliability([0.5, 0.5], [True]), "confidence has 2 entries and correct 1"),
        (lambda: reliability([], []), r"confidence has the shape \(0,\); give a vector"),
        (lambda: risk_coverage([1.0, 2.0], [1.0]), "uncertainty has 2 entries and loss 1"),
        (lambda: area_under_risk_coverage([1.0], [math.nan]), "loss is NaN at index 0"),
        (lambda: foreign_auroc([1.0], torch.zeros(0)), r"foreign has the shape \(0,\); give a vector"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
