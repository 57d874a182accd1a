"""The measure by which a likelihood judges held-out documents."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from bora_pyro.inference.evaluate import evaluate
from bora_pyro.inference.optimum import still_falling
from bora_pyro.inference.task_groups import joined_score
from bora_pyro.likelihoods import MEASURES, PERPLEXITY, measure_of
from tests.tiny import tiny_bora, tiny_split


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_a_value_gives_back_its_nll(measure):
    assert measure.nll(measure.of(-3.0, 4)) == pytest.approx(0.75)
    assert measure.of(0.0, 0) is None
    assert math.isnan(measure.of(math.nan, 2))


def test_a_perplexity_beyond_all_floats_is_the_largest():
    assert PERPLEXITY.of(-1e6, 1) == math.exp(700)


def test_the_measure_of_a_run_is_the_one_that_its_metrics_have():
    assert [measure_of({f"test_{measure.name}": 1.0}) for measure in MEASURES] == [*MEASURES]
    assert measure_of({"validation_nll": 1.0}, "validation").unit == "NLL, nats a question"
    assert measure_of({}) == PERPLEXITY


def test_sums_and_groups_give_the_value_of_all():
    model, split = tiny_bora(), tiny_split()
    (scores,) = evaluate(model, split, None)
    assert scores.measure.of(*scores.sums().tolist()) == pytest.approx(scores.value())
    groups = [split.subset((split.task == d).nonzero()[:, 0]) for d in range(split.num_tasks)]
    fits = [SimpleNamespace(validation_score=evaluate(model, group, None)[0].value()) for group in groups]
    fits.append(SimpleNamespace(validation_score=None))
    joined = joined_score(fits, [*(PERPLEXITY.observations(group) for group in groups), 0], PERPLEXITY)
    assert joined == pytest.approx(scores.value())
    assert joined_score(fits[-1:], [0], PERPLEXITY) is None


@pytest.mark.parametrize(("last", "falls"), [(0.985, True), (0.995, False), (1.2, False)])
def test_a_note_where_the_nll_of_questions_was_still_falling(last, falls):
    note = still_falling(SimpleNamespace(history=[{"validation_nll": 1.0}, {"validation_nll": last}]), 2)
    assert (note is not None) == falls
    assert not falls or note.startswith("the validation NLL was still falling after the last epoch (1 -> 0.985)")
