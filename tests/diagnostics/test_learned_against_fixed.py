"""A learned τ against the fixed τ of a sweep."""

from __future__ import annotations

import pytest

from bora_pyro.diagnostics.learned_against_fixed import fixed_taus, lines_of_learned, ratios
from bora_pyro.diagnostics.sweep_table import COLUMNS, sweep_table

# τ, learning rate, seed, validation perplexity, test perplexity
RUNS = [
    ("1", "0.01", 0, 20.0, 18.0),
    ("1", "0.01", 1, 20.0, 20.0),
    ("1", "0.01", 2, 1.0, 1.0),  # the other τ has no such seed
    ("100", "0.01", 0, 19.0, 20.0),
    ("100", "0.01", 1, 19.0, 25.0),
    ("100", "0.03", 0, 30.0, 1.0),  # not the rate that validation chooses
    ("learned", "0.01", 0, 18.0, 18.0),
    ("learned", "0.01", 1, 18.0, 22.0),
]
NAMES = ("tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity")


def table(runs):
    return sweep_table([dict.fromkeys(COLUMNS, 1) | dict(zip(NAMES, run, strict=True)) for run in runs])


def test_the_oracle_is_chosen_on_test_and_the_other_tau_on_validation():
    assert fixed_taus(table(RUNS)) == {"oracle": "1", "chosen by validation": "100"}


def test_ratios_are_paired_by_seed():
    assert ratios(table(RUNS), "1").to_dict() == pytest.approx({0: 1.0, 1: 1.1})
    assert lines_of_learned(table(RUNS)) == [
        "learned against tau = 1 (lowest test perplexity, an oracle): test perplexity 1.050 ± 0.071 times (2 seeds)",
        "learned against tau = 100 (chosen by validation): test perplexity 0.890 ± 0.014 times (2 seeds)",
    ]


def test_an_oracle_of_fewer_seeds_says_so():
    lines = lines_of_learned(table([run for run in RUNS if run[:3] != ("100", "0.01", 1)]))
    assert lines[0] == (
        "learned against tau = 1 (lowest test perplexity, an oracle, by the 1 seed that all tau have): test perplexity "
        "1.050 ± 0.071 times (2 seeds)"
    )


def test_a_sweep_without_a_comparison_has_no_lines():
    assert lines_of_learned(table([run for run in RUNS if run[0] != "learned"])) == []
    assert fixed_taus(table([run for run in RUNS if run[0] != "100"])) == {}
