"""Plots of sweeps and of fits: each function takes data and an axis, and returns the axis.

>>> import matplotlib.pyplot as plt, numpy as np
>>> with style():
...     figure, ax = plt.subplots()
...     ax = task_pca(np.diag([1.0, 2.0, 3.0]), ["ada", "bo", "cy"], ax)
>>> ax.get_xlabel()
'component 1 (64% of the variance)'
>>> plt.close(figure)

The colours are those of Okabe and Ito. Series also differ in marker and line style, so a figure can be read in greyscale.
"""

from bora_pyro.diagnostics.plots.calibration import reliability_diagram, risk_coverage_curves, scores_by_origin, token_uncertainty
from bora_pyro.diagnostics.plots.few_documents import few_documents_curve
from bora_pyro.diagnostics.plots.gates import gate_accuracy
from bora_pyro.diagnostics.plots.geometry import task_dendrogram, task_pca
from bora_pyro.diagnostics.plots.labels import place_labels
from bora_pyro.diagnostics.plots.learning import learning_curves, reward_curves
from bora_pyro.diagnostics.plots.posterior import rank_histogram, scale_scatter
from bora_pyro.diagnostics.plots.precision import tau_intervals
from bora_pyro.diagnostics.plots.shrinkage import (
    deviation_by_documents,
    deviation_heatmap,
    pooling_factors,
    shrinkage_forest,
    shrinkage_ridge,
)
from bora_pyro.diagnostics.plots.stored_bytes import perplexity_by_bytes
from bora_pyro.diagnostics.plots.style import STYLE, style
from bora_pyro.diagnostics.plots.sweeps import compare_forest, form_curves, task_gain, tau_curve, tau_path
from bora_pyro.diagnostics.plots.task_ranges import task_ranges

__all__ = [
    "STYLE", "compare_forest", "deviation_by_documents", "deviation_heatmap", "few_documents_curve", "form_curves",
    "gate_accuracy", "learning_curves", "perplexity_by_bytes", "place_labels", "pooling_factors", "rank_histogram",
    "reliability_diagram", "reward_curves", "risk_coverage_curves", "scale_scatter", "scores_by_origin", "shrinkage_forest",
    "shrinkage_ridge", "style", "task_dendrogram", "task_gain", "task_pca", "task_ranges", "tau_curve", "tau_intervals",
    "tau_path", "token_uncertainty",
]  # fmt: skip
