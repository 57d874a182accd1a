"""Plots: what is drawn equals the data, every axis is named, no text covers another, and grey is enough to read them."""

from __future__ import annotations

import itertools
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.text import Text

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.plots.geometry import distances, principal_components
from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.shrinkage import _INTERVALS
from bora_pyro.diagnostics.plots.style import LINES, MARKERS, PALETTE, tau_axis
from bora_pyro.diagnostics.sweep_table import sweep_table
from bora_pyro.errors import InputError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz

TASKS = ["ada", "bo", "cleo", "dag", "eva"]
DOCUMENTS = [4, 8, 16, 32, 64]
TAUS = ["0", "1", "100", "10000", "inf"]


@pytest.fixture
def ax():
    plt.switch_backend("Agg")
    with plots.style():
        figure, ax = plt.subplots(figsize=(5, 4))
        yield ax
    plt.close(figure)


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

DRAWINGS = {
    "tau_curve": lambda ax: plots.tau_curve(sweep(), ax),
    "tau_curve, base near": lambda ax: plots.tau_curve(sweep(base=32.0), ax),
    "shrinkage_forest": lambda ax: plots.shrinkage_forest(groups(), ax),
    "shrinkage_forest, draws": lambda ax: plots.shrinkage_forest(groups((2, 40)), ax),
    "shrinkage_ridge": lambda ax: plots.shrinkage_ridge(groups(), ax),
    "shrinkage_ridge, draws": lambda ax: plots.shrinkage_ridge(groups((2, 40)), ax),
    "shrinkage_ridge, pooled": lambda ax: plots.shrinkage_ridge(groups(scale=0.0), ax),
    "deviation_by_documents": lambda ax: plots.deviation_by_documents(groups(), ax),
    "deviation_by_documents, sweep": lambda ax: plots.deviation_by_documents(sweep(), ax),
    "deviation_heatmap": lambda ax: plots.deviation_heatmap(groups(), ax),
    "deviation_heatmap, pooled": lambda ax: plots.deviation_heatmap(groups(scale=0.0), ax),
    "pooling_factors": lambda ax: plots.pooling_factors(groups(), ax),
    "pooling_factors, draws": lambda ax: plots.pooling_factors(groups((2, 40)), ax),
    "task_pca": lambda ax: plots.task_pca(gram(), TASKS, ax),
    "task_pca, groups": lambda ax: plots.task_pca(gram(), TASKS, ax, groups=["left", "right", "left", "left", "right"]),
    "task_dendrogram": lambda ax: plots.task_dendrogram(gram(), TASKS, ax),
    "compare_forest": lambda ax: plots.compare_forest(compare_table(), ax),
    "tau_path": lambda ax: plots.tau_path(RECORDS, ax),
    "task_gain": lambda ax: plots.task_gain(sweep(), ax, tau="100", reference="0"),
    "form_curves": lambda ax: plots.form_curves(forms_table(), ax, value="objective"),
}


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


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_axis_comes_back_named_and_legible(ax, name):
    assert DRAWINGS[name](ax) is ax
    assert ax.get_xlabel() or ax.get_xticklabels()
    assert ax.get_ylabel() or ax.get_yticklabels()
    texts = texts_of(ax.figure)
    assert len(texts) > 4
    assert min(text.get_fontsize() for text, _ in texts) >= 8
    edge = ax.figure.bbox
    for text, box in texts:
        assert edge.x0 - 1 <= box.x0 <= box.x1 <= edge.x1 + 1, text
        assert edge.y0 - 1 <= box.y0 <= box.y1 <= edge.y1 + 1, text
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert width <= 1 or height <= 1, f"{one} and {other} overlap"


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_series_can_be_told_apart_in_grey(ax, name):
    legend = DRAWINGS[name](ax).get_legend()
    if legend is None:
        return
    looks = [
        (str(handle.get_marker()), str(handle.get_linestyle()), handle.get_markerfacecolor() == "white")
        for handle in legend.get_lines()
    ]
    assert len(set(looks)) == len(looks)


def test_the_palette_is_as_long_as_the_markers_and_lines():
    assert len(PALETTE) == len(set(PALETTE)) == len(MARKERS) == len(LINES) == 8


def test_a_figure_within_the_style_draws_without_a_display(ax, tmp_path):
    plots.tau_curve(sweep(), ax).figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


# τ


