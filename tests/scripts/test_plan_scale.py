"""The plan of a large fit: its formulas on a base whose sizes are known, and bad input."""

from __future__ import annotations

import sys

import pytest

from tests.tiny_base import script_main

SIZES = ["--base", "random:tiny", "--tasks", "1000", "--documents", "2", "--max_tokens", "8", "--processes", "2", "--rows", "4"]


@pytest.fixture(scope="module")
def script():
    script_main("plan_scale")
    return sys.modules["plan_scale"]


def test_the_plan_follows_its_formulas(script):
    config = script.parse_config(script.ScaleConfig, [*SIZES, "--flops", "1e6", "--utilisation", "0.5", "--disk", "1e6"])
    backbone = script.outline("random:tiny")
    found = script.needs(script.adapted(backbone, "lora rank=3", 1000), config)
    latents = 2 * 2 * 3 * (32 + 32)  # queries and values of two layers, A and B of rank 3
    assert (found["latents"], found["rows_bytes"]) == (latents, 20 * 1000 * latents)
    assert (found["sent_bytes"], found["moved_bytes"]) == (4 * latents + 48, 32 * 4 * latents)
    assert found["steps"] == 3 * 250
    numbers = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4096 * 32
    assert found["arithmetic_hours"] * 3600 == pytest.approx(3 * 2000 * 8 * (4 * numbers + 6 * latents) / 1e6)
    assert found["disk_hours"] * 3600 == pytest.approx(750 * found["moved_bytes"] / 1e6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "random:llama-7"], "base is 'random:llama-7'; allowed: builtin:nano, random:tiny"),
        (["--utilisation", "2"], "utilisation is 2.0; give a share above 0 and at most 1"),
        (["--disk", "0"], "disk is 0.0; give a number above 0"),
        (["--rows", "0"], "rows is 0; give a whole number from 1 up"),
        (["--base", "random:tiny", "--adapters", "lor rank=2"], "adapter is 'lor'; allowed: "),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert script_main("plan_scale")(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
