"""What many tests of runs begin with: options of a quick fit, a finished one, and the command."""

from __future__ import annotations

import pytest

from bora_pyro.runs import tau_sweep
from tests import tiny_base
from tests.runs.sweep_workshop import Workshop


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Options of a quick fit. Its table and its base are only read."""
    return tiny_base.quick_fit(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def map_run(inputs, tmp_path_factory):
    """The folder of a finished MAP fit with a learned τ. It is only read: a test that changes it takes a copy."""
    return tiny_base.map_run({**inputs, "output_dir": tmp_path_factory.mktemp("map") / "run", "learning_rate": 0.03})


@pytest.fixture(scope="session")
def main():
    return tiny_base.command_main()


@pytest.fixture
def shop(tmp_path, monkeypatch, capsys):
    """A workshop for sweeps."""
    monkeypatch.setattr(tau_sweep, "MAP_FIT", [str(tmp_path / "map_fit.py")])
    monkeypatch.setattr(tau_sweep.Sweep, "tokenise", lambda _: None)
    return Workshop(tmp_path, capsys)