def test_the_axis_of_tau_has_its_limits_beyond_the_ends(ax):
    places = tau_axis(ax, ["inf", "0", "3", "10000"], also=[0.5])
    assert places == {"0": 0.01, "3": 3.0, "10000": 10000.0, "inf": 100000.0}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "3", "$10^{4}$", "∞"]
    breaks = sorted({round(float(line.get_xdata()[0]), 3) for line in lines_of(ax, "break")})
    assert 0.01 < breaks[0] < 0.1
    assert 10000 < breaks[-1] < 100000


@pytest.mark.parametrize(("taus", "places"), [(["0", "inf"], {"0": 0.1, "inf": 10.0}), (["100"], {"100": 100.0}), ([], {})])
def test_the_axis_of_tau_copes_with_few(ax, taus, places):
    assert tau_axis(ax, taus) == places
    assert len(lines_of(ax, "break")) == 3 * sum(tau in ("0", "inf") for tau in taus)


def test_tau_curve_draws_means_spread_and_seeds_at_the_best_rates(ax):
    plots.tau_curve(sweep(), ax)
    places = [0.1, 1, 100, 10000, 100000]
    np.testing.assert_allclose(points_of(ax, "test_perplexity"), np.column_stack([places, [30.5, 26.5, 20.5, 23.5, 24.5]]))
    np.testing.assert_allclose(points_of(ax, "validation_perplexity")[:, 1], [32, 28, 22, 25, 26])
    assert sorted(points_of(ax, "test_perplexity seeds")[:, 1]) == [20, 21, 23, 24, 24, 25, 26, 27, 30, 31]
    (star,) = points_of(ax, "learned")
    np.testing.assert_allclose(star, [150, 21], rtol=1e-12)  # √(90 · 250)
    bars = [segment for bar in ax.containers[0].lines[2] for segment in bar.get_segments()]
    np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars], 2 * np.sqrt(0.5))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "validation",
        "test, mean ± sd of 2 seeds",
        "learned τ = 150",
    ]


def test_tau_curve_draws_the_base_where_it_is_near(ax):
    plots.tau_curve(sweep(base=33.0), ax)
    assert "base model" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(list(line.get_ydata()) == [33.0, 33.0] for line in ax.lines)


@pytest.mark.parametrize(
    ("taus", "seeds"), [(TAUS, 1), (["1", "100"], 1), (["0", "inf"], 1), (["100"], 2), (["0"], 1), (["learned"], 1)]
)
def test_tau_curve_copes_with_part_of_a_sweep(ax, taus, seeds):
    plots.tau_curve(sweep(taus, seeds=seeds), ax)
    assert len(lines_of(ax, "test_perplexity")) == (taus != ["learned"])
    assert len(lines_of(ax, "learned")) == ("learned" in taus)
    assert not ax.containers if seeds == 1 and "learned" not in taus else ax.containers
    ax.figure.canvas.draw()


def test_tau_curve_leaves_out_runs_without_a_perplexity(ax):
    table = sweep(seeds=1)
    table.loc[table["tau"] == "1", "test_perplexity"] = np.nan
    plots.tau_curve(table, ax)
    np.testing.assert_allclose(points_of(ax, "test_perplexity")[:, 0], [0.1, 100, 10000, 100000])
    table["test_perplexity"] = np.nan
    with pytest.raises(InputError, match="no run with a test perplexity"):
        plots.tau_curve(table, ax)


def test_a_learned_tau_that_ran_off_is_a_line_without_a_star(ax):
    table = sweep(seeds=1)
    table.loc[table["tau"] == "learned", "fitted_tau"] = np.inf
    plots.tau_curve(table, ax)
    assert not lines_of(ax, "learned")
    assert "learned τ" in [text.get_text() for text in ax.get_legend().get_texts()]


# what tasks gain and how far they stray


def test_task_gain_is_the_mean_over_seeds(ax):
    plots.task_gain(sweep(), ax, tau="100", reference="0")
    expected = [
        np.mean([100 * (1 - ((20 + seed) * (1 + 0.1 * d) + seed) / ((30 + seed) * (1 + 0.1 * d))) for seed in range(2)])
        for d in range(5)
    ]
    np.testing.assert_allclose(points_of(ax, "gain over 0"), np.column_stack([DOCUMENTS, expected]))
    plots.task_gain(sweep(), ax, tau="100", reference="inf")
    first, second = ax.get_legend().get_lines()
    assert first.get_marker() != second.get_marker()
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["τ = 100 over τ = 0", "τ = 100 over τ = ∞"]


def test_task_gain_needs_both_taus_at_one_seed(ax):
    with pytest.raises(InputError, match=r"no tau '1000'; it has .* did you mean '10000'"):
        plots.task_gain(sweep(), ax, tau="1000", reference="0")
    table = sweep(("0", "100"))
    table = table[(table["tau"] == "0") == (table["seed"] == 0)]
    with pytest.raises(InputError, match="share no task and seed"):
        plots.task_gain(table, ax, tau="100", reference="0")


