"""Tables and containers to draw, and what an axis shows of them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import xarray as xr

from bora_pyro.diagnostics.sweep_table import sweep_table

TASKS = ["ada", "bo", "cleo", "dag", "eva"]
DOCUMENTS = [4, 8, 16, 32, 64]
TAUS = ["0", "1", "100", "10000", "inf"]


def sweep(taus=(*TAUS, "learned"), *, seeds=2, base=60.0):
    """Two rates a τ, of which 0.03 is the better one by the validation split; all numbers differ."""
    middle = {"0": 30.0, "1": 26.0, "100": 20.0, "10000": 23.0, "inf": 24.0, "learned": 20.5}
    rows = []
    for tau, rate, seed in itertools.product(taus, ("0.01", "0.03"), range(seeds)):
        test = middle[tau] + (3 if rate == "0.01" else 0) + seed
        fitted = [90.0, 250.0][seed] if tau == "learned" else float(tau)
        for d, (task, documents) in enumerate(zip(TASKS, DOCUMENTS, strict=True)):
            rows.append(
                {
                    "tau": tau, "learning_rate": rate, "seed": seed, "fitted_tau": fitted, "validation_perplexity": test + 1.5,
                    "test_perplexity": test, "base_test_perplexity": base, "epochs": 6, "best_epoch": 5, "fit_seconds": 1.0,
                    "training_tokens_per_second": 100.0, "peak_memory_bytes": 1, "task": task,
                    "task_train_documents": documents, "task_test_documents": 3, "task_base_test_perplexity": base,
                    "task_test_perplexity": test * (1 + 0.1 * d) + (seed if tau == "100" else 0),
                    "deviation_norm": 0.0 if tau == "inf" else (d + 1) / (1 + float(fitted)) + 0.1 * seed,
                }
            )  # fmt: skip
    return sweep_table(rows)


def groups(draws=(1, 1), *, scale=1.0, seed=0):
    """The datasets of a container: five tasks, three layers, two modules, two factors."""
    rng = np.random.default_rng(seed)
    shape = {"task": TASKS, "layer": [0, 1, 2], "module": ["q_proj", "fc1"], "factor": ["A", "B"]}
    dims = ("chain", "draw", *shape)

    def variable(*names):
        values = scale * np.exp(rng.normal(size=(*draws, *(len(shape[name]) for name in names))))
        return (("chain", "draw", *names), values)

    posterior = xr.Dataset(
        {
            "distance": variable("task"),
            "rms_deviation": variable(*dims[2:]),
            "pooling_factor": (("chain", "draw", *dims[3:]), rng.uniform(0.2, 0.9, size=(*draws, 3, 2, 2))),
        },
        coords={name: values for name, values in shape.items()},
    )
    constant = xr.Dataset({"train_documents": ("task", DOCUMENTS)}, coords={"task": TASKS})
    return {"posterior": posterior, "constant_data": constant}


def gram():
    weights = np.random.default_rng(0).normal(size=(len(TASKS), 9))
    return weights @ weights.T


def compare_table():
    return pd.DataFrame(
        {"rank": [1, 0, 2], "elpd": [-1030.0, -1000.0, -1100.0], "elpd_diff": [30.0, 0.0, 100.0], "dse": [10.0, 0.0, 20.0],
         "perplexity": [17.2, 16.9, 18.0]}, index=["tau 10", "tau 100", "pooled"],
    )  # fmt: skip


def forms_table():
    rows = itertools.product(("centered", "noncentered"), (0.01, 0.1), (0, 10, 20))
    return pd.DataFrame(
        [
            (form, rate, step, 3 + rate - step / 30, 30 + rate - step / 2 + (form == "centered"), np.nan)
            for form, rate, step in rows
        ],
        columns=["form", "learning_rate", "step", "objective", "validation_perplexity", "test_perplexity"],
    )


RECORDS = [
    {"step": 10, "tau": {"q_proj.lora_A": 50.0, "q_proj.lora_B": [10.0, 1000.0], "fc1.lora_A": 20.0}},
    {"step": 15, "loss": 3.0},
    {"step": 20, "tau": {"q_proj.lora_A": 80.0, "q_proj.lora_B": [10.0, 10.0], "fc1.lora_A": 30.0}},
]


def texts_of(figure):
    """Every text that is seen, with its box in pixels."""
    figure.canvas.draw()
    seen = []
    for axis in itertools.chain.from_iterable((ax.xaxis, ax.yaxis) for ax in figure.axes):
        low, high = sorted(axis.get_view_interval())
        seen += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()]
        seen += [tick.label2 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label2.get_visible()]
        seen.append(axis.label)
    for ax in figure.axes:
        seen += [ax.title, *ax.texts]
        if ax.get_legend() is not None:
            seen += ax.get_legend().get_texts()
    return [(text, text.get_window_extent()) for text in seen if text.get_text().strip()]


def lines_of(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def points_of(ax, gid):
    (line,) = lines_of(ax, gid)
    return np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])


def check_legible(figure, texts):
    """Every text has at least 8 points, lies inside the figure, and overlaps no other one."""
    assert min(text.get_fontsize() for text, _ in texts) >= 8
    edge = figure.bbox
    for text, box in texts:
        assert edge.x0 - 1 <= box.x0 <= box.x1 <= edge.x1 + 1, text
        assert edge.y0 - 1 <= box.y0 <= box.y1 <= edge.y1 + 1, text
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert width <= 1 or height <= 1, f"{one} and {other} overlap"
