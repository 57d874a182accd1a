"""A folder of an adapter that can be read."""

from __future__ import annotations

import pytest

from bora_pyro import save_peft
from tests.tiny import (
    of_task,
    random_weights,
    tiny_bora,
)


@pytest.fixture
def folder(tmp_path):
    """An adapter of the tiny OPT, to damage."""
    model = tiny_bora("opt")
    save_peft(tmp_path / "adapter", model, of_task(random_weights(model), 0), base_model="")
    return tmp_path / "adapter"