def test_deviation_by_documents_of_a_container_names_its_tasks(ax):
    container = groups((1, 5))
    plots.deviation_by_documents(container, ax)
    middle = np.median(container["posterior"]["distance"].values[0], axis=0)
    np.testing.assert_allclose(points_of(ax, "distance "), np.column_stack([DOCUMENTS, middle]))
    assert {text.get_text() for text in ax.texts} == set(TASKS)


def test_deviation_by_documents_of_a_sweep_has_a_series_for_each_tau_below_infinity(ax):
    table = sweep()
    plots.deviation_by_documents(table[table["learning_rate"] == "0.03"], ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "τ = 0", "τ = 1", "τ = 100", "τ = $10^{4}$", "learned τ",
    ]  # fmt: skip
    np.testing.assert_allclose(points_of(ax, "distance τ = 1")[:, 1], [0.5 * (d + 1) + 0.05 for d in range(5)])
    with pytest.raises(InputError, match="no deviation_norm of a tau below inf"):
        plots.deviation_by_documents(table[table["tau"] == "inf"], ax)


# containers


def containers():
    yield "mapping", groups
    yield "DataTree", lambda *args: xr.DataTree.from_dict(groups(*args))
    if hasattr(arviz, "InferenceData"):
        yield "InferenceData", lambda *args: arviz.InferenceData(**groups(*args))


@pytest.mark.parametrize(("kind", "container"), list(containers()))
@pytest.mark.parametrize("draws", [(1, 1), (2, 30)])
def test_the_forest_is_in_order_and_its_intervals_are_quantiles(ax, kind, container, draws):
    data = container(draws)
    plots.shrinkage_forest(data, ax)
    values = np.asarray(data["posterior"]["distance"]).reshape(-1, 5)
    middle = np.median(values, axis=0)
    order = np.argsort(middle)
    np.testing.assert_allclose(points_of(ax, "distance"), np.column_stack([middle[order], np.arange(5)]))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{TASKS[d]} ({DOCUMENTS[d]})" for d in order]
    assert len(ax.collections) == (2 if draws[1] > 1 else 0)
    for lines, (probability, _) in zip(ax.collections, _INTERVALS, strict=False):
        ends = np.array([segment[:, 0] for segment in lines.get_segments()])
        np.testing.assert_allclose(ends.T, np.quantile(values[:, order], [(1 - probability) / 2, (1 + probability) / 2], axis=0))


def test_the_ridge_of_one_draw_marks_every_group(ax):
    container = groups()
    plots.shrinkage_ridge(container, ax)
    rms = container["posterior"]["rms_deviation"].sel(task="cleo").values[0, 0]
    marks = [line.get_xdata() for line in lines_of(ax, "marks cleo")]
    for factor in range(2):
        np.testing.assert_allclose(np.sort(marks[factor]), np.sort(rms[..., factor].ravel()))
    assert len(ax.collections) == 5  # a density a task
    assert ax.get_xscale() == "log"


def test_the_ridge_of_many_draws_shows_the_distances(ax):
    container = groups((2, 40))
    plots.shrinkage_ridge(container, ax)
    assert len(ax.collections) == 5
    assert not any(str(line.get_gid()).startswith("marks") for line in ax.lines)
    order = np.argsort(np.median(container["posterior"]["distance"].values.reshape(-1, 5), axis=0))
    assert [label.get_text() for label in ax.get_yticklabels()] == [TASKS[d] for d in order]
    for row, density in enumerate(ax.collections):
        heights = density.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(row)
        assert heights.max() == pytest.approx(row + 0.9)


