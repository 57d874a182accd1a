"""Tiny models of many architectures pass the checks of ``scripts/maintenance/check_architectures.py``, save the fit."""

from __future__ import annotations

import pytest

from tests.tiny_base import script

# type -> the checks that are refused in one line
ARCHITECTURES = {
    "llama": (),
    "opt": (),
    "gpt2": (),
    "gpt_bigcode": (),
    "phi3": (),
    "mpt": (),
    "bloom": (),
    "gemma2": (),
    "granite": (),
    "cohere": (),
    "mixtral": (),
    "deepseek_v3": ("all_linear",),
    "qwen3_next": ("all_linear",),
    "mamba": ("all_linear",),
    "jamba": (),
    "rwkv": (),
    "bart": (),
    "gemma3": (),
    "ctrl": ("checkpointing",),
    "bert": ("logits",),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name, tmp_path):
    outcome = script("architecture_checks").check_type(name, tmp_path, fits=False)
    cells = outcome.cells
    assert "fault" not in cells.values(), outcome.lines
    assert tuple(check for check, result in cells.items() if result == "refused") == ARCHITECTURES[name], outcome.lines
