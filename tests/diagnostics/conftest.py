"""An axis to draw on."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from bora_pyro.diagnostics import plots


@pytest.fixture
def ax():
    plt.switch_backend("Agg")
    with plots.style():
        figure, ax = plt.subplots(figsize=(5, 4))
        yield ax
    plt.close(figure)