def test_modules_that_a_layer_lacks_are_passed_over(ax):
    container = groups()
    container["posterior"]["rms_deviation"][..., 2, 1, :] = np.nan
    container["posterior"]["pooling_factor"][..., 1, 1] = np.nan
    plots.shrinkage_ridge(container, ax)
    assert sum(len(line.get_xdata()) for line in lines_of(ax, "marks ada")) == 3 * 2 * 2 - 2
    ax.clear()
    plots.pooling_factors(container, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["q_proj A", "q_proj B", "fc1 A"]


def test_pooled_tasks_have_no_density(ax):
    plots.shrinkage_ridge(groups(scale=0.0), ax)
    assert not ax.collections
    assert ax.get_xscale() == "linear"


@pytest.mark.parametrize("draws", [(1, 1), (2, 3)])
def test_the_heatmap_adds_in_quadrature(ax, draws):
    container = groups(draws)
    plots.deviation_heatmap(container, ax)
    rms = container["posterior"]["rms_deviation"]
    expected = np.sqrt((rms**2).mean(("module", "factor"))).mean(("chain", "draw")).transpose("layer", "task")
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert "units of weight" in ax.figure.axes[1].get_ylabel()


def test_pooling_factors_are_a_line_for_each_module_and_factor(ax):
    container = groups((2, 30))
    plots.pooling_factors(container, ax)
    draws = container["posterior"]["pooling_factor"]
    for module, factor in itertools.product(("q_proj", "fc1"), ("A", "B")):
        points = points_of(ax, f"{module} {factor}")
        np.testing.assert_allclose(points[:, 1], draws.sel(module=module, factor=factor).median(("chain", "draw")))
        np.testing.assert_allclose(points[:, 0], np.arange(3) + points[0, 0])
    assert len(ax.collections) == 2 * 4


def test_a_pooling_factor_of_all_draws_is_read_from_the_constant_data(ax):
    container = groups((1, 30))
    factors = container["posterior"]["pooling_factor"].isel(chain=0, draw=0, drop=True)
    container["posterior"] = container["posterior"].drop_vars("pooling_factor")
    container["constant_data"]["pooling_factor"] = factors
    plots.pooling_factors(container, ax)
    np.testing.assert_allclose(points_of(ax, "q_proj B")[:, 1], factors.sel(module="q_proj", factor="B"))
    assert not ax.collections


def test_deviation_by_documents_has_the_intervals_of_draws(ax):
    container = groups((1, 30))
    plots.deviation_by_documents(container, ax)
    values = container["posterior"]["distance"].values[0]
    assert len(ax.collections) == 2
    for lines, (probability, _) in zip(ax.collections, _INTERVALS, strict=True):
        segments = np.array(lines.get_segments())  # (task, end, coordinate)
        np.testing.assert_allclose(segments[:, 0, 0], DOCUMENTS)
        np.testing.assert_allclose(
            segments[..., 1].T, np.quantile(values, [(1 - probability) / 2, (1 + probability) / 2], axis=0)
        )
    assert "90 % of the draws" in ax.get_ylabel()


def test_the_displacement_is_drawn_where_there_is_one(ax):
    container = groups((1, 30))
    values = container["posterior"]["distance"] - 1.0
    container["posterior"]["displacement"] = values
    plots.shrinkage_forest(container, ax)
    middle = np.median(values[0], axis=0)
    np.testing.assert_allclose(points_of(ax, "distance")[:, 0], np.sort(middle))
    assert "component of" in ax.get_xlabel()
    assert ax.get_xlim()[0] == pytest.approx(1.05 * float(values.min()))
    ax.clear()
    plots.deviation_by_documents(container, ax)
    np.testing.assert_allclose(points_of(ax, "distance "), np.column_stack([DOCUMENTS, middle]))


def test_the_heatmap_of_draws_is_that_of_the_centre(ax):
    container = groups((1, 30))
    centre = groups(seed=1)["posterior"]["rms_deviation"].isel(chain=0, draw=0, drop=True)
    container["constant_data"]["centre_rms_deviation"] = centre
    plots.deviation_heatmap(container, ax)
    np.testing.assert_allclose(
        ax.images[0].get_array(), np.sqrt((centre**2).mean(("module", "factor"))).transpose("layer", "task")
    )


# geometry


def test_two_components_hold_points_of_a_plane(ax):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 30)) + rng.normal(size=30)
    matrix = points @ points.T
    plots.task_pca(matrix, TASKS, ax)
    drawn = points_of(ax, "tasks")
    np.testing.assert_allclose(np.linalg.norm(drawn[:, None] - drawn, axis=-1), distances(matrix), rtol=1e-6)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=1e-8)
    assert principal_components(matrix)[1].sum() == pytest.approx(1)
    assert {text.get_text() for text in ax.texts} == set(TASKS)


def test_components_are_those_of_the_points_about_their_mean():
    points = np.random.default_rng(1).normal(size=(6, 40))
    scores, share = principal_components(points @ points.T)
    centred = points - points.mean(0)
    _, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(share, values[:2] ** 2 / (values**2).sum())
    np.testing.assert_allclose((scores**2).sum(0), values[:2] ** 2)
    assert (scores[np.abs(scores).argmax(0), [0, 1]] > 0).all()
    moved = points + 10.0  # the mean is no matter
    np.testing.assert_allclose(principal_components(moved @ moved.T)[0], scores, rtol=1e-6)


