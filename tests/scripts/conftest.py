"""A workshop for sweeps."""

from __future__ import annotations

import pytest

from bora_pyro.runs import tau_sweep
from tests.scripts.sweep_workshop import Workshop


@pytest.fixture
def shop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tau_sweep, "MAP_FIT", [str(tmp_path / "map_fit.py")])
    monkeypatch.setattr(tau_sweep.Sweep, "tokenise", lambda _: None)
    return Workshop(tmp_path, capsys)
