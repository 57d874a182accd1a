"""What the scripts of the paper's figures are tested on: their own folder, and small results."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pandas as pd
import pytest

from bora_pyro.diagnostics.sweep_table import sweep_table, write_sweep
from tests.paper_figures.calls import FOLDER, TASKS


@pytest.fixture
def script(monkeypatch):
    """Imports a script of the folder by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with one small table of each kind."""
    folder = tmp_path_factory.mktemp("results")
    level = {"0": 30.0, "1": 26.0, "100": 20.0, "10000": 23.0, "inf": 24.0, "learned": 21.0}
    rows = [
        {
            "tau": tau, "learning_rate": rate, "seed": seed, "fitted_tau": 200.0 if tau == "learned" else float(tau),
            "validation_perplexity": level[tau] + seed + worse, "test_perplexity": level[tau] + 2 * seed + worse,
            "base_test_perplexity": 50.0, "epochs": 6, "best_epoch": 5, "fit_seconds": 1.0, "training_tokens_per_second": 9.0,
            "peak_memory_bytes": 1, "task": task, "task_train_documents": 2 ** (d + 1), "task_test_documents": 3,
            "task_base_test_perplexity": 50.0, "task_test_perplexity": level[tau] * (1 + 0.2 * d) + seed,
            "deviation_norm": 0.0 if tau == "inf" else (d + 1) / (1 + level[tau]),
        }
        for tau, (rate, worse), seed, (d, task) in itertools.product(
            level, [("0.01", 0), ("0.03", 5)], range(2), list(enumerate(TASKS))
        )
    ]  # fmt: skip
    for name in ("presidents", "documentation"):
        write_sweep(sweep_table(rows), folder / name)
        weights = np.random.default_rng(0).normal(size=(4, 9))
        gram = pd.DataFrame(weights @ weights.T, index=pd.Index(TASKS, name="task"), columns=TASKS)
        gram.to_csv(folder / f"{name}_gram.csv")
    forms = itertools.product(("noncentered", "centered"), (100, 1000), (1e-5, 1e-4), (0, 10, 20))
    pd.DataFrame(
        [(*arm, step, step, 3.0 if step else np.nan, 30 - step / 2, 29 - step / 2) for *arm, step in forms],
        columns=["form", "tau", "learning_rate", "step", "epoch", "objective", "validation_perplexity", "test_perplexity"],
    ).to_csv(folder / "forms.csv", index=False)  # fmt: skip
    pd.DataFrame(
        [
            ("norm_penalty", 300, 0.01, 0, 22.0, 23.0, 50.0, 1.0), ("norm_penalty", 1000, 0.01, 0, 21.0, 22.0, 50.0, 1.0),
            ("norm_penalty", 1000, 0.01, 1, 23.0, 22.0, 50.0, 1.0), ("norm_penalty", 1000, 0.03, 0, 29.0, 30.0, 50.0, 1.0),
            ("paper", 100, 0.01, 0, 20.0, 20.0, 50.0, 1.0), ("paper", 100, 0.01, 1, 21.0, 22.0, 50.0, 1.0),
        ],
        columns=["variant", "tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "base_test_perplexity",
                 "fit_seconds"],
    ).to_csv(folder / "fidelity.csv", index=False)  # fmt: skip
    return folder