def test_tasks_that_are_all_alike_have_no_variance(ax):
    plots.task_pca(np.ones((3, 3)), ["ada", "bo", "cy"], ax)
    assert ax.get_xlabel() == "component 1 (0% of the variance)"


def test_the_dendrogram_joins_at_average_distances(ax):
    place = np.array([[0.0], [1.0], [10.0]])
    plots.task_dendrogram(place @ place.T, ["ada", "bo", "cy"], ax)
    assert sorted({float(x) for tree in ax.collections for path in tree.get_paths() for x in path.vertices[:, 0]}) == [0, 1, 9.5]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert sorted(names) == ["ada", "bo", "cy"]
    assert abs(names.index("ada") - names.index("bo")) == 1


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3), "shape \\(3, 3\\), names 5"),
        (np.full((5, 5), np.nan), "not a symmetric"),
        (np.arange(25.0).reshape(5, 5), "not a symmetric"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(ax, matrix, words):
    for draw in (plots.task_pca, plots.task_dendrogram):
        with pytest.raises(InputError, match=words):
            draw(matrix, TASKS, ax)
    with pytest.raises(InputError, match="one task"):
        plots.task_pca([[1.0]], ["ada"], ax)


# comparisons and paths


@pytest.mark.parametrize("sign", [1, -1])  # of elpd_diff, which ArviZ has written both ways
def test_the_comparison_is_to_the_best(ax, sign):
    table = compare_table()
    plots.compare_forest(table.assign(elpd_diff=sign * table["elpd_diff"]), ax)
    np.testing.assert_allclose(points_of(ax, "difference"), [[0, 0], [-30, 1], [-100, 2]])
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["tau 100", "tau 10", "pooled"]
    bars = [segment for bar in ax.containers[0].lines[2] for segment in bar.get_segments()]
    np.testing.assert_allclose([np.ptp(bar[:, 0]) for bar in bars], [0, 20, 40])


def test_the_path_of_tau_is_a_line_for_each_group(ax):
    plots.tau_path(RECORDS, ax)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert lines["q_proj.lora_A"] == ([10, 20], pytest.approx([50, 80]))
    assert lines["q_proj.lora_B"] == ([10, 20], pytest.approx([100, 10]))
    assert ax.get_yscale() == "log"
    with pytest.raises(InputError, match="no record has a tau"):
        plots.tau_path([{"step": 1}], ax)


def test_form_curves_are_a_line_for_each_form_and_rate(ax):
    plots.form_curves(forms_table().sample(frac=1, random_state=0), ax, value="validation_perplexity")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}
    assert set(lines) == {f"{form}, rate {rate}" for form in ("centered", "noncentered") for rate in ("0.01", "0.1")}
    assert lines["centered, rate 0.1"] == ([0, 10, 20], pytest.approx([31.1, 26.1, 21.1]))
    with pytest.raises(InputError, match="no number in the column 'test_perplexity'"):
        plots.form_curves(forms_table(), ax, value="test_perplexity")
    with pytest.raises(InputError, match=r"no column 'validation_perplexty'.* did you mean 'validation_perplexity'"):
        plots.form_curves(forms_table(), ax, value="validation_perplexty")


# labels


def test_labels_in_a_crowd_cover_nothing_or_are_left_out(ax):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 80))
    ax.plot(x, y, "o")
    labels = plots.place_labels(ax, x, y, [f"task number {n}" for n in range(80)])
    assert 15 < len(labels) < 80
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = ax.transData.transform(np.column_stack([x, y]))
    assert not any(box.contains(*point) for box in boxes for point in points)
    room = ax.get_window_extent()
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1 for box in boxes)


def test_an_empty_label_is_left_out(ax):
    ax.plot([0, 1, 2], [0, 1, 0], "o")
    assert [label.get_text() for label in plots.place_labels(ax, [0, 1, 2], [0, 1, 0], ["", "bo", ""])] == ["bo"]


def test_a_legend_is_no_wider_than_its_axis(ax):
    ax.figure.set_size_inches(2.5, 3)
    for n in range(3):
        ax.plot([0, 1], [0, n], label=f"line number {n}")
    legend_above(ax, ncols=3)
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().width <= ax.get_window_extent().width


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_nothing_lies_behind_the_legend(ax, scale):
    ax.plot([0, 1, 2], [1, 100, 100], label="one")
    ax.plot([0, 1, 2], [100, 100, 1], label="two")
    ax.set_yscale(scale)
    legend_above(ax)
    ax.figure.canvas.draw()
    _, top = ax.transData.transform((0, 100))
    assert top < ax.get_legend().get_window_extent().y0
