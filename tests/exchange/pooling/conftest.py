"""One tiny base for all tests of pooling."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_backbone


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("opt", targets=["q_proj", "fc1"])
